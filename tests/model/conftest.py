"""What the model tests share: the reference network, and small networks with every parameter drawn."""

import importlib.util
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer


@pytest.fixture(scope="session")
def reference():
    """The module reference.py beside this file."""
    found = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    """tiny(**fields): the spec of a network of 2 layers, width 32, on 16 px images in patches of 8 px."""

    def make(**fields):
        sizes = {"patch_size": 8, "layers": 2, "width": 32, "mlp": 64, "heads": 2, "image_size": 16}
        return ViTSpec(**{**sizes, "num_classes": 5, **fields})

    return make


@pytest.fixture(scope="session")
def drawn():
    """drawn(spec, **options): a network none of whose parameters is zero, so that each one matters."""

    def make(spec, *, seed=0, dtype=torch.float32, **options):
        model = VisionTransformer(spec, **options).to(dtype)
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
                parameter.add_(noise)
        return model

    return make


@pytest.fixture(scope="session")
def images():
    """images(spec, count): one fixed batch of unit-normal images for the spec."""

    def make(spec, count=2, dtype=torch.float32):
        generator = torch.Generator().manual_seed(7)
        shape = (count, spec.channels, spec.image_size, spec.image_size)
        return torch.empty(shape, dtype=dtype).normal_(generator=generator)

    return make


@pytest.fixture
def partitioned():
    """partitioned(model) -> (store, gathered): as under ZeRO-3 the parameters are empty, save in `gathered`.

    `store` holds their values by name, `gathered.largest` how many values were whole at once, at most.
    """

    def part(model):
        names = {parameter: name for name, parameter in model.named_parameters()}
        store = {name: parameter.data for parameter, name in names.items()}

        @contextmanager
        def gathered(parameters):
            for parameter in parameters:
                parameter.data = store[names[parameter]]
            gathered.largest = max(gathered.largest, sum(parameter.numel() for parameter in parameters))
            yield
            for parameter in parameters:
                parameter.data = torch.empty(0)

        gathered.largest = 0
        for parameter in names:
            parameter.data = torch.empty(0)
        return store, gathered

    return part
