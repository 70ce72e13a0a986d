"""What an export tests itself with: an image that a formula makes, and what the network makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

# The script in an export's README: these lines, the format's example, and the last one.
BEGIN = """\
import json
import numpy as np
import torch

PATH = {path}
card = json.load(open({card}))
side, channels = card["model"]["image_size"], card["model"]["channels"]
numbers = np.arange(channels * side**2, dtype=np.int64) ** 2 % 251
images = torch.from_numpy((numbers / 125 - 1).astype(np.float32)).view(1, channels, side, side)
torch.set_grad_enabled(False)
"""
END = """\
print({name: float(abs(values - torch.tensor(card["expected"][name])).max()) for name, values in outputs.items()})
"""
TOLERANCE = 1e-4  # of a difference, relative to the largest value expected, and at least 1


def image(spec: ViTSpec) -> Tensor:
    """The image [1, channels, image_size, image_size], in [-1, 1]: pixel number i of it is (i² mod 251) / 125 − 1."""
    count = spec.channels * spec.image_size**2
    pixels = (np.arange(count, dtype=np.int64) ** 2 % 251 / 125 - 1).astype(np.float32)
    return torch.from_numpy(pixels).view(1, spec.channels, spec.image_size, spec.image_size)


def expected(spec: ViTSpec, tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Features by name, and logits where there is a classification layer, of `image`; computed in fp32 on the CPU."""
    with torch.device("meta"):
        model = VisionTransformer(spec)
    model.load_state_dict(tensors, assign=True)  # the tensors themselves: a large network is in memory once
    model.eval()
    with torch.no_grad():
        found = model(image(spec), features=True)
        if spec.num_classes:
            found["logits"] = model(image(spec))
    return {name: values[0].tolist() for name, values in found.items()}


def difference(outputs: dict[str, Any], wanted: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of each output that both have, relative to the largest value expected (at least 1).

    A value that is not finite, or an output of another length, differs by infinity.
    """
    found = {}
    for name in outputs.keys() & wanted.keys():
        one, other = np.asarray(outputs[name], np.float64).ravel(), np.asarray(wanted[name], np.float64)
        if one.shape != other.shape or not np.isfinite(one).all():
            found[name] = float("inf")
        else:
            found[name] = float(np.abs(one - other).max() / max(1.0, np.abs(other).max()))
    return found
