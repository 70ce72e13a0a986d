"""What the tests of weights share: a small network of which every tensor is random."""

import pytest
import torch

from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

SIZES = {"patch_size": 4, "layers": 2, "width": 16, "mlp": 32, "heads": 2, "image_size": 12, "num_classes": 5}


def random_network(seed=0, **changes):
    model = VisionTransformer(ViTSpec(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@pytest.fixture(scope="session")
def network():
    """network(seed=0, **changes): a zero bias or head would hide that it is lost, so none is zero."""
    return random_network
