"""An export of H/14 streams: beyond the weights themselves it holds no copy of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Writes a checkpoint, exports it in a process of its own, and prints its peak of anonymous memory in kB, polled: memory
# that maps a file is the kernel's cache and counts for nobody.
EXPORT = """
import sys, threading, time
sys.path.insert(0, "")
peak = 0

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)

import torch
from launch import export
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
sys.argv[0] = "export.py"
export.main()
print("PEAK", peak)
"""


@pytest.mark.long
@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_a_large_export_takes_less_than_half_as_much_again_as_its_file(form, tmp_path, run_folder, network):
    sizes = {"patch_size": 14, "layers": 32, "width": 1280, "mlp": 5120, "heads": 16, "image_size": 224}
    run_folder(tmp_path / "run", network(0, **sizes, num_classes=1000, gelu="tanh"))
    out = tmp_path / f"vit.{form}"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path / "run"), "--format", form, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    size = out.stat().st_size
    assert size > 2.5e9
    peak = 1024 * int(done.stdout.split("PEAK")[1])
    assert peak < 1.5 * size, f"{peak / size:.2f} times the file"
