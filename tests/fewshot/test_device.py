"""Features and probes are the same on a device as on the CPU. Without a GPU both are the CPU, and the script runs."""

import json
from pathlib import Path

import pytest

from fewshot.probes.table import PROBES
from tests.conftest import ACCELERATOR


@pytest.mark.cuda
def test_features_and_probes_on_the_device_are_those_of_the_cpu(ranks, tmp_path):
    ranks(1, Path(__file__).with_name("ondevice.py"), tmp_path / "told.json")
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["device"].startswith(ACCELERATOR)
    assert set(told["features"]) == {"cls", "mean", "pre_tanh", "tanh"}
    assert max(told["features"].values()) <= 1e-5, told  # fp32, sums in another order
    assert set(told["probes"]) == set(PROBES)
    # fp64; L-BFGS ends where the gradient is small, which digits in the last place move
    limits = {name: 1e-5 if name == "logistic" else 1e-9 for name in PROBES}
    assert all(apart <= limits[name] for name, apart in told["probes"].items()), told
