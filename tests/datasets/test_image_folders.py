"""Image folders as users have them: classes, splits, lists of labels, ImageNet's tree."""

import io
import json
import re
import struct

import numpy as np
import pytest
from PIL import Image

from pretrain.datasets.folder import open_folder
from pretrain.datasets.sources import open_source
from pretrain.errors import InputError
from pretrain.images.decode import decode
from pretrain.index.index import Index
from pretrain.shards.write import write_shards
from tests.datasets.pictures import picture, rows


def test_a_class_folder_is_a_class_and_files_keep_their_bytes(tmp_path):
    files = {
        "cat/b.jpg": ("jpg", True),
        "cat/deep/a.PNG": ("png", True),
        "dog/c.webp": ("webp", True),
        "dog/d.bmp": ("png", False),
        "dog/e.gif": ("png", False),
    }
    for number, name in enumerate(files):
        picture(tmp_path / name, number)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "dog" / ".DS_Store").write_bytes(b"x")
    data = open_source(str(tmp_path))
    assert (data.split, data.classes) == ("all", ("cat", "dog"))
    assert [label for label, _, _ in rows(data)] == [[0], [0], [1], [1], [1]]
    for (name, (suffix, untouched)), (_, found, content) in zip(files.items(), rows(data), strict=True):
        assert found == suffix
        original = (tmp_path / name).read_bytes()
        assert (content == original) == untouched
        same = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert (same == np.asarray(Image.open(tmp_path / name).convert("RGB"))).all()


def test_of_several_pictures_in_a_file_the_first_counts(tmp_path):
    """Phones write a second JPEG behind the first; a WebP that moves is refused by the decoder."""
    first, second = (Image.fromarray(np.full((16, 16, 3), grey, np.uint8)) for grey in (60, 200))
    for name, form in (("a.jpg", "MPO"), ("b.webp", "WEBP"), ("c.png", "PNG")):
        (tmp_path / "cat").mkdir(exist_ok=True)
        first.save(tmp_path / "cat" / name, form, save_all=True, append_images=[second])
    found = rows(open_folder(tmp_path))
    assert [suffix for _, suffix, _ in found] == ["jpg", "png", "png"]
    assert found[0][2] == (tmp_path / "cat" / "a.jpg").read_bytes()
    for _, _, content in found:
        assert (decode(content, 3).int() - 60).abs().max() <= 1


def test_the_content_tells_the_format_not_the_name(tmp_path):
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "a.png").rename(tmp_path / "cat" / "a.jpg")
    assert rows(open_folder(tmp_path))[0][1] == "png"


def test_a_grey_image_file_stays_grey(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "cat" / "a.pgm")
    [(_, suffix, content)] = rows(open_folder(tmp_path))
    assert (suffix, Image.open(io.BytesIO(content)).mode) == ("png", "L")


RAMP = np.array([[0, 255, 256], [40_000, 65_280, 65_535]])


def tiff_of_16_bits(path, order):
    """Grey, one strip; Pillow writes no big-endian files itself."""
    path.parent.mkdir(exist_ok=True)
    tags = [(256, 3), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 12)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 20)
    path.write_bytes(head + RAMP.astype(f"{order}u2").tobytes() + struct.pack(f"{order}H", 9) + entries + bytes(4))


def test_grey_of_16_bits_is_stored_whole_and_read_by_its_upper_byte(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.pgm").write_bytes(b"P5 3 2 65535\n" + RAMP.astype(">u2").tobytes())
    (tmp_path / "cat" / "b.pgm").write_text("P2 3 2 65535\n" + " ".join(map(str, RAMP.flat)))
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "cat" / "c.tif")
    tiff_of_16_bits(tmp_path / "cat" / "d.tif", ">")
    tiff_of_16_bits(tmp_path / "cat" / "e.tif", "<")
    found = rows(open_folder(tmp_path))
    assert len(found) == 5
    for _, suffix, content in found:
        assert (suffix, np.asarray(Image.open(io.BytesIO(content))).tolist()) == ("png", RAMP.tolist())
        assert decode(content, 1)[0].tolist() == (RAMP >> 8).tolist()


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (RAMP.astype(np.int32) + 1, "int32, from 1 to 65536"),
        (RAMP.astype(np.int32) - 1, "int32, from -1 to 65534"),
        (RAMP.astype(np.float32), "float32, from 0.0 to 65535.0"),
        (RAMP.astype(np.float32) / 65_535, "float32, from 0.0 to 1.0"),
    ],
)
def test_pixels_that_no_png_holds_are_refused(tmp_path, pixels, found):
    (tmp_path / "cat").mkdir()
    Image.fromarray(pixels).save(tmp_path / "cat" / "a.tif")
    with pytest.raises(InputError, match=rf"cat/a\.tif: grey pixels of type {found}; .* 0 … 65535 in 16"):
        rows(open_folder(tmp_path))


