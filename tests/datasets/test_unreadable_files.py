"""Files under an image's name that are none, or damaged, or no files: told by name, all at once, or left out."""

import io
import os
import stat
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from pretrain.datasets import dataset
from pretrain.datasets.dataset import UnreadableFile, as_stored
from pretrain.datasets.folder import open_folder
from pretrain.errors import InputError
from pretrain.images.decode import MAX_PIXELS
from pretrain.index.index import Index
from pretrain.shards.survey import survey
from pretrain.shards.verify import verify
from pretrain.shards.write import UNREADABLE_NAME, write_shards
from tests.datasets.pictures import picture

NO_IMAGE = r"^1\.jpg: not an image of a format that is read \(JPEG, PNG, WebP, BMP, GIF, PPM \(PGM, PBM\) and TIFF\): "


def encoded(kind, side=64):
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def test_a_postscript_file_starts_no_program(monkeypatch):
    def started(*arguments, **options):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UnreadableFile, match=NO_IMAGE + r"\d+ bytes that begin '25 21 50 53"):
        as_stored(script, "1.jpg")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_a_damaged_file_of_a_format_that_is_not_read_is_named():
    whole = encoded("AVIF")
    for cut in (len(whole), len(whole) // 2, 40):
        with pytest.raises(UnreadableFile, match=NO_IMAGE):
            as_stored(whole[:cut], "1.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_a_file_that_is_cut_off_is_named(kind):
    """Those that are stored untouched as well: training would decode them no better."""
    whole = encoded(kind)
    assert as_stored(whole, "x")
    for cut in (0, 1, 9, 30, len(whole) // 2):
        with pytest.raises(UnreadableFile, match=r"^cat/1\.jpg: "):
            as_stored(whole[:cut], "cat/1.jpg")


@pytest.mark.parametrize("error", [SyntaxError, IndexError, ZeroDivisionError, RuntimeError, TypeError])
def test_whatever_a_decoder_raises_the_file_is_named(monkeypatch, error):
    def fails(*arguments, **options):
        raise error("out of bounds")

    monkeypatch.setattr(dataset.Image, "open", fails)
    with pytest.raises(UnreadableFile, match=r"^1\.bmp: .*out of bounds"):
        as_stored(b"BM" + bytes(100), "1.bmp")
    monkeypatch.setattr("pretrain.images.decode.PngImageFile", fails)
    with pytest.raises(UnreadableFile, match=r"^1\.png: png: out of bounds"):
        as_stored(encoded("PNG"), "1.png")


def test_the_limit_for_pixels_is_trainings_and_named():
    limit = f"of 15000 x 10000 = 150,000,000 pixels, above the limit of {MAX_PIXELS:,}"
    png, bmp = bytearray(encoded("PNG")), bytearray(encoded("BMP"))
    png[16:24] = struct.pack(">II", 15_000, 10_000)
    bmp[18:26] = struct.pack("<ii", 15_000, 10_000)
    for data, kind in ((png, "png"), (bmp, "bmp"), (b"P6 15000 10000 255\n", "ppm")):
        with pytest.raises(UnreadableFile, match=f"^a: {kind} {limit}"):
            as_stored(bytes(data), "a")


def test_an_image_with_a_large_colour_profile_is_an_image_everywhere(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    (tmp_path / "set" / "cat").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "set" / "cat" / "1.png", icc_profile=bytes(2 << 20))
    path, _ = write_shards(open_folder(tmp_path / "set"), tmp_path / "out")
    index = Index.open(path)
    assert verify(index, workers=1).samples == 1
    found = survey(index)
    assert (found.unreadable, found.formats) == ([], {"PNG RGB": 1})


def hostile(folder):
    """Beside two images: a FIFO, a socket, a link to nothing, and a dozen files that are no images."""
    good = [picture(folder / "cat" / "1.jpg"), picture(folder / "dog" / "1.png", 1)]
    os.mkfifo(folder / "cat" / "fifo.jpg")
    (folder / "cat" / "link.jpg").symlink_to("gone.jpg")
    for number in range(12):
        (folder / "dog" / f"x{number:02d}.gif").write_bytes(b"no image" * number)
    os.mknod(folder / "cat" / "socket.jpg", stat.S_IFSOCK | 0o644)
    return good


def test_all_of_them_are_told_at_once_and_the_retry_works(tmp_path):
    good = hostile(tmp_path / "set")
    out = tmp_path / "out"
    with pytest.raises(InputError) as refused:
        write_shards(open_folder(tmp_path / "set"), out)
    lines = str(refused.value).splitlines()
    assert lines[0] == "set: 15 of 17 images cannot be read"
    cat = tmp_path / "set" / "cat"
    assert lines[1].startswith(f"{cat}/fifo.jpg: no regular file (p")
    assert lines[2] == f"{cat}/link.jpg: a link to gone.jpg, which is not there"
    assert lines[3].startswith(f"{cat}/socket.jpg: no regular file (s")
    assert lines[11:] == [
        "and 5 more",
        f"{out}/unreadable.txt lists them all; mend or remove them, or leave them out: --skip-unreadable",
    ]
    assert os.listdir(out) == [UNREADABLE_NAME]
    listed = [line.partition(": ")[0] for line in (out / UNREADABLE_NAME).read_text().splitlines()]
    assert len(listed) == 15
    for path in listed:
        os.unlink(path)
    index = Index.open(write_shards(open_folder(tmp_path / "set"), out)[0])
    assert index.samples == len(good)
    assert not (out / UNREADABLE_NAME).exists()


def test_skipped_files_are_listed_and_are_no_samples(tmp_path):
    hostile(tmp_path / "set")
    out = tmp_path / "out"
    data = open_folder(tmp_path / "set")
    path, written = write_shards(data, out, skip_unreadable=True)
    index = Index.open(path)
    assert (written, index.samples, index.classes) == (True, 2, ("cat", "dog"))
    assert verify(index).samples == 2
    assert len((out / UNREADABLE_NAME).read_text().splitlines()) == 15
    assert write_shards(data, out, skip_unreadable=True) == (path, False)
    with pytest.raises(InputError, match=r"without the files in .*unreadable\.txt; --skip-unreadable"):
        write_shards(data, out)


def test_a_folder_of_nothing_readable_is_refused_even_so(tmp_path):
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"set: 1 of 1 images cannot be read\n(.|\n)*mend or remove them$"):
        write_shards(open_folder(tmp_path / "set"), tmp_path / "out", skip_unreadable=True)


def test_a_file_that_may_not_be_read_is_one_of_them(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    picture(tmp_path / "cat" / "1.jpg")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UnreadableFile, match=r"cat/1\.jpg: cannot be read: Permission denied"):
        open_folder(tmp_path).read(0)


@pytest.mark.parametrize("ending", ["HEIC", "avif", "jxl"])
def test_a_class_of_images_in_a_format_that_is_not_read_keeps_its_number(tmp_path, ending):
    for number, name in enumerate(("bird/1.jpg", "cat/2.jpg", "emu/3.jpg")):
        picture(tmp_path / "set" / name, number)
    (tmp_path / "set" / "cat" / "2.jpg").rename(tmp_path / "set" / "cat" / f"2.{ending}")
    (tmp_path / "set" / "cat" / f"2.{ending}").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    data = open_folder(tmp_path / "set")
    assert (data.classes, data.labels.tolist()) == (("bird", "cat", "emu"), [0, 1, 2])
    with pytest.raises(
        InputError, match=rf"cat/2\.{ending}: not an image of a format that is read .* '00 00 00 18 66 74"
    ):
        write_shards(data, tmp_path / "out")
    write_shards(data, tmp_path / "out", skip_unreadable=True)
    index = Index.open(tmp_path / "out")
    assert (sorted(index.labels(np.arange(2)).ravel().tolist()), tuple(index.classes)) == (
        [0, 2],
        ("bird", "cat", "emu"),
    )


@pytest.mark.parametrize("ending", ["jfif", "JPE"])
def test_other_endings_of_jpegs_are_read(tmp_path, ending):
    picture(tmp_path / "cat" / "1.jpg").rename(tmp_path / "cat" / f"1.{ending}")
    assert open_folder(tmp_path).read(0)[0] == "jpg"
