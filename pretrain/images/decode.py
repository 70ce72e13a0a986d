"""Encoded images to uint8 pixels, or the reason why they do not decode."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib

import numpy as np
import simplejpeg
import torch
import torchvision.io
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as F

from pretrain.storage.filekind import LOOKED_AT, file_kind, image_kind

Encoded = bytes | memoryview

# The one limit on pixels: `build` refuses what training would not decode. 300 MB decoded, in each decode thread.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own would warn from 89 million on and refuse above twice that
_MARKER = re.compile(rb"\xff[^\xff]")
_MAX_SEGMENTS = 10_000  # they are walked with the interpreter's lock held; an ICC profile takes up to 255
_SCAN = b"\xff\xda"  # the marker in front of a scan
MAX_SCANS = 100  # a progressive JPEG has ten; each takes as long as its pixels, however few its bytes
GREY = 128  # replaces an image that cannot be read


class UnreadableImage(Exception):
    """The bytes of one image do not decode. The message says why."""


def decode(data: Encoded, channels: int) -> Tensor:
    """JPEG, PNG or WebP, told apart by their first bytes -> uint8 [channels, h, w], grey (1) or RGB (3).

    Alpha is dropped, orientation tags are not applied. Raises UnreadableImage; for an image above MAX_PIXELS,
    before any of it is decoded.
    """
    kind, height, width = read_header(data)
    check_size(kind, height, width)
    if kind == "png":
        return _decode_png(data, channels, height, width)
    if kind == "jpeg":
        with contextlib.suppress(ValueError):
            return _decode_jpeg(data, channels)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        if kind == "jpeg":
            return torchvision.io.decode_jpeg(encoded, _mode(channels))
        image = torchvision.io.decode_webp(encoded, ImageReadMode.RGB)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # the host's fault, not the image's
            raise MemoryError(f"{kind} of {width} x {height} pixels: {_last_clause(error)}") from error
        raise UnreadableImage(f"{kind}: {_last_clause(error)}") from error
    return F.rgb_to_grayscale(image) if channels == 1 else image


def check_size(kind: str, height: int, width: int) -> None:
    """Raise UnreadableImage for an image without pixels, or with more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise UnreadableImage(
            f"{kind} of {width} x {height} = {height * width:,} pixels, above the limit of {MAX_PIXELS:,}"
        )
    if height * width == 0:
        raise UnreadableImage(f"{kind} of {width} x {height} pixels")


def _decode_jpeg(data: Encoded, channels: int) -> Tensor:
    """torchvision's pixels, in four fifths of its time; of print colours (CMYK) within two levels.

    Raises ValueError for anything unusual.
    """
    # Strict: torchvision decides about stray bytes and damage, only some of which make an image unreadable.
    pixels = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY", strict=True)
    # numpy transposes: torch would release the interpreter lock, and may have to wait for it.
    return torch.from_numpy(pixels.transpose(2, 0, 1))


def _mode(channels: int) -> ImageReadMode:
    return ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB


def _decode_png(data: Encoded, channels: int, height: int, width: int) -> Tensor:
    # Pillow, not torchvision.io: its decode_png kills the process on an error in libpng (a bad checksum).
    try:
        image = PngImageFile(io.BytesIO(critical_chunks(data)))
        if image.size != (width, height):  # Pillow takes the last header there is
            raise ValueError(f"a second header, of {image.width} x {image.height} pixels")
        return from_pillow(image, channels)
    except MemoryError:
        raise
    except struct.error:
        raise UnreadableImage(f"png: cut off, {len(data)} bytes") from None
    except Exception as error:  # of a dozen kinds, none of them documented
        raise UnreadableImage(f"png: {error}") from error


def from_pillow(image: Image.Image, channels: int) -> Tensor:
    """The pixels of a PIL image, uint8 [channels, h, w], grey (1) or RGB (3), without alpha."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        pixels = (np.asarray(image) >> 8).astype(np.uint8)[:, :, None].repeat(channels, axis=2)
    else:
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(image.height, image.width, channels)).permute(2, 0, 1)


def critical_chunks(data: Encoded) -> bytes:
    """A PNG without the chunks that its pixels do not depend on: colour profiles, texts, transparency, more pictures.

    Pillow refuses an image because of these: a profile of more than 1 MiB, a text with a wrong checksum. It also stops
    reading once all rows are there, so checksums are checked here: ValueError where that of a critical chunk is wrong.
    """
    view = memoryview(data)
    kept, at, kind = [view[:8]], 8, b""
    while at < len(view) and kind != b"IEND":
        (length,) = struct.unpack_from(">I", view, at)
        kind, end = bytes(view[at + 4 : at + 8]), at + 8 + length
        (expected,) = struct.unpack_from(">I", view, end)
        if kind[:1].isupper():
            if zlib.crc32(view[at + 4 : end]) != expected:
                raise ValueError(f"chunk {kind!r} at byte {at} has another checksum")
            kept.append(view[at : end + 4])
        at = end + 4
    return b"".join(kept)


def read_header(data: Encoded) -> tuple[str, int, int]:
    """(`jpeg`, `png` or `webp`, height, width) as the first bytes declare. Raises UnreadableImage."""
    kind = image_kind(data)
    try:
        if kind == "png":
            width, height = struct.unpack_from(">II", data, 16)
            return kind, height, width
        if kind:
            return kind, *(_jpeg_size if kind == "jpeg" else _webp_size)(data)
    except (struct.error, IndexError) as error:
        raise UnreadableImage(f"cut off in the header, {len(data)} bytes") from error
    other = file_kind(bytes(data[:LOOKED_AT]))
    instead = f" but {other}" if other else ""
    raise UnreadableImage(f"not JPEG, PNG or WebP{instead}: {len(data)} bytes that begin {data[:8].hex(' ')!r}")


def _jpeg_size(data: Encoded) -> tuple[int, int]:
    at, frame, height, width, components = 2, 0, 0, 0, 0
    for _ in range(_MAX_SEGMENTS):
        if data[at] != 0xFF or data[at + 1] == 0xFF:  # stray or fill bytes, which libjpeg passes over as well
            found = _MARKER.search(data, at)
            if found is None:
                raise IndexError
            at = found.start()
        marker = data[at + 1]
        at += 2
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            frame = marker
            height, width, components = struct.unpack_from(">HHB", data, at + 3)
        if marker in (0xD9, _SCAN[1]):
            break
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # markers without a body
            at += struct.unpack_from(">H", data, at)[0]
    else:
        raise UnreadableImage(f"jpeg of over {_MAX_SEGMENTS:,} segments before the image data")
    if not frame:
        raise UnreadableImage("jpeg: no frame header before the image data")
    # Where the first scan of a sequential frame has all its components, decoders look for no other.
    if frame > 0xC1 or data[at + 2] != components:
        scans = bytes(data).count(_SCAN)
        if scans > MAX_SCANS:
            raise UnreadableImage(f"jpeg of {scans:,} scans, above the limit of {MAX_SCANS}")
    return height, width


def _webp_size(data: Encoded) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        struct.unpack_from("6x", data, 24)  # a slice never complains that it is short
        return height, width
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    raise UnreadableImage(f"webp: unknown chunk {kind!r}")


def _last_clause(error: Exception) -> str:
    """torch's message without the path of the C++ file that raised it."""
    return str(error).splitlines()[0].rpartition("cpp:")[2].partition(", ")[2] or str(error)
