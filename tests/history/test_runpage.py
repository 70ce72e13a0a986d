"""A run's page: its figures come from the run's files, for one run or several, finished or not, new or old."""

import fcntl
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from pretrain.errors import InputError
from pretrain.history.curves import LOSS, charts, curves, loss_chart
from pretrain.history.history import RunHistory
from pretrain.history.marks import lost_steps, marks, starts_table
from pretrain.history.overlay import Overlay
from pretrain.history.page import NAME, checkpoints_table, protocol, run_page, state, summary, write_page
from pretrain.history.scores import leading_score, scores, scores_table
from pretrain.history.timeline import bars, ledger_table, timeline_chart
from tests.history.written import BEGAN, decay, event, line, write_run
from tests.page.parsed import ParsedPage

HOSTILE = "<b>$\\alpha$_{x}</b>\u202e\x1b[31m"
SHOWN = "<b>$\\alpha$_{x}</b>\\u202e\\x1b[31m"


def overlay(*folders):
    return Overlay.of([RunHistory.read(folder) for folder in folders])


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """100 steps: killed after 40, resumed from 20 on 4 ranks, rolled back from 52 to 45, stopped at 60, finished."""
    times = {step: 2 + step for step in range(1, 21)}
    times |= {step: 101 + step for step in range(21, 46)}
    times |= {step: 156 + (step - 45) / 4 for step in range(46, 61)}
    times |= {step: 100.5 + step for step in range(61, 101)}
    lines = [line(step, decay(step), BEGAN + at) for step, at in times.items()]
    lines[9]["straggler/excess"] = 1.5
    evaluated = {"eval/top1": 0.25, "averaged/eval/top1": 0.5, "fewshot/5shot_ridge": 0.75, "check": "0" * 16}
    lines.append({"step": 100, **evaluated, "at": BEGAN + 205})
    discarded = [line(step, 9.0, BEGAN + 2 + step) for step in range(21, 41)]
    discarded += [line(step, 8.0, BEGAN + 152 + step / 100) for step in range(46, 53)]
    events = [
        event("start", 0, BEGAN),
        event("train", 0, BEGAN + 2),
        event("saved", 20, BEGAN + 23, seconds=1.0),
        event("start", 20, BEGAN + 100, ranks=4, hosts=2, zero_stage=3),
        event("train", 20, BEGAN + 101),
        event("skipped", 52, BEGAN + 153, reason="the loss is nan"),
        event("left", 52, BEGAN + 154),
        event("rollback", 49, BEGAN + 155, reason="going back"),
        event("train", 45, BEGAN + 156),
        event("stopped", 60, BEGAN + 160, reason="SIGTERM"),
        event("start", 60, BEGAN + 160.2, ranks=4, hosts=2, zero_stage=3),
        event("train", 60, BEGAN + 160.3),
        event("finished", 100, BEGAN + 210),
    ]
    quarantine = [{"step": 29, "id": 1, "url": "a.tar", "offset": 0, "error": "damaged"}]
    return write_run(tmp_path_factory.mktemp("eventful") / "run", lines, events, discarded, quarantine)


def drawn(chart):
    figure = Figure()
    chart.draw(figure)
    return figure.axes


def test_what_happened_is_marked_where_it_did(eventful):
    found = {}
    for mark in marks(RunHistory.read(eventful)):
        found.setdefault(mark.lane, []).append((mark.step, mark.text))
    assert found == {
        "started": [(0, "2 ranks, ZeRO 1")],
        "resumed": [(20, "4 ranks on 2 hosts, ZeRO 3"), (60, "")],  # told where it changes
        "saved": [(20, "")],
        "killed": [(40, "")],
        "update skipped": [(52, "")],
        "rolled back": [(49, "")],
        "stopped": [(60, "")],
        "finished": [(100, "")],
        "slow rank": [(10, "")],
        "unreadable sample": [(30, "")],  # quarantine.jsonl counts steps from 0
    }


def test_starts_say_on_what_and_how_they_ended(eventful):
    run = RunHistory.read(eventful)
    assert lost_steps(run) == [20, 7, 0]
    rows = starts_table(run).rows
    assert [row[2:6] for row in rows] == [
        ["killed", "0", "40", "20"],
        ["stopped: SIGTERM", "20", "60", "7"],
        ["finished", "60", "100", "0"],
    ]
    assert rows[1][7:] == ["4 × cpu", "2", "3", "4"]


