"""Decoding: what comes of every kind of file, and of broken ones."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from torchvision.io import ImageReadMode

from pretrain.images.decode import (
    MAX_PIXELS,
    MAX_SCANS,
    UnreadableImage,
    decode,
    read_header,
)


def smooth(height, width):
    """A picture that lossy formats keep."""
    y, x = np.mgrid[:height, :width].astype(float)
    planes = [120 + 100 * np.sin(x / 9 + y / 14), 255 * x / width, 255 * y / height]
    return np.stack(planes, -1).astype(np.uint8)


def hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {}),
        ("JPEG", {"quality": 90}),
        ("JPEG", {"progressive": True}),
    ],
)
def test_colour_images_decode_as_pillow_decodes_them(encoded, kind, options):
    data = encoded(smooth(45, 61), kind, **options)
    image = decode(data, 3)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 45, 61))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    exact = kind == "PNG" or options.get("lossless")
    assert abs(hwc(image).astype(int) - expected).max() <= (0 if exact else 2)
    grey = decode(data, 1)
    assert tuple(grey.shape) == (1, 45, 61)
    assert abs(grey[0].numpy().astype(int) - np.asarray(Image.fromarray(expected).convert("L"))).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_images_become_three_equal_channels(encoded, kind):
    image = decode(encoded(smooth(20, 30)[..., 0], kind), 3)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


def test_sixteen_bit_grey_keeps_its_upper_byte(encoded):
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for channels in (1, 3):
        image = decode(encoded(pixels), channels)
        assert image.shape[0] == channels
        assert (image.numpy() == (pixels >> 8)).all()


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA", "CMYK"])
def test_palettes_alpha_and_print_colours_become_rgb(mode):
    buffer = io.BytesIO()
    source = Image.fromarray(smooth(20, 30)).convert(mode)
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    source.save(buffer, "JPEG" if mode == "CMYK" else "PNG", **options)
    image = decode(buffer.getvalue(), 3)
    whole = Image.open(io.BytesIO(buffer.getvalue()))
    expected = np.asarray((whole.convert("RGBA") if mode == "P" else whole).convert("RGB"))
    assert abs(hwc(image).astype(int) - expected).max() <= (2 if mode == "CMYK" else 0)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("PNG", {}, "png"),
        ("JPEG", {}, "jpeg"),
        ("JPEG", {"progressive": True, "comment": b"x" * 3000}, "jpeg"),
        ("WEBP", {}, "webp"),
        ("WEBP", {"lossless": True}, "webp"),
        ("WEBP", {"exif": b"Exif\0\0" + bytes(20)}, "webp"),
    ],
)
def test_the_size_is_read_from_the_header(encoded, kind, options, name):
    for height, width in [(45, 61), (1, 300), (300, 1)]:
        data = encoded(smooth(height, width), kind, **options)
        assert read_header(data) == (name, height, width)
        for cut in range(20):
            with pytest.raises(UnreadableImage):
                read_header(data[:cut])


def test_an_image_above_the_pixel_limit_is_refused_before_it_is_decoded(encoded):
    png = bytearray(encoded(smooth(8, 8)))
    png[16:24] = struct.pack(">II", 10_001, 10_000)
    jpeg = bytearray(encoded(smooth(8, 8), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    for data in (png, jpeg):
        with pytest.raises(UnreadableImage, match=f"above the limit of {MAX_PIXELS:,}"):
            decode(bytes(data), 3)


def test_a_png_of_two_sizes_is_refused_before_the_second_is_decoded(encoded):
    """Its first header is within the limit; Pillow decodes by the last."""
    png = encoded(smooth(8, 8))
    body = b"IHDR" + struct.pack(">II", 30_000, 30_000) + png[24:29]
    second = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(UnreadableImage, match="a second header, of 30000 x 30000 pixels"):
        decode(png[:33] + second + png[33:], 3)


def chunk(kind, body, checksum=None):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum or zlib.crc32(kind + body))


def test_what_a_pngs_pixels_do_not_depend_on_does_not_decide(encoded):
    """A colour profile of over 1 MiB, texts too long or damaged, a transparency: Pillow gives some of these up."""
    png = encoded(smooth(20, 30))
    packed = zlib.compress(bytes(5 << 20))
    for more in (
        chunk(b"iCCP", b"profile\0\0" + packed),
        chunk(b"iCCP", b"profile\0\7" + packed),
        chunk(b"zTXt", b"Comment\0\0" + packed),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
        chunk(b"tEXt", b"Comment\0" + bytes(99), checksum=1),
        chunk(b"gAMA", b"\0"),
        chunk(b"tRNS", b"\0\1\0\1\0\1"),
        chunk(b"eXIf", b"nothing"),
    ):
        for at in (33, len(png) - 12):
            assert torch.equal(decode(png[:at] + more + png[at:], 3), decode(png, 3))


def test_stray_bytes_between_the_markers_of_a_jpeg_are_passed_over(encoded):
    jpeg = encoded(smooth(8, 8), "JPEG")
    for stray in (b"\0\0", b"\xff" * 7, b"\0\xff\xff"):
        assert torch.equal(decode(jpeg[:20] + stray + jpeg[20:], 3), decode(jpeg, 3))


def test_a_jpeg_of_nothing_but_markers_is_given_up(encoded):
    jpeg = encoded(smooth(8, 8), "JPEG")
    with pytest.raises(UnreadableImage, match="of over 10,000 segments"):
        decode(jpeg[:2] + b"\xff\x01" * 20_000 + jpeg[2:], 3)
    for empty in (bytes(1 << 20), b"\xff" * (1 << 20)):
        with pytest.raises(UnreadableImage, match="cut off in the header"):
            decode(jpeg[:2] + empty, 3)


def test_whatever_bit_of_a_png_flips_its_pixels_are_right_or_refused(encoded):
    """Pillow stops inflating once all rows are there, and has not looked at a checksum by then."""
    png = encoded(np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), np.ones((3, 3, 1))).astype(np.uint8))
    expected, refused = decode(png, 3), 0
    for bit in range(8 * len(png)):
        data = bytearray(png)
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert torch.equal(decode(bytes(data), 3), expected), bit
        except UnreadableImage:
            refused += 1
    assert refused > 7 * len(png)
    assert torch.equal(decode(png[:-12], 3), expected), "nothing but the chunk that says the end is missing"
    for cut in {*range(1, len(png))} - {12}:
        with pytest.raises(UnreadableImage):
            decode(png[:-cut], 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}], ids=str)
@pytest.mark.parametrize("grey", [False, True])
def test_jpegs_whole_or_damaged_are_what_torchvision_makes_of_them(encoded, options, grey):
    """Two builds of one library, of which one is faster; what it finds unusual is judged by the other."""
    rng = np.random.default_rng(0)
    picture = smooth(45, 61)
    whole = encoded(picture[..., 0] if grey else picture, "JPEG", **options)
    refused = 0
    for number in range(60):
        data = bytearray(whole)
        for place in rng.integers(20, len(data), number % 4):
            data[place] = rng.integers(256)
        if number % 7 == 6:
            del data[rng.integers(20, len(data)) :]
        for channels, mode in ((1, ImageReadMode.GRAY), (3, ImageReadMode.RGB)):
            try:
                expected = torchvision.io.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode)
            except RuntimeError:
                refused += 1
                with pytest.raises(UnreadableImage):
                    decode(bytes(data), channels)
            else:
                assert torch.equal(decode(bytes(data), channels), expected)
    assert 0 < refused < 120


def test_a_jpeg_of_very_many_scans_is_refused(encoded):
    """A scan of a hundred bytes takes as long as one of megabytes."""
    jpeg = encoded(smooth(16, 16), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")

    def of_scans(count):
        return jpeg[:-2] + jpeg[last:-2] * (count - jpeg.count(b"\xff\xda")) + jpeg[-2:]

    assert decode(of_scans(MAX_SCANS), 3).shape == (3, 16, 16)
    with pytest.raises(UnreadableImage, match=f"jpeg of {MAX_SCANS + 1} scans, above the limit of {MAX_SCANS}"):
        decode(of_scans(MAX_SCANS + 1), 3)


def test_a_host_without_memory_is_not_a_bad_image(encoded, monkeypatch):
    def fails(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("torchvision.io.decode_webp", fails)
    with pytest.raises(MemoryError, match="webp of 8 x 8 pixels"):
        decode(encoded(smooth(8, 8), "WEBP"), 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_are_unreadable_and_never_the_end_of_the_process(encoded, kind):
    rng = np.random.default_rng(0)
    whole = encoded(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    for cut in (0, 1, 8, 20, 30, len(whole) // 2):
        with pytest.raises(UnreadableImage):
            decode(whole[:cut], 3)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(8, len(whole), 5):
            damaged[place] = rng.integers(256)
        try:
            decode(bytes(damaged), 3)
        except UnreadableImage:
            refused += 1
    assert refused > (95 if kind == "PNG" else 0)  # the others carry no checksum


def test_what_is_no_image_is_unreadable_with_its_first_bytes():
    with pytest.raises(
        UnreadableImage, match=r"not JPEG, PNG or WebP but a GIF image: 9 bytes that begin '47 49 46 38"
    ):
        decode(b"GIF89a___", 3)
