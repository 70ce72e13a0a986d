"""Feature files: a user's, and a run's own."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fewshot.store import content, feature_file, kept, read_given, read_layer, whole, write_features, write_times
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.shards.scan import index_shards


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


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"

    def interrupted():
        with whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(path.parent.iterdir()) == []
    with whole(path) as file:
        file.write(b"all")
        assert not path.exists()
    assert [(found.name, found.read_bytes()) for found in path.parent.iterdir()] == [("file", b"all")]


def test_kept_features_come_back_by_id(tmp_path):
    path = tmp_path / "kept.npz"
    support = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_features(path, {"support_ids": np.array([2, 5, 9]), "support_cls": support, "query_cls": -support})
    found = read_layer(path, "cls", "weights W")
    assert found.rows(np.array([9, 2])).tolist() == [[4, 5], [0, 1]]
    assert found.query.tolist() == (-support).tolist()


def test_features_that_are_not_finite_name_weights_and_layer(tmp_path):
    path = tmp_path / "kept.npz"
    write_features(path, {"support_ids": np.arange(3), "support_cls": NAN, "query_cls": NAN})
    with pytest.raises(InputError, match="weights W: cls is not finite for 3 of 3 support images"):
        read_layer(path, "cls", "weights W")


def test_a_damaged_feature_file_names_itself_and_the_mend(tmp_path):
    path = tmp_path / "kept.npz"
    path.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(InputError, match=r"kept\.npz: cannot be read.*remove the file"):
        read_layer(path, "cls", "weights W")


def test_the_file_of_features_changes_with_all_that_fixes_them(tmp_path):
    first = {"weights": "a", "images": {"support": "b"}}
    assert feature_file(tmp_path, first) == feature_file(tmp_path, dict(reversed(first.items())))
    assert feature_file(tmp_path, first) != feature_file(tmp_path, {**first, "images": {"support": "c"}})


def test_shards_without_an_etag_are_told_apart_by_their_server_or_their_time(digit_shards, serve, tmp_path):
    shards = [Path(url) for url in Index.open(digit_shards[1]).shards.urls()]
    for shard in shards:
        shutil.copy(shard, tmp_path)
    server = serve(tmp_path)
    local = Index.open(index_shards([tmp_path], workers=1))
    remote = Index.open(index_shards([tmp_path], tmp_path / "far.vfi", base=f"{server.http}/", workers=1))
    there, features = content(remote), tmp_path / "features.npz"
    assert not kept(features, {"query": write_times(local)})
    write_features(features, {"query_times": write_times(local), "query_cls": np.zeros(3)})
    assert kept(features, {"query": write_times(local)})
    assert content(remote) == there
    assert not write_times(remote).any()
    changed = tmp_path / shards[0].name
    data = bytearray(changed.read_bytes())
    data[-1500] ^= 1
    changed.write_bytes(data)
    assert not kept(features, {"query": write_times(local)})
    assert content(remote) != there
    changed.unlink()
    assert kept(features, {"query": write_times(local)}), "of a shard that is gone nothing else is known"
    with pytest.raises(InputError, match=f"{changed.name}: 404 Not Found"):
        content(remote)
    features.write_bytes(features.read_bytes()[:100])
    assert kept(features, {"query": write_times(local)}), "told when it is read"


def test_other_pixels_under_the_same_keys_are_other_content(shards):
    labels = np.arange(20) % 2
    black, grey = (Index.open(shards("same", np.full((20, 8, 8), tone, np.uint8), labels)) for tone in (0, 90))
    assert black.sequence == grey.sequence
    assert content(black) != content(grey)
    ids = np.arange(5)
    assert content(black, ids) not in (content(black), content(black, ids + 1))