@pytest.mark.parametrize("inner", ["", "images/"])
def test_splits_share_their_class_numbers(tmp_path, inner):
    for number, name in enumerate(("train/ant/1.jpg", "train/cow/2.jpg", "val/bee/3.jpg", "val/cow/4.jpg")):
        picture(tmp_path / (inner + name), number)
    train, val = open_folder(tmp_path), open_folder(tmp_path, "val")
    assert train.split == "train"
    assert train.classes == val.classes == ("ant", "bee", "cow")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 2], [1, 2])
    with pytest.raises(InputError, match="no split 'test'; it has train, val"):
        open_folder(tmp_path, "test")


def test_links_to_folders_are_followed(tmp_path):
    picture(tmp_path / "store" / "1.jpg")
    (tmp_path / "set" / "dog").mkdir(parents=True)
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "dog" / "more").symlink_to(tmp_path / "store")
    assert open_folder(tmp_path / "set").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("links", "named", "back_to"),
    [
        ({"cat/self": "."}, "cat/self", "cat"),
        ({"cat/deep/up": "../.."}, "cat/deep/up", ""),
        ({"again": "."}, "again", ""),
        ({"cat/out": "../.."}, "cat/out", ""),
        ({"cat/other": "../dog", "dog/back": "../cat"}, "cat/other/back", "cat"),
    ],
)
def test_a_link_that_leads_back_is_refused(tmp_path, links, named, back_to):
    base = tmp_path / "set"
    for name in ("cat/1.jpg", "cat/deep/2.jpg", "dog/3.jpg"):
        picture(base / name)
    for link, target in links.items():
        (base / link).symlink_to(target)
    with pytest.raises(InputError) as error:
        open_folder(base)
    assert str(error.value).startswith(f"{base / named}: leads back to {base / back_to}, ")
    write_labels(base, {})
    with pytest.raises(InputError, match="leads back to"):
        open_folder(base)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no class folders"):
        open_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="no images"):
        open_folder(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_folder(tmp_path / "nowhere")


def write_labels(folder, labels, **more):
    (folder / "labels.json").write_text(json.dumps({"labels": labels, **more}))


def test_labels_json_gives_lists(tmp_path):
    for number, name in enumerate(("a.jpg", "deep/b.jpg", "deep/c.jpg")):
        picture(tmp_path / "set" / name, number)
    lists = {"./deep/b.jpg": ["sea", "dog"], "a.jpg": [], "deep/c.jpg": ["beach"]}
    write_labels(tmp_path / "set", lists, classes=["beach", "dog", "sea"])
    data = open_folder(tmp_path / "set")
    assert [data.labels_of(row) for row in range(3)] == [[], [2, 1], [0]]
    assert data.classes == ("beach", "dog", "sea")
    write_shards(data, tmp_path / "out")
    index = Index.open(tmp_path / "out")
    assert sorted(index.labels(np.arange(3)).tolist()) == [[-1, -1], [0, -1], [2, 1]]
    write_labels(tmp_path / "set", {"a.jpg": [7], "deep/b.jpg": [0, 1], "deep/c.jpg": []})
    data = open_folder(tmp_path / "set")
    assert ([data.labels_of(row) for row in range(3)], data.classes) == ([[7], [0, 1], []], None)


def test_one_labels_json_serves_all_splits(tmp_path):
    picture(tmp_path / "train" / "1.jpg")
    picture(tmp_path / "val" / "2.jpg", 1)
    write_labels(tmp_path, {"train/1.jpg": [3], "val/2.jpg": [1, 2]})
    assert open_folder(tmp_path, "train").labels_of(0) == [3]
    assert open_folder(tmp_path, "val").labels_of(0) == [1, 2]


@pytest.mark.parametrize(
    ("labels", "more", "found"),
    [
        ({}, {}, "1 of 1 images are not listed (a.jpg)"),
        ({"a.jpg": [], "b.jpg": []}, {}, "1 files are listed that are no images"),
        ({"a.jpg": 3}, {}, "found 3; labels are a list of numbers"),
        ({"a.jpg": [-1]}, {}, "label -1; labels are"),
        ({"a.jpg": [True]}, {}, "label True; labels are"),
        ({"a.jpg": [1, 1]}, {}, "a class is listed once"),
        ({"a.jpg": ["cat"]}, {"classes": ["dog"]}, "label 'cat'; labels are a list of names"),
        ({"a.jpg": [0]}, {"classes": ["dog"]}, "label 0; labels are a list of names"),
        ({"a.jpg": []}, {"classes": "dog"}, 'is {"classes"'),
        ({"a.jpg": []}, {"colours": []}, 'is {"classes"'),
    ],
)
def test_a_labels_json_that_does_not_fit_is_refused(tmp_path, labels, more, found):
    picture(tmp_path / "a.jpg")
    write_labels(tmp_path, labels, **more)
    with pytest.raises(InputError, match=r"labels\.json: ") as error:
        open_folder(tmp_path)
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"labels": {"1.jpg": [0], "1.jpg": [1]}}', "has '1.jpg' twice"),
        ('{"labels": {"1.jpg": [0], "./1.jpg": [1]}}', "has '1.jpg' twice"),
        ('{"classes": ["a", "a"], "labels": {"1.jpg": ["a"]}}', '"classes" has a name twice'),
    ],
)
def test_a_labels_file_that_says_two_things_is_refused(tmp_path, content, told):
    picture(tmp_path / "1.jpg")
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(told)):
        open_source(str(tmp_path))
