"""The libraries' own networks and ours: the same weights and images give the same logits and features, both ways.

A network of a library with random tensors is saved as that library's users save it and read; then it is written in each
format that holds it, and `check` runs the network of that format's library on it. Differences are relative to the
largest value, or to 1 where all are smaller.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.model.spec import ViTSpec, spec_from_arch
from pretrain.model.vit import VisionTransformer
from pretrain.weights.export import check, export
from pretrain.weights.formats.table import to_file
from pretrain.weights.load import find
from pretrain.weights.read import FORMATS, FoundFile
from pretrain.weights.tensorfile import TensorFile

FP32 = 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks gain nothing from more, and wait for one another where cores are short."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """A library's network, the sizes that must be told from its file, and the formats that hold it."""

    name: str
    make: Callable[[], nn.Module]
    spec: ViTSpec
    formats: tuple[str, ...]


def torchvision(**arguments):
    from torchvision.models import VisionTransformer

    return VisionTransformer(**arguments)


def timm(name, **arguments):
    from timm import create_model

    return create_model(name, **arguments)


def transformers(kind, **config):
    import transformers as library

    return getattr(library, kind)(library.ViTConfig(**config))


def sized(arch, **changes):
    """The sizes of an architecture under transformers' names."""
    spec = spec_from_arch(arch)
    return {
        "patch_size": spec.patch_size,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp,
        "num_attention_heads": spec.heads,
        **changes,
    }


TINY = {"patch_size": 16, "num_layers": 12, "hidden_dim": 192, "mlp_dim": 768, "num_heads": 3}
CASES = [
    Case(
        "Ti/16 of torchvision with a representation layer, 160 px",
        lambda: torchvision(**TINY, image_size=160, num_classes=10, representation_size=96),
        spec_from_arch("vit_ti_16", image_size=160, num_classes=10, representation_size=96),
        ("torchvision",),
    ),
    Case(
        "Ti/16 of torchvision",
        lambda: torchvision(**TINY, image_size=224, num_classes=10),
        spec_from_arch("vit_ti_16", num_classes=10),
        ("torchvision", "hf"),
    ),
    Case(
        "Ti/16 of timm",
        lambda: timm("vit_tiny_patch16_224", num_classes=10),
        spec_from_arch("vit_ti_16", num_classes=10),
        ("timm", "torchvision"),
    ),
    Case(
        "S/16 of timm with average pooling, 160 px",
        lambda: timm(
            "vit_small_patch16_224", class_token=False, global_pool="avg", fc_norm=False, img_size=160, num_classes=10
        ),
        spec_from_arch("vit_s_16", pool="mean", image_size=160, num_classes=10),
        ("timm",),
    ),
    Case(
        "Ti/16 of transformers, tanh GELU, epsilon 1e-12, 192 px",
        lambda: transformers(
            "ViTForImageClassification",
            **sized("vit_ti_16", image_size=192, num_labels=10, hidden_act="gelu_pytorch_tanh"),
        ),
        spec_from_arch("vit_ti_16", image_size=192, num_classes=10, gelu="tanh", norm_eps=1e-12),
        ("hf", "timm"),
    ),
    Case(
        "Ti/16 of transformers with its pooler",
        lambda: transformers("ViTModel", **sized("vit_ti_16", pooler_output_size=96, layer_norm_eps=1e-6)),
        spec_from_arch("vit_ti_16", num_classes=0, representation_size=96),
        ("hf", "torchvision"),
    ),
]
LARGE = [
    Case(
        "L/16 of transformers",
        lambda: transformers("ViTForImageClassification", **sized("vit_l_16", num_labels=10, layer_norm_eps=1e-6)),
        spec_from_arch("vit_l_16", num_classes=10),
        ("hf", "timm", "torchvision"),
    ),
    Case(
        "H/14 of timm",
        lambda: timm("vit_huge_patch14_224", num_classes=10),
        spec_from_arch("vit_h_14", num_classes=10),
        ("timm", "torchvision", "hf"),
    ),
]


