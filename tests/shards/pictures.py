"""Small image files, and the rows of the data sets made of them."""

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
