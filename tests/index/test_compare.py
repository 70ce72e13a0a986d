"""Whether two indices hold the same samples: by content where it is recorded, else by all that is known."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from pretrain.datasets.dataset import array_dataset
from pretrain.errors import InputError
from pretrain.index.compare import SharedShard, shared_shards
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME
from pretrain.shards.indexwriter import write_index
from pretrain.shards.scan import index_shards
from pretrain.shards.write import ShardLayout, write_shards
from tests.index.entries import SINGLE, as_first_version


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Grey pictures, and the same inverted: equal keys, labels and sizes, in two shards each."""
    root = tmp_path_factory.mktemp("tones")
    tone = np.arange(20, dtype=np.uint8)[:, None, None] * 10 + np.zeros((1, 8, 8), np.uint8)
    for name, pixels in (("plain", tone), ("inverted", 255 - tone)):
        data = array_dataset(name, "all", pixels, np.arange(20) % 3, None)
        write_shards(data, root / name, ShardLayout(samples=12))
    return root


def test_other_pixels_are_other_data(tones):
    plain, inverted = (Index.open(tones / name) for name in ("plain", "inverted"))
    assert plain.sequence == inverted.sequence
    assert plain.hash != inverted.hash
    Index.open([tones / "plain", tones / "inverted"]).check_distinct()


def test_a_copy_built_or_indexed_is_the_same_data_and_refused(tones, tmp_path):
    shutil.copytree(tones / "plain", tmp_path / "copy")
    copies = [tmp_path / "copy", index_shards([tmp_path / "copy"], tmp_path / "again.vfi", workers=1)]
    for copy in copies:
        assert Index.open(copy).hash == Index.open(tones / "plain").hash
        with pytest.raises(InputError, match=rf"holds the samples of {tones}/plain/index.vfi again; index each shard"):
            Index.open([tones / "inverted", tones / "plain", copy]).check_distinct()


def test_what_is_not_known_to_be_other_is_refused_with_the_mend(tones, tmp_path):
    blind = [
        index_shards([tones / name], tmp_path / f"{name}.vfi", content=False, workers=1)
        for name in ("plain", "inverted")
    ]
    assert Index.open(blind[0]).hash == Index.open(blind[1]).hash == Index.open(tones / "plain").sequence
    found = (
        r"again; recognised by their keys, labels and sizes alone: if their images differ, .* without --headers-only"
    )
    for pair in (blind, [blind[0], tones / "inverted"], [tones / "plain", blind[1]]):
        with pytest.raises(InputError, match=found):
            Index.open(pair).check_distinct()


def test_digests_of_an_index_by_an_earlier_version_are_compared(tones, tmp_path):
    for name in ("plain", "inverted"):
        shutil.copytree(tones / name, tmp_path / name)
        as_first_version(tmp_path / name / INDEX_NAME)
    paths = [tmp_path / "plain", tmp_path / "inverted"]
    assert Index.open(paths[0]).sequence == Index.open(paths[1]).sequence
    Index.open(paths).check_distinct()
    with pytest.raises(InputError, match="again; index each shard once"):
        Index.open([tones / "plain", tmp_path / "plain"]).check_distinct()


def test_indices_that_share_some_shards_are_refused(tmp_path):
    parts = [tmp_path / f"{number}.vfi" for number in range(3)]
    for part, entries in zip(parts, (SINGLE[:2], SINGLE[1:], SINGLE[2:]), strict=True):
        write_index(part, entries)
    Index.open([parts[0], parts[2]]).check_distinct()
    with pytest.raises(InputError, match=r"1\.vfi: holds the samples of the shard .*b\.tar, as .*0\.vfi does; "):
        Index.open(parts).check_distinct()


@pytest.mark.parametrize(("digest", "known"), [("sha256:b.tar", True), ("", False)])
def test_a_copied_shard_among_others_is_found(tmp_path, digest, known):
    write_index(tmp_path / "one.vfi", SINGLE[:2])
    moved = replace(SINGLE[1], url="elsewhere/x.tar", digest=digest)
    write_index(tmp_path / "two.vfi", [SINGLE[2], moved])
    files = Index.open([tmp_path / "one.vfi", tmp_path / "two.vfi"]).files
    assert list(shared_shards(*files)) == [SharedShard(1, 1, known)]
    with pytest.raises(InputError, match=r"two\.vfi: .* the shard .*x\.tar, as .*one\.vfi has them in .*b\.tar"):
        Index.open([file.path for file in files]).check_distinct()
    other = replace(moved, digest="sha256:other")
    write_index(tmp_path / "two.vfi", [SINGLE[2], other])
    Index.open([tmp_path / "one.vfi", tmp_path / "two.vfi"]).check_distinct()
