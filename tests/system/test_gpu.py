"""`make gpu` at toy size on the CPU, without the packages that a bare GPU machine may lack."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT

# timm may be missing too: it is then left out of the comparison.
MISSING = ("sklearn", "mlxtend", "transformers", "streaming", "pandas")
PARTS = ("tests", "path", "steps", "eigh", "loop")


def test_every_part_works_at_toy_size_without_the_larger_packages(tmp_path):
    for name in MISSING:
        (tmp_path / "hidden" / name).mkdir(parents=True)
        (tmp_path / "hidden" / name / "__init__.py").write_text('raise ImportError("not on this machine")')
    out, words = tmp_path / "out", ("--toy", "--seconds", "1500")
    path = os.pathsep.join(filter(None, [str(tmp_path / "hidden"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "benchmarks/gpu.py", *words, "--out", out]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "gpu.json").read_text())
    assert set(found) == set(PARTS)
    assert all(told["works"] for told in found.values())
    assert len(found["tests"]["passed"]) == 1
    assert {"ridge cls 1", "ridge cls 5", "knn10 mean 5"} <= set(found["path"]["scores"])
    cases = found["steps"]["cases"]
    assert [case["way"] for case in cases] == ["engine", "ddp", "timm", "engine", "engine"]
    assert all(len(case["seconds"]) == 3 and case["images_per_second"] > 0 for case in cases if "left_out" not in case)
    assert all(case["planned_allocated"] > 0 for case in cases if case["way"] == "engine")
    assert found["eigh"]["decomposed"]["cpu"] > 0
    assert set(found["loop"]["rates"]) == {"loop, live ÷ bare step", "loop, cached ÷ bare step", "live ÷ cached"}
    for line in (*PARTS, *(case["name"] for case in cases)):
        assert line in done.stdout
