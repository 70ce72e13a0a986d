"""Small image files, and the rows of the data sets made of them."""

import os
import zlib

import numpy as np
from PIL import Image


def picture(path, number=0, **options):
    """A small colour image whose format the name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def rows(data):
    return [(data.labels_of(row), *data.read(row)) for row in range(len(data))]


def tree(root, *names):
    """Files below `root`: pictures of their own pixels, and empty files under other names."""
    for name in names:
        if name.lower().endswith((".jpg", ".jpeg", ".png")):
            picture(root / name, zlib.crc32(os.fsencode(name)))
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    return root


def labelled(data, root):
    """The data set as {file below root: class name}; files are known by their bytes."""
    files = {path.read_bytes(): str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {
        files[data.read(row)[1]]: ", ".join(data.classes[label] for label in data.labels_of(row))
        for row in range(len(data))
    }