def randomise(model):
    """Every tensor random, such that activations stay near 1: a bias or norm at its initial value would hide a loss."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = parameter.data.uniform_(-1, 1, generator=generator)
        if values.ndim < 2:
            values.mul_(0.3).add_(("norm" in name or "ln" in name) * name.endswith("weight"))
        elif "token" not in name and "pos" not in name:
            values.mul_((3 / values[0].numel()) ** 0.5)
    return model.eval()


def save(model, folder):
    """As users of its library do."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "theirs")
        return folder / "theirs"
    torch.save(model.state_dict(), folder / "theirs.pth")
    return folder / "theirs.pth"


def difference(one, other):
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.name) for case in CASES),
        *(pytest.param(case, id=case.name, marks=pytest.mark.long) for case in LARGE),
    ],
)
def test_a_librarys_network_and_ours_agree(case, tmp_path):
    theirs = randomise(case.make())
    path = save(theirs, tmp_path)
    weights = find(path).read()
    assert weights.spec == case.spec

    images = torch.rand(1, 3, case.spec.image_size, case.spec.image_size) * 2 - 1
    with torch.no_grad():
        found, ours = theirs(images), weights.model()
        if hasattr(found, "last_hidden_state"):
            assert difference(ours(images, features=True)["cls"], found.last_hidden_state[:, 0]) < FP32
            assert difference(ours(images), found.pooler_output) < FP32
        else:
            assert difference(ours(images), getattr(found, "logits", found)) < FP32

    for name in case.formats:
        out = tmp_path / f"ours{FORMATS[name].suffix}"
        export(find(path), FORMATS[name], out)
        compared, not_asked = check(out)
        assert not_asked == ""
        wanted = {"cls"} | ({"logits"} if case.spec.num_classes else set())
        wanted |= {"tanh"} if case.spec.representation_size and name in ("hf", "torchvision") else set()
        assert {one.output for one in compared if one.reader == FORMATS[name].library} == wanted
        assert max(one.difference for one in compared) < FP32
        if name == case.formats[0]:  # out → in → out
            written = load_file(path / "model.safetensors") if path.is_dir() else theirs.state_dict()
            again = load_file(out / "model.safetensors") if out.is_dir() else load_file(out)
            again = {title.removeprefix("vit."): values for title, values in again.items()}
            assert again.keys() == {title.removeprefix("vit.") for title in written}
            assert all(same_bytes(values, again[title.removeprefix("vit.")]) for title, values in written.items())
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def same_bytes(one, other):
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(("arch", "size"), [("vit_b_16", 224), ("vit_b_32", 256)])
def test_large_networks_agree_without_files(arch, size):
    """Sizes whose files would take long to write: tensors go from network to network, as the tables say."""
    spec = spec_from_arch(arch, image_size=size, num_classes=10)
    with torch.device("meta"):
        config = sized(arch, image_size=size, num_labels=10, layer_norm_eps=1e-6)
        theirs = transformers("ViTForImageClassification", **config)
    theirs = randomise(theirs.to_empty(device="cpu"))
    read = read_memory("hf", theirs.state_dict(), {"model_type": "vit", **config})
    assert read.spec == spec
    tensors = read.read()

    with torch.device("meta"):
        ours = VisionTransformer(spec)
        others = {
            "torchvision": torchvision(**FORMATS["torchvision"].arguments(spec)),
            "timm": timm(TIMM_NAMES[arch], img_size=size, num_classes=10),
        }
    ours.load_state_dict(tensors, assign=True)
    images = torch.rand(1, 3, size, size) * 2 - 1
    with torch.no_grad():
        logits = ours.eval()(images)
        assert difference(logits, theirs(images).logits) < FP32
        for name, model in others.items():
            state = {row.name: to_file(row, tensors, spec) for row in FORMATS[name].rows(spec)}
            model.load_state_dict(state, assign=True)
            assert difference(logits, model.eval()(images)) < FP32
            back = read_memory(name, state)
            assert back.spec == spec
            assert all(torch.equal(values, tensors[title]) for title, values in back.read().items())


TIMM_NAMES = {"vit_b_16": "vit_base_patch16_224", "vit_b_32": "vit_base_patch32_224"}


def read_memory(name, state, config=None):
    """Tensors of a library's network as a file would hold them, told and read."""
    shapes = {title: tuple(values.shape) for title, values in state.items()}
    file = FORMATS[name].prepared(TensorFile("memory", shapes, state.__getitem__, {"config": config} if config else {}))
    return FoundFile(file, FORMATS[name], FORMATS[name].spec(file), {})
