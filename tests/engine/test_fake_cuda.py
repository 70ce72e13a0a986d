"""What a machine without a GPU can know of the path on one: shapes, types and devices, on fake CUDA tensors.

Every network is built at its true size; no memory is taken. torch cannot run a backward pass on fake CUDA tensors
without a CUDA driver: the backward pass is taken on the meta device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.schedule import AveragingSection
from pretrain.engine.section import OptimizerSection
from pretrain.images.mixing import mix_images
from pretrain.images.transforms import to_float
from pretrain.model.spec import ARCHITECTURES, spec_from_arch
from pretrain.model.vit import VisionTransformer
from pretrain.training.loss import choose_loss

BATCH, CLASSES = 4, 1000
CUDA = torch.device("cuda", 0)
SIZES = {name: spec_from_arch(name, representation_size=64, num_classes=CLASSES) for name in ARCHITECTURES}


def adamw(model):
    return build_optimizer(model, OptimizerSection(lr=1e-3, weight_decay=0.1, averaging=AveragingSection()))


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((arch, torch.bfloat16) for arch in ARCHITECTURES), ("vit_ti_16", torch.float16)]
)
def test_images_become_a_loss_on_the_device(arch, dtype):
    spec = SIZES[arch]
    with FakeTensorMode(), CUDA:
        model = VisionTransformer(spec)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        pixels = torch.empty(BATCH, 3, spec.image_size, spec.image_size, dtype=torch.uint8)
        weight, boxes = torch.empty(BATCH), torch.empty(BATCH, 4, dtype=torch.int64)
        images = mix_images(to_float(pixels, dtype), weight, boxes)
        assert (images.shape, images.dtype, images.device) == (pixels.shape, dtype, CUDA)
        with torch.no_grad():
            logits = model(images)
            features = model(images, features=True)
        assert (logits.shape, logits.dtype, logits.device) == ((BATCH, CLASSES), dtype, CUDA)
        assert {name: tuple(found.shape) for name, found in features.items()} == {
            "cls": (BATCH, spec.width), "mean": (BATCH, spec.width), "pre_tanh": (BATCH, 64), "tanh": (BATCH, 64),
        }  # fmt: skip
        for name, width in (("softmax", 1), ("sigmoid", 3)):
            labels, valid = torch.empty(BATCH, width, dtype=torch.int64), torch.empty(BATCH, dtype=torch.bool)
            loss = choose_loss(name, one_label=width == 1, smoothing=0.1)(logits, labels, valid, weight)
            assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, CUDA)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_fused_optimizer_steps_on_the_device_with_its_average(arch):
    with FakeTensorMode(), CUDA:
        model = VisionTransformer(SIZES[arch])
        optimizer = adamw(model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
            optimizer.allocate(parameter)
        optimizer.decay = 0.999
        optimizer.step()
        for parameter in model.parameters():
            states = {name: optimizer.state[parameter][name] for name in optimizer.kinds}
            assert set(states) == {"exp_avg", "exp_avg_sq", "average"}
            for state in states.values():
                assert (state.shape, state.dtype, state.device) == (parameter.shape, torch.float32, CUDA)


@pytest.mark.parametrize(
    ("arch", "checkpointing"),
    [*((arch, "full") for arch in ARCHITECTURES), *(("vit_ti_16", way) for way in ("none", 2, "selective"))],
)
def test_the_backward_pass_gives_every_parameter_a_gradient_like_itself(arch, checkpointing):
    spec = SIZES[arch]
    with torch.device("meta"):
        model = VisionTransformer(spec, checkpointing).to(torch.bfloat16)
        images = torch.empty(BATCH, 3, spec.image_size, spec.image_size, dtype=torch.bfloat16)
        labels, valid = torch.empty(BATCH, 1, dtype=torch.int64), torch.empty(BATCH, dtype=torch.bool)
        choose_loss("softmax", one_label=True)(model(images), labels, valid).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.bfloat16), name
