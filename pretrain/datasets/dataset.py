"""A data set before it is sharded: rows with labels, and the bytes under which an image is stored."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from pretrain.errors import InputError
from pretrain.storage.filekind import IMAGE_KINDS, image_kind

# Formats that become PNGs, which loses nothing; IMAGE_KINDS are stored as they are.
_CONVERTED = ["BMP", "GIF", "PPM", "TIFF"]
_READ = "JPEG, PNG, WebP, BMP, GIF, PPM (PGM, PBM) and TIFF"
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


class UnreadableFile(InputError):
    """One file of a data set is not an image that can be stored. The message begins with its path."""


@dataclass(frozen=True)
class Dataset:
    """N rows in a fixed order.

    `labels` is int32 [N] or, with `starts` int64 [N+1], the lists one after the other. `read(row)` returns an image as
    (suffix, bytes), from any thread; it raises UnreadableFile for a file that can be left out. `fingerprint` is a hash
    of labels and of pixels in memory or names of files; `files` is a hash of the files' sizes and times.
    """

    name: str
    split: str
    labels: np.ndarray
    starts: np.ndarray | None
    classes: tuple[str, ...] | None
    fingerprint: str
    read: Callable[[int], tuple[str, bytes]]
    files: str = ""

    def __post_init__(self) -> None:
        if not len(self):
            raise InputError(f"{self.name}, split {self.split}: no images")
        low, high = int(self.labels.min(initial=0)), int(self.labels.max(initial=0))
        if low < 0 or (self.classes and high >= len(self.classes)):
            limit = len(self.classes) - 1 if self.classes else "any"
            raise InputError(f"{self.name}: label {low if low < 0 else high} is out of range; labels are 0 … {limit}")

    def __len__(self) -> int:
        return len(self.labels) if self.starts is None else len(self.starts) - 1

    def labels_of(self, row: int) -> list[int]:
        """The labels of one row; exactly one unless labels are lists."""
        if self.starts is None:
            return [int(self.labels[row])]
        return [int(label) for label in self.labels[self.starts[row] : self.starts[row + 1]]]


def array_dataset(
    name: str,
    split: str,
    pixels: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    classes: Sequence[str] | None,
) -> Dataset:
    """A data set of images in memory: uint8 [n, h, w] (grey) or [n, h, w, 3], stored as PNG."""
    targets = np.asarray(labels, np.int32)
    if len(targets) != len(pixels):
        raise InputError(f"{name}, split {split}: {len(pixels)} images, but {len(targets)} labels")
    return Dataset(
        name=name,
        split=split,
        labels=targets,
        starts=None,
        classes=None if classes is None else tuple(classes),
        fingerprint=fingerprint([targets.tobytes(), str(pixels.shape).encode(), np.ascontiguousarray(pixels)]),
        read=lambda row: ("png", png(pixels[row])),
    )


def fingerprint(parts: Iterable[bytes | np.ndarray]) -> str:
    """sha256 (hex) of parts that follow one another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.data)
    return digest.hexdigest()


def png(pixels: np.ndarray) -> bytes:
    """uint8 [h, w] or [h, w, 3] as PNG; grey stays one channel."""
    return _as_png(Image.fromarray(pixels))


def as_stored(data: bytes, where: str) -> tuple[str, bytes]:
    """An image file's bytes → (suffix, bytes to store): JPEG, PNG and WebP untouched, other formats as PNG; of an
    animation the first picture.

    The content tells the format: well-known sets hold PNGs and GIFs under a JPEG's name. Training's decoder decodes
    what is stored. Raises UnreadableFile that names `where` for other formats, for a damaged image, and for pixels that
    a PNG cannot hold.
    """
    # Here, because it imports torch, two seconds that a folder with finished shards need not wait for.
    from pretrain.images.decode import UnreadableImage, check_size, decode

    try:
        kind = image_kind(data)
        if kind and not (kind == "webp" and data[12:16] == b"VP8X" and data[20] & 2):  # an animation
            decode(data, 3)
            return IMAGE_KINDS[kind][0], data
        # Named formats only: Pillow starts Ghostscript for a PostScript file, whatever the file's name.
        with Image.open(io.BytesIO(data), formats=[kind] if kind else _CONVERTED) as image:
            kind = str(image.format).lower()
            check_size(kind, image.height, image.width)
            if image.mode in _PNG_MODES:
                return "png", _as_png(image)
            return "png", _as_png(_grey16(image, where) if image.mode[0] in "IF" else image.convert("RGB"))
    except InputError:
        raise
    except MemoryError as error:  # more likely the host's fault: no file to leave out
        raise InputError(f"{where}: memory ran out while it was decoded") from error
    except UnreadableImage as error:
        raise UnreadableFile(f"{where}: {error}") from error
    except UnidentifiedImageError as error:
        found = f"{len(data)} bytes that begin {data[:8].hex(' ')!r}"
        raise UnreadableFile(f"{where}: not an image of a format that is read ({_READ}): {found}") from error
    except Exception as error:  # decoders raise a dozen kinds, none of them documented
        raise UnreadableFile(f"{where}: {kind}: {error}") from error


def _grey16(image: Image.Image, where: str) -> Image.Image:
    # Through numpy: Pillow's conversions of these modes clip to 0 … 255, a 16-bit ramp becomes white.
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise UnreadableFile(
            f"{where}: grey pixels of type {pixels.dtype}, from {low} to {high}; shards hold whole numbers, "
            "0 … 255 in 8 bits or 0 … 65535 in 16: scale the pixels to one of these ranges and save them so"
        )
    return Image.fromarray(pixels.astype(np.uint16))


def _as_png(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "png")
        return file.getvalue()
