"""What the few-shot tests share: real digits as features and as shards, and a small checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.datasets.dataset import array_dataset
from pretrain.index.index import Index
from pretrain.model.arithmetic import threads
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.ranks.collectives import World
from pretrain.shards.scan import index_shards
from pretrain.shards.write import ShardLayout, write_shards


@pytest.fixture(autouse=True)
def _one_thread():
    """More would wait for one another over small products: up to twenty times as long on busy cores."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def digits():
    """(support_x [900, 64], support_y, query_x [897, 64], query_y) of scikit-learn's digits, shuffled."""
    from sklearn.datasets import load_digits  # here, as a bare GPU machine has none

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].astype(np.float32), y[order]
    return x[:900], y[:900], x[900:], y[900:]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """shards(name, images uint8 [n, h, w], labels, classes=None) -> the index of shards of 100 samples."""

    def build(name, images, labels, classes=None):
        folder = tmp_path_factory.mktemp(name)
        data = array_dataset(name, "all", images, labels, classes)
        path, _ = write_shards(data, folder, ShardLayout(samples=100))
        return str(path)

    return build


@pytest.fixture(scope="session")
def digit_shards(digits, shards):
    """The indices of 240 support and 150 query digits, 8 px."""
    support_x, support_y, query_x, query_y = digits
    pixels = [(x.reshape(-1, 8, 8) * 15).astype(np.uint8) for x in (support_x[:240], query_x[:150])]
    return shards("support", pixels[0], support_y[:240]), shards("query", pixels[1], query_y[:150])


@pytest.fixture(scope="session")
def damage():
    """damage(index path, id): the image of a sample is none any more; its shard stays whole."""

    def overwrite(path, id):
        (place,) = Index.open(path).extents(np.array([id]))
        with open(place.url, "r+b") as file:
            data = file.read()
            file.seek(data.index(b"IDAT", place.begin) + 4)
            file.write(b"\xff" * 8)

    return overwrite


@pytest.fixture
def remote(serve, tmp_path):
    """remote(index path) -> (a server of its shards, their index by URL)."""

    def publish(path):
        shards = [Path(url) for url in Index.open(path).shards.urls()]
        server = serve(shards[0].parent)
        index = tmp_path / f"{server.bucket}.vfi"
        index_shards([f"{server.http}/{shard.name}" for shard in shards], index, workers=1)
        server.requests.clear()
        return server, str(index)

    return publish


@pytest.fixture(scope="session")
def tiny():
    """tiny(**fields): the spec of a network of 2 layers, width 32, on grey 8 px images in patches of 2 px."""

    def make(**fields):
        sizes = {
            "patch_size": 2,
            "layers": 2,
            "width": 32,
            "mlp": 64,
            "heads": 2,
            "image_size": 8,
            "channels": 1,
        }
        return ViTSpec(**{**sizes, "num_classes": 10, **fields})

    return make


@pytest.fixture(scope="session")
def drawn():
    """drawn(spec, seed=0): a network none of whose parameters is zero, so that each one matters."""

    def make(spec, seed=0):
        model = VisionTransformer(spec)
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def alone():
    """One rank on the CPU."""
    return World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
