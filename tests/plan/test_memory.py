"""The planner's memory: states to the byte against real engines, activations against real tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.checkpoint.section import CheckpointSection
from pretrain.engine.layout import batch_layout
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec, spec_from_arch
from pretrain.model.vit import VisionTransformer
from pretrain.plan.job import Cluster, Job
from pretrain.plan.memory.activations import parts
from pretrain.plan.memory.host import host_memory, save_copy
from pretrain.plan.memory.live import LiveBytes
from pretrain.plan.memory.rank import rank_memory
from pretrain.stream.section import DataSection
from pretrain.training.loss import softmax_loss
from tests.conftest import RANKS

SMALL = ViTSpec(patch_size=8, layers=5, width=32, mlp=48, heads=2, image_size=32, num_classes=7)
KINDS = ["none", "full", "selective", 2]


def a_job(spec: ViTSpec = SMALL, *, stage: int = 1, ranks: int = 1, micro: int = 3, **other: object) -> Job:
    section = DeepSpeedSection.model_validate({"zero_optimization": {"stage": stage}})
    layout, optimizer = batch_layout(2 * micro * ranks, micro, ranks), OptimizerSection(lr=1e-3)
    parts = (spec, layout, torch.float32, "softmax", "none", False, 0, optimizer, section)
    return replace(Job(*parts, DataSection(), CheckpointSection(every=5), None, "cpu"), **other)


@pytest.mark.parametrize("which", ["few", pytest.param("all", marks=pytest.mark.long)])
def test_engines_hold_what_is_planned(which, ranks):
    ranks(RANKS, Path(__file__).parent / "held.py", which)


@pytest.mark.parametrize(
    "spec", [SMALL, replace(SMALL, dropout=0.1, drop_path=0.2, pool="mean")], ids=["plain", "drops"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_of_three_blocks_stands_for_a_whole_network_of_real_tensors(spec, kind):
    found = parts(a_job(spec, checkpointing=kind))
    model = VisionTransformer(spec, kind)
    initialize(model, 0)
    images, labels = torch.randn(3, 3, 32, 32), torch.zeros(3, 1, dtype=torch.int64)
    with LiveBytes([*model.parameters(), images, labels]) as real:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda owner: real.set_aside(owner.grad))
        loss = softmax_loss(model(images), labels, torch.ones(3))
        kept = real.live
        forward, _ = real.peak, real.restart()
        loss.backward()
        backward = real.peak
    assert kept == pytest.approx(sum(part.kept for part in found), rel=0.01)
    before = [sum(part.kept for part in found[:depth]) for depth in range(len(found))]
    assert forward == pytest.approx(max(at + part.forward for at, part in zip(before, found, strict=True)), rel=0.01)
    assert backward == pytest.approx(max(at + part.backward for at, part in zip(before, found, strict=True)), rel=0.02)


def test_what_is_kept_is_what_autograd_saves():
    model = VisionTransformer(SMALL)
    initialize(model, 0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(3, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = softmax_loss(model(images), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3))
    total = sum(size for address, size in saved.items() if address not in own | {images.untyped_storage().data_ptr()})
    assert loss.requires_grad
    assert total == pytest.approx(sum(part.kept for part in parts(a_job())), rel=0.03)


def test_checkpointing_and_freezing_keep_less():
    job = a_job(spec_from_arch("vit_ti_16"), micro=8)
    none, selective, every_second, full = (
        sum(part.kept for part in parts(replace(job, checkpointing=kind))) for kind in ("none", "selective", 2, "full")
    )
    assert full < every_second < selective < none
    assert sum(part.kept for part in parts(replace(job, frozen=14))) < full  # all but the head


def test_memory_grows_with_the_micro_batch_alone():
    first, second, fourth = (rank_memory(a_job(spec_from_arch("vit_ti_16"), micro=micro)) for micro in (8, 16, 32))
    assert first.parameters == fourth.parameters
    assert fourth.activations - second.activations == pytest.approx(
        2 * (second.activations - first.activations), rel=0.02
    )


def test_page_locked_copies_are_rounded_up_to_powers_of_two():
    job = a_job(spec_from_arch("vit_ti_16"))
    values = sum(parameter.numel() for parameter in _network(job.spec).parameters())
    assert save_copy(job) == 3 * 4 * values
    assert save_copy(replace(job, device="cuda")) == 3 * (1 << (4 * values - 1).bit_length())
    assert save_copy(replace(job, checkpoint=CheckpointSection(every=5, background=False))) == 0


def test_a_cpu_host_holds_what_its_ranks_hold():
    job, cluster = a_job(), Cluster(nodes=1, devices=2, device_memory=1 << 34, peak_flops=None)
    found = host_memory(job, cluster)
    assert found.devices == 2 * rank_memory(job).total
    assert found.read_ahead == 2 << 30
    assert host_memory(replace(job, device="cuda"), cluster).devices == 0


def _network(spec: ViTSpec) -> nn.Module:
    with torch.device("meta"):
        return VisionTransformer(spec)


def test_what_is_offloaded_leaves_the_device_for_the_host():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    kept = a_job(spec_from_arch("vit_ti_16"), stage=3, ranks=2, device="cuda", dtype=torch.bfloat16)
    job = replace(kept, deepspeed=DeepSpeedSection.model_validate({"zero_optimization": zero}))
    cluster = Cluster(nodes=1, devices=2, device_memory=1 << 34, peak_flops=None)
    before, after = rank_memory(kept), rank_memory(job)
    assert after.on_host == before.parameters + before.optimizer
    assert before.allocated - after.allocated == after.on_host + after.absent
    assert host_memory(job, cluster).offloaded > 2 * after.on_host > host_memory(kept, cluster).offloaded == 0
