"""Example images: from files, folders of images, and shards with an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from pretrain import files
from pretrain.datasets.dataset import as_stored
from pretrain.datasets.files import images
from pretrain.errors import InputError
from pretrain.images.decode import UnreadableImage, decode
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME
from pretrain.shards.survey import read_image, spread_ids
from pretrain.storage.location import local_path


@dataclass(frozen=True)
class Example:
    """One image. `read` returns its encoded bytes; it raises InputError, which names the image.

    name: the path as it was given, or the index and the canonical id.
    caption: what stands beside its picture.
    """

    name: str
    caption: str
    read: Callable[[], bytes]

    def decoded(self, data: bytes, channels: int) -> Image.Image:
        """Pixels of what was read, as training decodes them. Raises InputError where the bytes are no image."""
        try:
            pixels = decode(as_stored(data, self.name)[1], channels)
        except UnreadableImage as error:
            raise InputError(f"{self.name}: {error}") from error
        shown = pixels[0] if channels == 1 else pixels.permute(1, 2, 0)
        return Image.fromarray(shown.contiguous().numpy())


@dataclass(frozen=True)
class Examples:
    """The images that were taken, and how many there were to take them from."""

    taken: Sequence[Example]
    found: int


def find_examples(sources: Sequence[str | Path], most: int) -> Examples:
    """At most `most` images of the sources, in their order, spread evenly; the same ones each time.

    Args:
        sources: image files, folders of images (at any depth), indices of shards or folders that hold one.

    Raises:
        InputError: a source that is not there, or a folder without images.
    """
    found, taken = 0, []
    for source in map(local_path, sources):
        count, some = _examples_of(source, most)
        found += count
        taken += some
    return Examples([taken[number] for number in spread_ids(len(taken), most)], found)


def _examples_of(source: Path, most: int) -> tuple[int, list[Example]]:
    """How many images a source holds, and at most `most` of them."""
    if not files.exists(source):
        raise InputError(f"--images {source}: no such file or folder; give image files, folders of them or an INDEX")
    if source.suffix == Path(INDEX_NAME).suffix or files.exists(source / INDEX_NAME):
        index = Index.open(source)
        ids = spread_ids(index.samples, most).tolist()
        return index.samples, [
            Example(f"{source} id {sample_id}", f"id {sample_id}", partial(_read_sample, index, sample_id))
            for sample_id in ids
        ]
    if not files.is_folder(source):
        return 1, [_example_of(source)]
    names = list(images(source, source))
    if not names:
        raise InputError(f"--images {source}: no images in this folder; JPEG, PNG or WebP files would be right")
    return len(names), [_example_of(source / names[number]) for number in spread_ids(len(names), most)]


def _example_of(path: Path) -> Example:
    return Example(str(path), path.name, partial(_read_file, path))


def _read_file(path: Path) -> bytes:
    if not files.is_file(path):  # opened, a FIFO would wait
        raise InputError(f"{path}: no regular file; an image file would be right")
    try:
        return path.read_bytes()
    except OSError as error:
        raise files.failure(path, error) from error


def _read_sample(index: Index, sample_id: int) -> bytes:
    return bytes(read_image(index, sample_id)[1])
