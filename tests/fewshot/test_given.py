"""A user's file of features."""

import numpy as np
import pytest

from fewshot.given import read_given
from pretrain.errors import InputError


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "support_x": generator.normal(size=(6, 4)).astype(np.float32),
        "support_y": np.array([0, 1, 2, 0, 1, 2]),
        "query_x": generator.normal(size=(3, 4)).astype(np.float32),
        "query_y": np.array([2, 1, 0]),
    }


@pytest.fixture
def saved(tmp_path, arrays):
    """saved(**changes): a file of the arrays, some replaced (None: left out)."""

    def save(**changes):
        path = tmp_path / "F.npz"
        np.savez(path, **{name: x for name, x in {**arrays, **changes}.items() if x is not None})
        return path

    return save


def test_given_features_are_read_as_they_are(saved, arrays):
    given = read_given(saved(query_y=np.array([2, 1, 0], np.uint8)))
    assert np.array_equal(given.features.support, arrays["support_x"])
    assert given.features.query.dtype == np.float32
    assert given.query_labels.tolist() == [2, 1, 0]
    assert given.classes == 3


def test_doubles_of_the_other_byte_order_keep_their_values(saved, arrays):
    given = read_given(saved(support_x=arrays["support_x"].astype(">f8")))
    assert given.features.support.dtype == np.float64
    assert given.features.support.dtype.isnative
    assert np.array_equal(given.features.support, arrays["support_x"])


NAN = np.full((3, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_y": None}, "no query_y; found support_x"),
        ({"query_x": NAN}, "query_x is not finite in 3 of 3 rows, first in row 0"),
        ({"support_x": np.zeros((6, 4), np.float16)}, "support_x is float16"),
        ({"support_x": np.zeros((6, 4), np.int64)}, "support_x is int64"),
        ({"support_x": np.zeros((6, 2, 2), np.float32)}, r"support_x is float32 \[6, 2, 2\]"),
        (
            {"query_x": np.zeros((0, 4), np.float32), "query_y": np.zeros(0, int)},
            r"query_x is float32 \[0, 4\]",
        ),
        ({"query_x": np.zeros((3, 5), np.float32)}, "support_x has 4 features, query_x 5"),
        ({"query_y": np.array([0, 1])}, "query_x has 3 rows, query_y 2"),
        ({"query_y": np.array([0.0, 1.0, 2.0])}, "query_y is float64"),
        ({"query_y": np.array([[0], [1], [2]])}, r"query_y is int64 \[3, 1\]"),
        ({"query_y": np.array([0, 1, 3])}, "query_y has 1 labels outside 0 … 2, the first in row 2"),
        ({"query_y": np.array([0, -1, 1])}, "query_y has 1 labels outside"),
        ({"support_y": np.array([0, 1, 3, 0, 1, 3])}, "support_y has no label 2"),
        ({"support_y": np.array([1, 2, 3, 1, 2, 3])}, "support_y has no label 0"),
        ({"support_y": np.array([0, 2, -1, 0, 2, -1])}, "support_y has a label -1"),
        ({"support_y": np.zeros(6, int)}, "support_y has one class"),
        ({"support_y": np.array([0, 1, 2, 0, 1, None], object)}, "an array cannot be read"),
    ],
)
def test_what_is_wrong_with_given_features_is_named(saved, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read_given(saved(**changes))
    assert "F.npz" in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path, saved):
    with pytest.raises(InputError, match="no such file"):
        read_given(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(InputError, match=r"text\.npz: a text; an \.npz with support_x"):
        read_given(tmp_path / "text.npz")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(InputError, match=r"an empty file; an \.npz"):
        read_given(tmp_path / "empty.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(InputError, match="a single array"):
        read_given(tmp_path / "single.npy")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_a_truncated_file_is_refused(saved, share):
    path = saved(support_x=np.zeros((6, 4000), np.float32), query_x=np.zeros((3, 4000), np.float32))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"F\.npz"):
        read_given(path)


def test_a_damaged_array_is_refused(saved, arrays):
    path = saved()
    data = bytearray(path.read_bytes())
    data[data.index(arrays["support_x"].tobytes())] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"F\.npz"):
        read_given(path)


@pytest.mark.parametrize(("place", "value"), [(8, 1), (8, 64), (10, 99)], ids=["encrypted", "strongly", "compressed"])
def test_an_archive_of_a_kind_that_is_not_read_is_refused(saved, place, value):
    path = saved()
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + place] |= value  # in the central directory: flags, compression
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"F\.npz"):
        read_given(path)
