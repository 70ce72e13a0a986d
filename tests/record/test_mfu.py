"""MFU: against the peak of the very device and precision, or left out."""

import json
from types import SimpleNamespace

import pytest
import torch

from pretrain.engine.step import Update
from pretrain.plan import peak
from pretrain.plan.peak import listed, peak_flops, unlisted
from pretrain.ranks.collectives import World
from pretrain.record import pulse as module
from pretrain.record.folder import RunFolder
from pretrain.record.metrics import Metrics, Workload
from pretrain.record.pulse import Pulse
from pretrain.record.section import LoggingSection
from pretrain.stream.counters import Counters

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", BF16, 989.4),
        ("NVIDIA H100 80GB HBM3", FP16, 989.4),
        ("NVIDIA H100 80GB HBM3", FP32, 66.9),
        ("NVIDIA H100 NVL", BF16, 835.5),
        ("NVIDIA H100 PCIe", BF16, 756),
        ("NVIDIA H200", FP16, 989.4),
        ("NVIDIA H200 NVL", FP32, 60),
        ("NVIDIA B200", BF16, 2250),
        ("NVIDIA GB200", BF16, 2500),
        ("NVIDIA GH200 480GB", BF16, 989.4),
        ("NVIDIA A100-SXM4-80GB", FP16, 312),
        ("NVIDIA A100 80GB PCIe", BF16, 312),
        ("A100-PCIE-40GB", FP32, 19.5),
        ("NVIDIA A10", BF16, 125),
        ("NVIDIA A10G", BF16, 70),
        ("NVIDIA L4", BF16, 121),
        ("NVIDIA L40", BF16, 181),
        ("NVIDIA L40S", BF16, 362),
        ("Tesla V100-SXM2-32GB", FP16, 125),
        ("Tesla V100-SXM2-32GB", FP32, 15.7),
        ("Tesla V100-SXM2-32GB", BF16, None),
        ("AMD Instinct MI300X", BF16, 1307.4),
        ("AMD Instinct MI250X", FP16, 191.5),
        # A part, a laptop's chip and sisters of listed ones; and a type whose peak nobody asked for.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", BF16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", BF16, None),
        ("NVIDIA GeForce RTX 3090 Ti", BF16, None),
        ("NVIDIA A1000", BF16, None),
        ("NVIDIA H100 80GB HBM3", torch.float8_e4m3fn, None),
    ],
)
def test_a_device_is_known_by_its_whole_name_in_each_precision(name, dtype, tera):
    assert listed(name, dtype) == (tera and pytest.approx(tera * 1e12))


def test_no_name_is_in_two_rows():
    names = [pattern for pattern, *_ in peak._DATA_SHEETS]
    assert len(set(names)) == len(names)
    plain = [name for name in names if name.replace(" ", "").isalnum()]
    assert all(sum(bool(peak.re.fullmatch(pattern, name)) for pattern in names) == 1 for name in plain)


def test_a_cpu_is_not_measured_and_an_unlisted_accelerator_is_named(monkeypatch):
    assert peak_flops(torch.device("cpu"), FP32) is None
    assert unlisted(torch.device("cpu"), FP32) == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    assert peak_flops(cuda, FP16) == pytest.approx(989.4e12)
    assert unlisted(cuda, FP16) == []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(cuda, FP32) is None, "TF32 is on: its peak is another"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    (note,) = unlisted(cuda, BF16)
    assert "NVIDIA X1 in bfloat16" in note
    assert "logging.peak_tflops" in note


@pytest.fixture
def lines(tmp_path, monkeypatch, capsys):
    """What a window of 16 images in `seconds` is told as, with the peak that is known: metrics and console."""

    def told(seconds, peak_flops):
        now = iter([0.0, *[seconds] * 9])
        monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
        alone = World(0, 1, 0, torch.device("cpu"))
        workload = Workload(steps=9, global_batch=8, samples=80, flops_per_image=10**9, peak_flops=peak_flops)
        pulse = Pulse(SimpleNamespace(), alone.device)
        metrics = Metrics(RunFolder(tmp_path), alone, LoggingSection(every=2), workload, Counters())
        for step in (1, 2):
            metrics.step(step, 1.0, Update(0.1, 0.0034, None), pulse)
        metrics.close()
        return json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]), capsys.readouterr().out

    return told


def test_mfu_is_the_models_operations_over_the_peak(lines):
    metrics, console = lines(2.0, 1e11)
    assert metrics["images_per_second"] == 8
    assert metrics["mfu"] == pytest.approx(0.08)
    assert "MFU 8.0%" in console


def test_without_a_peak_it_is_null_and_not_on_the_console(lines):
    metrics, console = lines(2.0, None)
    assert metrics["mfu"] is None
    assert "MFU" not in console


def test_more_than_the_peak_is_no_figure_but_a_wrong_peak(lines):
    metrics, console = lines(2.0, 4e9)
    assert metrics["mfu"] is None
    assert "0.008 TFLOP/s are more than the 0.004" in console
    assert "%  MFU" not in console


def test_a_slow_run_shows_digits(lines):
    _, console = lines(320.0, None)
    assert "0.05 images/s" in console
    assert "grad 0.0034" in console
