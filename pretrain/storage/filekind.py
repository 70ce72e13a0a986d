"""What a file is: images by their endings and their first bytes, other kinds so that errors can name them."""

from __future__ import annotations

import struct

LOOKED_AT = 512  # bytes
TAR = "a tar archive"
# The images that training decodes, by kind: suffixes of their members in a shard, the first is the one written.
IMAGE_KINDS = {"jpeg": ("jpg", "jpeg"), "png": ("png",), "webp": ("webp",)}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_KINDS.values() for suffix in suffixes)
# Endings of image files, also of formats that are not read: those must not go unnoticed in a folder or a shard.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".jp2", ".jxl",
)  # fmt: skip

COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".zip")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_BEGINS = {
    b"VFINDEX\n": "an index of shards",
    b"PK\x03\x04": "a zip archive, as .npz and PyTorch's .pt files are",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG\r\n": "a PNG image",
    b"GIF8": "a GIF image",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a Git LFS pointer in the place of a file (git lfs pull fetches it)",
}
# What servers say in the place of a file.
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<error")


def image_kind(data: bytes | memoryview) -> str:
    """`jpeg`, `png` or `webp` by the first bytes of a file; empty for everything else."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return "png"
    if data[:2] == b"\xff\xd8":
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def file_kind(start: bytes) -> str:
    """What a file is, in words, by its first `LOOKED_AT` bytes; empty where they tell nothing."""
    if not start:
        return "an empty file"
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return f"compressed with {name}"
    for magic, name in _BEGINS.items():
        if start.startswith(magic):
            return name
    if start[257:262] == b"ustar":
        return TAR
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 32:
        return "a safetensors file"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_PAGES):
        return "a web page or a server's error message, not what was to be fetched"
    if not any(start):
        return f"nothing but zeros in its first {len(start)} bytes, as where a copy was cut off"
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        return "a text"
    return ""
