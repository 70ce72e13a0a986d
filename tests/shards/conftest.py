"""A data set with lists of labels, names that are hard to show, and images that do not decode."""

import numpy as np
import pytest

from pretrain.datasets.dataset import Dataset, png
from pretrain.index.index import Index
from pretrain.shards.write import ShardLayout, write_shards

NAMES = (
    "tern <b>",
    "5$ & 6$\x1b]0;title\x07\u202e\n\udce9",
    'a "quoted" name that is far too long to be a label',
    "고양이",
)


@pytest.fixture(scope="session")
def lists(tmp_path_factory):
    """60 grey squares with 0 … 3 labels each; id 7 and two others hold no image."""
    rng = np.random.default_rng(0)
    counts = np.arange(60) % 4
    starts = np.concatenate([[0], np.cumsum(counts)])
    labels = np.concatenate([rng.permutation(4)[:count] for count in counts]).astype(np.int32)

    def read(row):
        return "png", b"no image" if row % 20 == 13 else png(np.full((8 + row % 3, 300), row, np.uint8))

    folder = tmp_path_factory.mktemp("lists") / "set"
    write_shards(Dataset("set", "all", labels, starts, NAMES, "f", read), folder, ShardLayout(samples=25))
    return Index.open(folder)
