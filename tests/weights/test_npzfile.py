"""`.npz` as a container: what is damaged is refused by name, nothing is unpickled, arrays are written one by one."""

import io
import os
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

from pretrain.errors import InputError
from pretrain.weights import npzfile


@pytest.fixture
def small(tmp_path):
    """An archive as `write` makes it, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in {"a/b": (3, 4), "c": (5,)}.items()}
    path = tmp_path / "small.npz"
    npzfile.write(path, list(tensors.items()), {"said": "something"})
    return path, tensors


def read_all(path):
    shapes, values, notes = npzfile.read(path)
    return {name: values(name) for name in shapes}, notes


def archive(path, members, compression=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members:
            file.writestr(name, data)
    return path


def npy(array, **options):
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


def test_numpy_reads_what_is_written_and_what_it_says_comes_back(small):
    path, tensors = small
    with np.load(path) as file:
        assert set(file.files) == set(tensors)
        assert all(np.array_equal(file[name], tensor) for name, tensor in tensors.items())
    found, notes = read_all(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert notes == {"said": "something"}


def test_views_are_laid_out_in_the_order_of_their_axes(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    written = npzfile.write(tmp_path / "vit.npz", [("a", tensor.T), ("b", tensor[:, 1])])
    assert written["bytes"] == os.path.getsize(tmp_path / "vit.npz")
    with np.load(tmp_path / "vit.npz") as file:
        assert file["a"].flags.c_contiguous
        assert np.array_equal(file["a"], tensor.T)
        assert np.array_equal(file["b"], tensor[:, 1])


def test_compressed_archives_are_read(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez_compressed(tmp_path / "vit.npz", a=array)
    assert np.array_equal(read_all(tmp_path / "vit.npz")[0]["a"], array)


class Mark:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    trace = tmp_path / "trace"
    objects = np.array([Mark(trace)], dtype=object)
    path = archive(tmp_path / "vit.npz", [("good.npy", npy(np.ones(2))), ("bad.npy", npy(objects, allow_pickle=True))])
    with pytest.raises(InputError, match=r"vit\.npz: bad: cannot be read as \.npz: a pickle, which is never read"):
        npzfile.read(path)
    # A header that hides it: the values are read as what the header says, never as a pickle.
    hidden = npy(objects, allow_pickle=True).replace(b"'|O'", b"'|b1'")
    with pytest.raises(InputError, match="bad"):
        read_all(archive(tmp_path / "vit.npz", [("bad.npy", hidden)]))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([("a.npy", npy(np.ones(2))), ("a.npy", npy(np.ones(2)))], "a is there twice"),
        ([("a.npy", npy(np.ones(2))), ("a", npy(np.ones(2)))], "a is there twice"),
        ([("a.npy", b"no array")], "a: cannot be read as .npz: the magic string is not correct"),
        ([("a.npy", npy(np.ones(2))[:-1])], r"a: .*an array of 143 bytes whose header announces \[2\] of float64"),
        ([("a.npy", npy(np.ones(2)) + b"x")], r"a: .*an array of 145 bytes"),
        ([("a.npy", npy(np.ones((0, 10**9))))], r"a: .*header announces \[0, 1000000000\]"),
        ([("a.npy", npy(np.ones(4)).replace(b"(4,)", b"(-2, -2)"[:8]).replace(b"  \n", b"\n"))], "a: "),
        ([("a.npy", npy(np.ones(4)).replace(b"(4,), }", b"(9**9,)}"))], "a: "),
        ([("a.npy", npy(np.ones(4)).replace(b"'<f8'", b"'<q9'"))], "a: .*descr is not a valid dtype"),
        ([("folder/", b"")], "folder/: "),
    ],
)
def test_members_that_are_no_arrays_are_refused_by_name(members, found, tmp_path):
    with pytest.raises(InputError, match=f"weights .*vit.npz: {found}"):
        npzfile.read(archive(tmp_path / "vit.npz", members))


def test_other_compressions_are_refused(tmp_path):
    path = archive(tmp_path / "vit.npz", [("a.npy", npy(np.ones(2)))], zipfile.ZIP_LZMA)
    with pytest.raises(InputError, match="a is compressed by method 14"):
        npzfile.read(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    zeros = npy(np.zeros(1 << 22, np.float32))
    path = archive(tmp_path / "vit.npz", [("a.npy", zeros), ("b.npy", zeros)], zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"vit\.npz: unpacks from [0-9,]+ to 33,554,[0-9]+ bytes"):
        npzfile.read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_announces_fewer_bytes_than_it_unpacks_to_is_cut_and_refused(tmp_path):
    """The directory says how much there is; a member that unpacks to more ends there, and its checksum is wrong."""
    path = archive(tmp_path / "vit.npz", [("a.npy", npy(np.arange(1000.0)))], zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    size = len(npy(np.arange(1000.0)))
    short = npy(np.arange(10.0))
    path.write_bytes(data.replace(size.to_bytes(4, "little"), len(short).to_bytes(4, "little")))
    with pytest.raises(InputError, match="a: "):
        read_all(path)


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06", b"\x93NUMPY", b"\x00" * 100])
def test_what_is_no_zip_is_refused(data, tmp_path):
    (tmp_path / "vit.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"vit\.npz: cannot be read as \.npz: File is not a zip file"):
        npzfile.read(tmp_path / "vit.npz")


def fuzz(path, tensors, rounds):
    """Random damage: an InputError that names the file, or the very tensors."""
    draw, whole = np.random.default_rng(0), path.read_bytes()
    refused = 0
    for _ in range(rounds):
        data = bytearray(whole)
        for place in draw.integers(0, len(data), draw.integers(1, 4)):
            data[place] = draw.integers(0, 256)
        if draw.uniform() < 0.2:
            del data[draw.integers(0, len(data)) :]
        path.write_bytes(data)
        try:
            found, notes = read_all(path)
        except InputError as error:
            refused += path.name in str(error)
        else:
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
            assert notes in ({}, {"said": "something"})
    return refused


def test_random_damage_is_refused_or_does_no_harm(small):
    assert fuzz(*small, rounds=1000) > 700


@pytest.mark.long
def test_much_random_damage_is_refused_or_does_no_harm(small, tmp_path):
    path, tensors = small
    assert fuzz(path, tensors, rounds=20_000) > 12_000
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    assert fuzz(path, tensors, rounds=20_000) > 12_000
