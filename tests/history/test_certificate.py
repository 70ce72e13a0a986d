"""The certificate: an honest run holds, and each way to doctor one is found and named; nothing else is accused."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.step import seal
from pretrain.errors import InputError
from pretrain.history.proof import audit, checkpoints, continuity, logged
from pretrain.history.proof.certificate import certify, write
from pretrain.history.proof.finding import FAILS, HOLDS, UNKNOWN
from pretrain.index.index import Index
from pretrain.record.lines import first_check, next_check, split_check
from pretrain.stream.heldout import hold_out
from tests.system.inprocess import run_here

STEPS, BATCH = 22, 96
# The ranks die once the step is logged, as by a kill.
_DIES = """
import os, signal
from pretrain.record.metrics import Metrics
step = Metrics.step
def dying(self, done, *rest):
    step(self, done, *rest)
    if done == {done}:
        os.kill(os.getpid(), signal.SIGKILL)
Metrics.step = dying
"""


@pytest.fixture(scope="module")
def made(run, tiny_config, tmp_path_factory) -> Path:
    """A run on two ranks, killed, on one, killed, and on two again: 1.5 epochs."""
    folder = tmp_path_factory.mktemp("made")
    train = {"global_batch": BATCH, "steps": STEPS}
    config = tiny_config(
        folder / "c.json", data={"audit": True}, train=train, checkpoint={"every": 4, "background": False}
    )
    for ranks, stage, dies in ((2, 1, 7), (1, 0, 14), (2, 2, None)):
        words = ("--config", config, "--out", folder / "run", f"deepspeed.zero_optimization.stage={stage}")
        prelude = _DIES.format(done=dies) if dies else ""
        done = run("launch/pretrain.py", *words, ranks=ranks, prelude=prelude)
        assert done.returncode == (-9 if dies else 0), done.stderr
    return folder / "run"


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def verdicts(path: Path) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in certify(path).findings}


def failing(path: Path, *claims: str) -> str:
    """All that is said of what does not hold: just these claims."""
    found = certify(path)
    assert {one.claim for one in found.findings if one.verdict == FAILS} == set(claims), found.text()
    return "\n".join(fault for one in found.findings for fault in one.faults)


def edit(path: Path, number: int, change) -> None:
    """Change line `number`, from 1, of a file; None removes it."""
    lines = path.read_text().splitlines()
    changed = change(lines[number - 1])
    lines[number - 1 : number] = [] if changed is None else [changed]
    path.write_text("".join(f"{line}\n" for line in lines))


def another_digit(line: str) -> str:
    """A line whose loss has another last digit."""
    return re.sub(r'("loss": [\d.]*)(\d)', lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", line)


def set_ids(line: str, change) -> str:
    tree = json.loads(line)
    change(tree["ids"])
    return json.dumps(tree)


def test_a_run_killed_twice_over_other_ranks_and_stages_holds_and_the_command_says_so(made, copy):
    found = certify(made)
    assert {one.verdict for one in found.findings} == {HOLDS}, found.text()
    text = found.text()
    assert f"steps 0 to {STEPS - 1} on 1 and 2 ranks, {2 * 4 + 8 + 2 * 10} lines" in text
    assert "1 whole epoch of 1,442 samples, and 670 different samples of epoch 1" in text
    assert "2 resumes; 5 lines of steps trained twice" in text
    assert "3 starts: 2×ZeRO 1 from 0, 1×ZeRO 0 from 4, 2×ZeRO 2 from 12" in text

    done = run_here("report.py", copy, "--verify")
    assert done.status == 0
    assert done.stdout.splitlines()[0] == f"{copy}: of 12 claims 12 hold, 0 do not, 0 cannot be known; {STEPS} steps"
    kept = json.loads((copy / "report" / "certificate.json").read_text())
    assert kept["runs"][0]["read"] == found.read
    assert kept["runs"][0]["holds"] is True


def test_the_order_that_it_compares_with_is_that_of_the_command(made, digits):
    done = run_here(
        "shards.py", "order", digits / "train", "--global-batch", BATCH, "--seed", 0, "--steps", f"0:{STEPS}"
    )
    told = [json.loads(line)["ids"] for line in done.stdout.splitlines()]
    fed: list[list[int]] = [[] for _ in range(STEPS)]
    for rank in (0, 1):
        for line in (made / "audit" / f"rank_{rank:05d}.jsonl").read_text().splitlines():
            fed[json.loads(line)["step"]] += json.loads(line)["ids"]
    assert fed == told
    assert verdicts(made)[audit.IDS] == HOLDS


def test_an_audit_line_removed_is_named_and_its_epoch_cannot_be_known(copy):
    edit(copy / "audit" / "rank_00001.jsonl", 3, lambda line: None)
    said = failing(copy, audit.STEPS)
    assert said == "audit/rank_00001.jsonl, line 3: step 3, step 2 would be right"
    assert verdicts(copy)[audit.ONCE] == UNKNOWN
    assert verdicts(copy)[audit.IDS] == HOLDS, "of the lines that are there"


def test_ids_swapped_within_an_epoch_break_the_order_alone(copy):
    path = copy / "audit" / "rank_00000.jsonl"

    def swap(ids):
        ids[1], ids[5] = ids[5], ids[1]

    edit(path, 4, lambda line: set_ids(line, swap))
    ids = json.loads(path.read_text().splitlines()[3])["ids"]
    said = failing(copy, audit.IDS)
    right = f"id {ids[1]}, {ids[5]} would be right (1 more in this line)"
    assert said == f"audit/rank_00000.jsonl, line 4, step 3, position 1: {right}"


def test_another_id_in_its_place_breaks_order_and_epoch(copy):
    path = copy / "audit" / "rank_00000.jsonl"
    first = json.loads(path.read_text().splitlines()[0])["ids"][0]
    edit(path, 4, lambda line: set_ids(line, lambda ids: ids.__setitem__(7, first)))
    said = failing(copy, audit.IDS, audit.ONCE)
    assert "audit/rank_00000.jsonl, line 4, step 3, position 7: id" in said
    assert f"line 4, step 3: id {first} comes again in epoch 0" in said
    assert "epoch 0: id" in said, "and the one that it replaced is never fed"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda lines: [*lines[:5], lines[4], *lines[5:]], r"line 6: step 4, after one of step 4"),
        (lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]], r"line 5: step 5, after one of step 3"),
        (lambda lines: [*lines[:4], "{oops", *lines[5:]], r"line 5: cannot be read"),
        (lambda lines: [*lines[:4], lines[4].replace('"step": 4', '"step": 904'), *lines[5:]], r"line 5: step 904"),
    ],
)
def test_lines_of_the_audit_that_are_doubled_moved_or_torn_are_named(copy, change, named):
    path = copy / "audit" / "rank_00000.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    assert re.search(named, failing(copy, audit.STEPS))


def test_a_ranks_file_that_is_gone_is_named_once(copy):
    (copy / "audit" / "rank_00001.jsonl").unlink()
    said = failing(copy, audit.STEPS)
    assert said == "audit/rank_00001.jsonl: no such file; step 0 was trained on 2 ranks"


def test_a_digit_of_a_loss_changed_is_named(copy):
    edit(copy / "metrics.jsonl", 6, another_digit)
    assert failing(copy, logged.CHAIN).startswith("metrics.jsonl, line 6 (step 6): was changed after it was written")


def test_a_line_of_metrics_removed_is_named(copy):
    edit(copy / "metrics.jsonl", 9, lambda line: None)
    said = failing(copy, logged.CHAIN, logged.LINES)
    assert "metrics.jsonl: no line of step 9; logging.every was 1" in said
    assert "metrics.jsonl, line 9 (step 10): was changed after it was written, or what stood between" in said


def test_a_value_that_follows_from_the_step_is_named(copy):
    edit(copy / "metrics.jsonl", 6, lambda line: re.sub(r'"lr": [^,]*', '"lr": 0.5', line))
    assert "metrics.jsonl, line 6 (step 6): lr is 0.5, " in failing(copy, logged.CHAIN, logged.VALUES)


def test_a_chain_computed_anew_is_found_by_the_checkpoint(copy):
    path, before = copy / "metrics.jsonl", first_check(b"")
    edit(path, 6, another_digit)
    texts = [split_check(line)[0] for line in path.read_text().splitlines()]
    written = []
    for text in texts:
        before = next_check(before, text)
        written.append(f'{text[:-1]}, "check": "{before}"}}\n')
    path.write_text("".join(written))
    said = failing(copy, logged.CHAIN)
    assert f"up to step {STEPS}: not the lines that were there when step_{STEPS:08d} was saved" in said


def test_a_loss_far_from_the_one_before_the_resume_is_named(copy):
    path = copy / "metrics.discarded.jsonl"
    edit(path, 1, lambda line: re.sub(r'"loss": [^,]*', '"loss": 9.25', line))
    said = failing(copy, continuity.CONTINUOUS)
    assert "resume at step 4 (1 ranks, ZeRO 0, micro-batch 96; other layout): step 5 had loss 9.25 before" in said
    assert "a relative difference of at most 0.05 would be right" in said


def test_a_difference_that_the_resume_need_not_have_made_is_stated_and_accuses_nobody(copy):
    path = copy / "metrics.discarded.jsonl"
    for number in (1, 2):  # steps 5 and 6: of other kernels, for all that the files tell
        edit(
            path, number, lambda line: re.sub(r'"loss": ([^,]*)', lambda loss: f'"loss": {float(loss[1]) * 1.01}', line)
        )
    found = certify(copy)
    assert found.holds
    [said] = [one for one in found.findings if one.verdict == UNKNOWN]
    assert said.claim == continuity.CONTINUOUS
    assert re.search(
        r"resume at step 4 .*: losses of steps trained twice differ by up to 9\.9e-03, more than", said.words
    )


def test_weights_other_than_those_before_the_resume_are_named_beyond_its_first_line_only_as_unknown(copy):
    edit(copy / "metrics.discarded.jsonl", 2, lambda line: re.sub(r'"loss": [^,]*', '"loss": 9.25', line))
    assert verdicts(copy)[continuity.CONTINUOUS] == UNKNOWN
    assert certify(copy).holds


def test_without_steps_trained_twice_the_jump_is_compared_with_its_neighbours(copy):
    (copy / "metrics.discarded.jsonl").unlink()
    words = {one.claim: one.words for one in certify(copy).findings}
    assert words[continuity.CONTINUOUS] == "2 resumes; at 2 the jump is compared with those between neighbouring lines"
    edit(copy / "metrics.jsonl", 13, lambda line: re.sub(r'"loss": [^,]*', '"loss": 3.5', line))
    failing(copy, logged.CHAIN)
    words = {one.claim: one.words for one in certify(copy).findings}[continuity.CONTINUOUS]
    assert "resume at step 12 (2 ranks, ZeRO 2, micro-batch 48; other layout): the loss goes from 2." in words
    assert "(step 12) to 3.5 (step 13); neighbouring lines differ by up to 0." in words
    assert verdicts(copy)[continuity.CONTINUOUS] == UNKNOWN


def test_lines_that_lack_what_all_have_are_refused_by_name(copy):
    edit(copy / "events.jsonl", 2, lambda line: line.replace('"step"', '"stap"'))
    with pytest.raises(InputError, match=r"events.jsonl: line 2: step is None; int would be right"):
        certify(copy)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("metrics", "loss", '"low"'), ("metrics", "at", "{}"), ("metrics.discarded", "step", "null"),
     ("events", "at", '"noon"'), ("events", "time/saving", "[]")],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(copy, name, key, value):
    path = copy / f"{name}.jsonl"
    number = 1 + next(at for at, line in enumerate(path.read_text().splitlines()) if f'"{key}"' in line)
    edit(path, number, lambda line: re.sub(f'"{key}": [^,}}]*', f'"{key}": {value}', line))
    with pytest.raises(InputError, match=rf"{name}\.jsonl: line {number}: {key} is .*; (int|float|int or float) would"):
        certify(copy)


@pytest.mark.parametrize("key", ["seed", "data.train", "optimizer.lr", "logging.every"])
def test_a_key_that_is_gone_from_the_config_is_refused_by_name(copy, key):
    config = json.loads((copy / "config.json").read_text())
    *around, last = key.split(".")
    del (config[around[0]] if around else config)[last]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"config\.json: no {key}; that of a run holds it"):
        certify(copy)


def test_another_schedule_than_that_of_the_last_start_is_named(copy):
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"warmup_steps": 5', '"warmup_steps": 6'))
    assert "the last start had schedule.warmup_steps 5, config.json has 6" in failing(copy, checkpoints.CONFIG)


def test_a_step_saved_before_the_first_line_of_a_kill_may_be_begun_from(copy):
    """A kill may come between a save and the event that tells of it, before any line is due."""
    for name in ("metrics", "metrics.discarded"):
        (copy / f"{name}.jsonl").unlink()
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    kept = [event | {"logging_every": 50} for event in events if event["event"] in ("start", "train")]
    (copy / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    assert verdicts(copy)[checkpoints.STARTS] == HOLDS


def test_a_flipped_bit_of_a_checkpoint_is_named(copy):
    path = copy / "checkpoints" / f"step_{STEPS:08d}" / "weights.00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    said = failing(copy, checkpoints.WHOLE)
    assert f"checkpoints/step_{STEPS:08d}/weights.00001.safetensors: " in said
    assert "has sha256" in said


def test_a_latest_that_names_another_or_none_is_named(copy):
    latest = copy / "checkpoints" / "latest"
    latest.write_text("step_00000020")
    right = f"names step_00000020; step_{STEPS:08d}, the newest, would be right"
    assert failing(copy, checkpoints.POINTERS) == f"checkpoints/latest: {right}"
    latest.write_text("step_00000099")
    assert "step_00000099, which is not there any more" in failing(copy, checkpoints.POINTERS)


def test_a_start_at_a_step_that_nothing_saved_is_named(copy):
    edit(copy / "events.jsonl", 1, lambda line: line.replace('"step": 0', '"step": 3'))
    assert "start 1 began at step 3, but those before it came to step 0" in failing(copy, checkpoints.STARTS)


def test_another_config_than_the_checkpoints_is_named(copy):
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"flip": true', '"flip": false'))
    assert f"step_{STEPS:08d}: data.flip is True, in config.json False" in failing(copy, checkpoints.CONFIG)


def test_a_run_without_an_audit_says_what_cannot_be_known(copy):
    shutil.rmtree(copy / "audit")
    assert failing(copy, audit.STEPS) == "audit/rank_00000.jsonl: no such file, but the run kept an audit"
    events = copy / "events.jsonl"
    events.write_text(events.read_text().replace('"audit": true', '"audit": false'))
    found = certify(copy)
    unknown = {one.claim: one.words for one in found.findings if one.verdict == UNKNOWN}
    assert unknown == dict.fromkeys((audit.STEPS, audit.IDS, audit.ONCE), "there is no audit (data.audit was false)")
    assert found.holds
    assert "9 hold, 0 do not, 3 cannot be known" in found.text().splitlines()[0]


def test_the_end_of_a_finished_run_cannot_be_cut_off_with_its_last_checkpoint(copy):
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    (copy / "checkpoints" / "latest").write_text("step_00000020")
    edit(copy / "audit" / "rank_00000.jsonl", STEPS, lambda line: None)
    said = failing(copy, audit.STEPS)
    assert said == f"audit/rank_00000.jsonl, line {STEPS}: the file ends before step {STEPS - 1}"


def test_events_that_are_gone_of_a_run_that_kept_them_are_named(copy):
    (copy / "events.jsonl").unlink()
    said = failing(copy, checkpoints.STARTS)
    assert said == f"events.jsonl: no such file, or an empty one, but the run that saved step_{STEPS:08d} kept one"


def test_a_run_that_is_going_on_is_not_judged_where_its_ranks_differ(copy):
    events = copy / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"event": "saved", "step": 20' in line)
    events.write_text("".join(lines[: last + 1]))
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    (copy / "checkpoints" / "latest").write_text("step_00000020")
    path = copy / "audit" / "rank_00001.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + '{"step": 21, "id')
    found = certify(copy)
    assert {one.verdict for one in found.findings} == {HOLDS}, found.text()
    assert "steps 20 to 20 are in no checkpoint yet" in found.facts
    assert "not finished: beyond step 21, lines that not all ranks have are not judged" in found.facts
    edit(path, 9, lambda line: None)
    assert failing(copy, audit.STEPS).startswith("audit/rank_00001.jsonl, line 9: step 17, step 16 would be right")


def test_a_run_from_before_events_and_checks_says_what_cannot_be_known(copy):
    (copy / "events.jsonl").unlink()
    path = copy / "metrics.jsonl"
    path.write_text("".join(f"{split_check(line)[0]}\n" for line in path.read_text().splitlines()))
    for state_file in (copy / "checkpoints").glob("step_*/state.json"):
        state = json.loads(state_file.read_text())
        del state["metrics"], state["seal"]
        state_file.write_text(json.dumps({**state, "seal": seal(state)}))
    found = certify(copy)
    unknown = {one.claim for one in found.findings if one.verdict == UNKNOWN}
    assert unknown == {logged.CHAIN, continuity.CONTINUOUS, checkpoints.STARTS}, found.text()
    assert found.holds


def test_a_run_that_was_begun_before_events_is_not_accused_of_what_was_not_recorded(copy):
    """Resumed at step 12 by a version that records events; before, it logged every other step and kept no audit."""
    events = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(events) if '"event": "start"' in line)
    (copy / "events.jsonl").write_text("".join(events[last:]))
    (copy / "metrics.discarded.jsonl").unlink()
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    old = [
        {k: v for k, v in line.items() if k not in ("at", "check")} for line in lines if line["step"] in range(2, 13, 2)
    ]
    kept = [*old, *(line for line in lines if line["step"] > 12)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for path in (copy / "audit").iterdir():
        new = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] >= 12]
        path.write_text("".join(new))
    failing(copy, logged.CHAIN)  # its checks were not computed anew
    unknown = {one.claim: one.words for one in certify(copy).findings if one.verdict == UNKNOWN}
    assert set(unknown) == {
        audit.STEPS, audit.IDS, audit.ONCE, logged.LINES, continuity.CONTINUOUS, checkpoints.STARTS,
    }  # fmt: skip
    assert "12 steps kept no audit" in unknown[audit.STEPS]
    assert "the starts up to step 12 are from before events.jsonl" in unknown[checkpoints.STARTS]


def test_without_the_index_the_ids_are_still_proved(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["data"]["train"] = "/nowhere"
    path.write_text(json.dumps(config))
    found = {one.claim: one for one in certify(copy).findings}
    assert found[audit.IDS].verdict == found[audit.ONCE].verdict == HOLDS
    assert found[checkpoints.POSITION].verdict == UNKNOWN
    assert "the index cannot be reached: /nowhere" in found[checkpoints.POSITION].words


def test_held_out_samples_are_never_fed(run, tiny_config, digits, tmp_path):
    data = {"audit": True, "held_out": 0.2}
    config = tiny_config(tmp_path / "c.json", data=data, train={"global_batch": BATCH, "steps": 14})
    done = run("launch/pretrain.py", "--config", config, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    trained, held = hold_out(Index.open(digits / "train"), 0.2)
    found = {one.claim: one for one in certify(tmp_path / "run").findings}
    assert {one.verdict for one in found.values()} == {HOLDS}
    assert found[audit.HELD_OUT].words == f"{len(held)} samples"
    assert found[audit.ONCE].words.startswith(f"1 whole epoch of {len(trained):,} samples, and ")
    path = tmp_path / "run" / "audit" / "rank_00000.jsonl"
    edit(path, 14, lambda line: set_ids(line, lambda ids: ids.__setitem__(0, int(held[3]))))
    said = failing(tmp_path / "run", audit.HELD_OUT, audit.IDS)
    assert f"audit/rank_00000.jsonl, line 14, step 13: id {held[3]} is held out" in said


def test_several_runs_go_into_one_file_and_what_fails_is_the_status(made, copy, tmp_path):
    edit(copy / "audit" / "rank_00000.jsonl", 1, lambda line: None)
    done = run_here("report.py", made, copy, "--verify", "--out", tmp_path / "both")
    assert done.status == 2
    assert "  ✗ DOES NOT HOLD: no step is missing" in done.stdout
    kept = json.loads((tmp_path / "both" / "certificate.json").read_text())
    assert [run["holds"] for run in kept["runs"]] == [True, False]


def test_no_run_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json in it"):
        certify(tmp_path)
    assert write([], tmp_path).exists()