def test_the_loss_is_drawn_with_what_was_taken_back_and_what_happened(eventful):
    chart = loss_chart(overlay(eventful))
    above, below = drawn(chart)
    smooth, raw, back = above.lines[:3]
    assert raw.get_ydata().tolist() == [decay(step) for step in range(1, 101)]
    np.testing.assert_array_equal(smooth.get_xdata(), np.arange(1, 101))
    taken_back = back.get_xdata()[~np.isnan(back.get_xdata())]
    assert taken_back.tolist() == [*range(21, 41), *range(46, 53)]
    assert back.get_linestyle() == ":"
    lanes = dict(zip([text.get_text() for text in below.get_yticklabels()], below.lines, strict=True))
    assert lanes["resumed"].get_xdata().tolist() == [20, 60]
    assert len({lane.get_marker() for lane in lanes.values()}) == len(lanes), "told apart without colour"
    assert "to 0.5" in chart.text
    assert "at step 100" in chart.text
    assert "killed 1×" in chart.text


def test_hundreds_of_marks_on_one_pixel_are_one(tmp_path):
    events = [event("start", 0, BEGAN), *(event("skipped", step, BEGAN + step / 9, reason="") for step in range(9000))]
    run = write_run(tmp_path / "run", [line(100_000, 1.0, BEGAN + 9999)], events)
    _, below = drawn(loss_chart(overlay(run)))
    assert pytest.approx(len(below.lines[-1].get_xdata()), abs=2) == 9000 * 1200 / 100_000


def test_long_runs_are_drawn_by_columns(tmp_path):
    lines = [line(step, 50.0 if step == 7777 else 1.0, BEGAN + step) for step in range(1, 10_001)]
    chart = loss_chart(overlay(write_run(tmp_path / "run", lines)))
    [axes] = drawn(chart)
    [band] = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() == 50.0
    assert len(axes.lines[0].get_xdata()) == 1200
    assert axes.get_yscale() == "log"


def test_scores_share_a_chart_by_kind(eventful):
    found = {
        score.title: [(variant, name) for _, variant, name, _ in score.curves] for score in scores(overlay(eventful))
    }
    assert found == {
        "eval/top1": [("", "eval/top1"), ("averaged", "averaged/eval/top1")],
        "fewshot/k-shot_ridge": [("5-shot", "fewshot/5shot_ridge")],
    }
    assert scores_table(overlay(eventful)).rows[1] == ["averaged/eval/top1", *["50.00 %", "100"] * 3]
    assert leading_score(RunHistory.read(eventful)) == {"eval/top1, last": "25.00 %"}


def test_bars_are_as_wide_as_attempts_and_long_pauses_are_cut(eventful):
    told = overlay(eventful).hours[0]
    found = bars(told)
    assert [bar.end - bar.begin for bar in found] == pytest.approx([attempt.wall for attempt in told.attempts])
    assert found[1].begin - found[0].end == pytest.approx(0.15 * told.wall)  # of 57 s
    assert found[2].begin == pytest.approx(found[1].end), "the start came before the one before had ended"
    assert ledger_table(told).rows[-1][:2] == ["in all", f"{told.wall:.1f}"]
    assert "3 starts" in timeline_chart(overlay(eventful)).text


def test_the_page_of_a_run_shows_its_figures(eventful, tmp_path):
    path = write_page(overlay(eventful), tmp_path / "out")
    assert path == tmp_path / "out" / NAME
    assert [one.name for one in path.parent.iterdir()] == [NAME]
    parsed = ParsedPage(path.read_text(encoding="utf-8"))
    assert {"finished", "100 of 100", "stopped: SIGTERM", "50.00 %", "launch/pretrain.py --config c.json"} <= {
        text.strip() for text in parsed.text
    }
    alts = [attributes["alt"] for attributes, _ in parsed.images()]
    assert [alt.partition(",")[0] for alt in alts[:5]] == [
        "Loss (smoothed)",
        "Learning rate",
        "Gradient norm",
        "Throughput (smoothed)",
        "Waiting for data",
    ]
    assert "from 80 images/s at step 1 to 80 images/s at step 100" in alts[3]


def test_several_runs_are_told_apart_and_drawn_alike(tmp_path):
    one = write_run(tmp_path / "a" / "run", [line(step, 1.0) for step in range(1, 5)])
    other = write_run(
        tmp_path / "b" / "run",
        [line(step, 2.0, batch=16) for step in range(1, 5)],
        train={"global_batch": 16},
        optimizer={"name": "sgd", "lr": 0.5},
    )
    third = write_run(tmp_path / "c", [line(1, None)], name=HOSTILE)
    found = overlay(one, other, third)
    assert list(found.labels) == ["a/run (run)", "b/run (run)", HOSTILE]
    assert found.by_images
    assert found.end == 64
    assert [curve.raw.x.tolist() for curve in curves(found, LOSS)] == [[8, 16, 24, 32], [16, 32, 48, 64]]
    assert found.differences() == {
        "name": ["run", "run", HOSTILE],
        "train.global_batch": ["8", "16", "8"],
        "optimizer.name": ["adamw", "sgd", "adamw"],
        "optimizer.lr": ["0.001", "0.5", "0.001"],
    }
    for chart in charts(found):
        [axes] = drawn(chart)
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        by_label = dict(zip(labels, axes.get_legend().get_lines(), strict=True))
        assert by_label["b/run (run)"].get_color() == "C1"
        assert by_label["b/run (run)"].get_linestyle() == "--"
    html = run_page(found).html()
    texts = ParsedPage(html).text
    assert SHOWN in texts
    assert (
        f"{SHOWN}: the loss was no number at 1 logged step, the first 1, the last 1; its curve has a gap there."
        in texts
    )
    assert not set("\x1b\u202e") & set(html)
    with pytest.raises(InputError, match="given twice"):
        overlay(one, other, tmp_path / "b" / ".." / "a" / "run")


