"""The certificate of a run of real commands, killed 20 times over three world sizes and ZeRO stages 0 to 3."""

import itertools
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from benchmarks.started import Command
from tests.conftest import lines

KILLS, STEPS, EVERY = 20, 260, 4


def latest(out: Path) -> int:
    return max((line["step"] for line in lines(out / "metrics.jsonl")), default=0)


@pytest.fixture(scope="module")
def killed(tiny_config, tmp_path_factory) -> Path:
    """The run folder, once the run has come to its end."""
    folder, draw = tmp_path_factory.mktemp("killed"), random.Random(5)
    model = {"layers": 2, "width": 48, "mlp": 96}
    config = tiny_config(
        folder / "c.json", model=model, data={"audit": True}, train={"steps": STEPS}, checkpoint={"every": EVERY}
    )
    out = folder / "run"
    layouts = itertools.cycle(itertools.product((1, 2, 3), (0, 2, 3, 1)))
    kills, began = 0, time.monotonic()
    while True:
        world, stage = next(layouts)
        words = ["--config", config, "--out", out, f"deepspeed.zero_optimization.stage={stage}"]
        command = Command(world, words, folder / f"said_{kills}.txt")
        if kills == KILLS:
            assert command.wait() == [0], command.said
            print(f"{KILLS} kills, {STEPS} steps, {time.monotonic() - began:.0f} s")
            return out
        # Some steps later than the checkpoint that it resumes, at times amid a save: the next run repeats some steps.
        aim, saving = latest(out) + draw.randint(1, 7), draw.random() < 0.3
        deadline = time.monotonic() + 300
        while command.running and time.monotonic() < deadline:
            if latest(out) >= aim and (not saving or any((out / "checkpoints").glob("partial_*"))):
                break
            time.sleep(0.002)
        assert command.running, command.said
        command.kill()
        kills += 1


def verify(real, out: Path) -> tuple[int, str]:
    done = real(sys.executable, "launch/report.py", out, "--verify")
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.long
def test_the_certificate_of_a_run_killed_20_times_over_3_world_sizes_holds(killed, real):
    status, said = verify(real, killed)
    print(said)
    assert status == 0, said
    assert said.splitlines()[0] == f"{killed}: of 12 claims 12 hold, 0 do not, 0 cannot be known; {STEPS} steps"
    events = lines(killed / "events.jsonl")
    assert [event["event"] for event in events].count("start") == KILLS + 1
    assert {event["ranks"] for event in events if event["event"] == "start"} == {1, 2, 3}


def remove_audit_line(out: Path) -> str:
    path = out / "audit" / "rank_00001.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    removed = json.loads(kept.pop(20))["step"]
    path.write_text("".join(kept))
    return rf"audit/rank_00001.jsonl, line 21: step \d+, step {removed} would be right"


def swap_id(out: Path) -> str:
    path = out / "audit" / "rank_00000.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    line = json.loads(kept[100])
    ids = line["ids"]
    ids[0], ids[3] = ids[3], ids[0]
    kept[100] = json.dumps(line) + "\n"
    path.write_text("".join(kept))
    return rf"audit/rank_00000.jsonl, line 101, step 100, position 0: id {ids[0]}, {ids[3]} would be right"


def doctor_metrics(out: Path) -> str:
    path = out / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    kept[76] = re.sub(r'"loss": \d', lambda found: f'"loss": {(int(found[0][-1]) + 1) % 10}', kept[76])
    path.write_text("".join(kept))
    return r"metrics.jsonl, line 77 \(step 77\): was changed after it was written"


def flip_bit(out: Path) -> str:
    path = max((out / "checkpoints").glob("step_*")) / "optimizer.00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    return rf"checkpoints/{path.parent.name}/{path.name}: .*damaged: {path.name} has sha256"


@pytest.mark.long
@pytest.mark.parametrize("doctor", [remove_audit_line, swap_id, doctor_metrics, flip_bit])
def test_what_was_doctored_is_found_and_named(killed, real, tmp_path, doctor):
    out = Path(shutil.copytree(killed, tmp_path / "run"))
    named = doctor(out)
    status, said = verify(real, out)
    assert status == 2
    assert re.search(named, said), said
    print(said.splitlines()[0], re.search(named, said)[0])