def _hold(path, ready, done):
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        ready.set()
        done.wait(60)


def test_a_run_is_going_on_while_its_folder_is_claimed(tmp_path):
    run = write_run(tmp_path / "run", events=[event("start", 0, BEGAN)])
    assert state(RunHistory.read(run)) == "killed"
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(run / ".claim", ready, done))
    holder.start()
    ready.wait(60)
    assert state(RunHistory.read(run)) == "going on"
    assert summary(overlay(run))[-1] == "No training step has been logged yet."
    run_page(overlay(run))  # nothing to draw
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "images": 8, "epoch": 0.1, "loss": 2.5, "at": 1700000002.0}\n{"step": 2, "lo')
    assert "steps 1 of 100" in summary(overlay(run))[0]
    done.set()
    holder.join()
    assert state(RunHistory.read(run)) == "killed"


def test_a_run_that_was_killed_before_its_first_save_is_started_again(tmp_path):
    run = write_run(tmp_path / "run", events=[event("start", 0, BEGAN), event("start", 0, BEGAN + 9)])
    assert [mark.lane for mark in marks(RunHistory.read(run))] == ["started", "killed", "started", "killed"]


@pytest.mark.parametrize(("last", "ended"), [("finished", "finished"), ("stopped", "stopped"), ("failed", "failed")])
def test_how_a_run_ended(tmp_path, last, ended):
    run = write_run(tmp_path / "run", events=[event("start", 0, BEGAN), event(last, 5, BEGAN + 1)])
    assert state(RunHistory.read(run)) == ended


def test_a_run_from_before_events_has_its_curves(tmp_path):
    lines = [line(step, decay(step), **({"updates_skipped": 1} if step > 4 else {})) for step in range(1, 10)]
    found = overlay(write_run(tmp_path / "run", lines))
    assert [(mark.lane, mark.step) for mark in marks(found.runs[0])] == [("update skipped", 5)]
    assert "there is no events.jsonl" in summary(found)[-1].lower()
    assert state(found.runs[0]) == "stopped or killed"
    assert timeline_chart(found) is None
    assert len(drawn(loss_chart(found))) == 2


def test_checkpoints_and_data_are_those_that_the_folder_has(tmp_path):
    run = write_run(tmp_path / "run", [line(1, 1.0)])
    for step in (10, 20):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step:08d}" / "state.json").write_text(
            f'{{"step": {step}, "ranks": 2, "zero_stage": 3, "files": {{"a": {{"bytes": 4608}}}}, "seal": "{"f" * 64}",'
            ' "stream": {"index_hash": "abc123", "samples": 1442}}'
        )
    (run / "checkpoints" / "latest").write_text("step_00000020")
    (run / "checkpoints" / "step_00000030").mkdir()  # being removed
    history = RunHistory.read(run)
    rows = checkpoints_table(history).rows
    assert [row[:6] for row in rows] == [
        ["step_00000020", "20", "latest", "4.61 kB", "2", "3"],
        ["step_00000010", "10", "", "4.61 kB", "2", "3"],
    ]
    assert protocol(history)["index"] == "abc123, 1,442 samples"
    assert protocol(history)["optimizer"] == "name adamw, lr 0.001"


def test_what_is_no_run_is_refused(tmp_path):
    sweep = tmp_path / "sweep"
    write_run(sweep / "full" / "seed_0")
    with pytest.raises(InputError, match=r"no config\.json in it; the folder of a run .* as .*full/seed_0"):
        RunHistory.read(sweep)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(InputError, match=r"config\.json: not that of a run"):
        RunHistory.read(tmp_path)
    (sweep / "full" / "seed_0" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\nx\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is no JSON"):
        RunHistory.read(sweep / "full" / "seed_0")
    (sweep / "full" / "seed_0" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"loss": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2: step is None; int would be right"):
        RunHistory.read(sweep / "full" / "seed_0")


def test_the_command_says_where_the_page_is(run, tmp_path):
    folder = write_run(tmp_path / "run", [line(1, 1.0)])
    done = run("launch/report.py", folder)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"page: {folder / 'report' / NAME}")
    refused = run("launch/report.py", folder, tmp_path)
    assert refused.returncode == 2
    assert "--out: not given" in refused.stderr


def test_the_page_needs_no_torch():
    """Which would take seconds to import."""
    code = "import pretrain.history.page, sys; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
