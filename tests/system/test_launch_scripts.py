"""launch/slurm.sbatch and launch/ssh.sh: when they start again, on which nodes, and when they give up.

The commands they call are stand-ins: `srun` and `deepspeed` end with the next status of a list, `ssh` reaches whoever
is not listed as dead, and there `pgrep` and `pkill` find the command lines in the file `processes`. test_nodes.py runs
the real ones.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
# Ends as `statuses` says, one word a start: a status, "+" where the start writes a checkpoint, "!" where it leaves a
# rank on the nodes, "f" where few-shot writes a file of features, "s" where a run of a sweep writes a checkpoint;
# "done" is 0 with the word that the run is finished, "part" 0 with that of one run of a sweep.
ENDS = """#!/bin/bash
[[ $* =~ --hostfile\\ ([^ ]*) ]] && paste -sd' ' "${BASH_REMATCH[1]}" >>nodes
n=$(cat starts 2>/dev/null || echo 0)
statuses=($(cat statuses)); word=${statuses[$n]}
all="$*" entry=$(grep -oE 'launch/[a-z]+[.]py' <<<"$*") words=${all#*"$entry" }
echo "$words" >words; echo "$entry" >entry
if [[ $word == *! ]]; then echo "python -u $entry --local_rank=0 ${all#*"$entry" }" >>processes; fi
echo $((n + 1)) >begun; mv begun starts # whole, and last: a test that waits for it changes `statuses` next
if [[ $word == wait* ]]; then
  for _ in {1..1000}; do [ -e run/STOP ] && exit 75; [ -s killed ] && exit 137; /bin/sleep 0.05; done
fi
out=${words#--out }; out=${out%% --*}
if [ "$word" = done ]; then
  case "$entry $words" in
    *--sweep*) echo "node-a: sweep: $out/sweep.json" ;;
    *pretrain* | *finetune*) echo "node-a: $out: finished at step 5 of 5; nothing to do (set …)" ;;
    *) echo "node-a: report: $out/report/report.md" ;;
  esac
  exit 0
fi
if [ "$word" = part ]; then echo "node-a: $out/sweep/lr_0.1: finished at step 5 of 5; nothing to do (set …)"; exit 0; fi
if [[ $word == *f ]]; then mkdir -p run/features; touch "run/features/$n.npz"; fi
if [[ $word == *s ]]; then mkdir -p "run/sweep/lr_$n/checkpoints"; echo step_5 >"run/sweep/lr_$n/checkpoints/latest"; fi
if [[ $word == *+ ]]; then mkdir -p run/checkpoints; printf "step_$n" >run/checkpoints/latest; fi
exit "${word%[+!fs]}"
"""
STAND_INS = {
    "srun": ENDS,
    "deepspeed": ENDS,
    "ssh": '#!/bin/bash\nfor host in $(cat dead); do [[ " $* " == *" $host "* ]] && exit 255; done; sh -c "${@: -1}"\n',
    "pgrep": '#!/bin/bash\ngrep -E -- "${@: -1}" processes\n',
    "pkill": '#!/bin/bash\ngrep -E -- "${@: -1}" processes >>killed\n',
    "scontrol": '#!/bin/sh\necho "$@" >>scontrol.log\n',
    "sleep": "#!/bin/sh\n",
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").mkdir()
    for entry in ("pretrain", "finetune", "fewshot", "evaluate", "rehearse"):
        (tmp_path / "launch" / f"{entry}.py").touch()
    for name, text in STAND_INS.items():
        stand_in(tmp_path, name, text)
    for empty in ("dead", "processes", "killed"):
        (tmp_path / empty).write_text("")
    (tmp_path / "hosts").write_text("# the cluster\nnode-a slots=8\n\nnode-b slots=8\nnode-c slots=8\n")
    return tmp_path


def stand_in(place: Path, name: str, text: str) -> None:
    path = place / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def start(place: Path, script: str, *words: str, statuses: str) -> subprocess.Popen:
    (place / "statuses").write_text(statuses)
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    environment.update(SLURM_SUBMIT_DIR=str(place), SLURM_JOB_ID="7")
    return subprocess.Popen(
        ["bash", LAUNCH / script, *words],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # bash cannot trap what it was begun ignoring
    )


@pytest.mark.parametrize(
    ("statuses", "ends", "requeued"),
    [("0", 0, False), ("2", 2, False), ("75", 0, True), ("138", 0, True), ("1+", 0, True), ("1", 1, False)],
)
def test_the_slurm_job_requeues_itself_where_another_start_would_help(statuses, ends, requeued, place):
    job = start(place, "slurm.sbatch", "run", "--config", "h14.json", statuses=statuses)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == ends, said
    assert (place / "scontrol.log").exists() == requeued
    if requeued:
        assert (place / "scontrol.log").read_text() == "requeue 7\n"


ENTRIES = [((), "pretrain"), *(((name,), name) for name in ("pretrain", "finetune", "fewshot", "evaluate", "rehearse"))]


@pytest.mark.parametrize(("words", "entry"), ENTRIES)
@pytest.mark.parametrize("script", ["slurm.sbatch", "ssh.sh"])
def test_the_scripts_run_each_of_the_entry_points_in_any_folder(script, words, entry, place):
    hosts = ["hosts"] if script == "ssh.sh" else []
    status = "done" if hosts else "0"
    job = start(place, script, *hosts, "my run", *words, "--config", "c.json", "data.train=a b", statuses=status)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert (place / "entry").read_text() == f"launch/{entry}.py\n"
    run = place / "my run" if hosts else "my run"
    assert (place / "words").read_text() == f"--out {run} --config c.json data.train=a b\n"


@pytest.mark.parametrize(
    ("entry", "statuses", "ends"),
    [
        ("fewshot", "138", 138), ("fewshot", "138f", 0), ("fewshot", "1", 1), ("fewshot", "1f", 0),
        ("evaluate", "138", 138), ("evaluate", "1", 1),
        ("finetune --sweep", "138", 0), ("finetune --sweep", "1", 1), ("finetune --sweep", "1s", 0),
    ],
)  # fmt: skip
def test_the_slurm_job_of_other_commands_goes_on_as_long_as_it_writes_something(entry, statuses, ends, place):
    job = start(place, "slurm.sbatch", "run", *entry.split(), "--config", "c.json", statuses=statuses)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == ends, said
    assert (place / "scontrol.log").exists() == (ends == 0)


def test_features_count_beside_checkpoints(place):
    (place / "run" / "checkpoints").mkdir(parents=True)
    (place / "run" / "checkpoints" / "latest").write_text("step_00000010")
    job = start(place, "slurm.sbatch", "run", "fewshot", "--config", "c.json", statuses="1f")
    assert (job.wait(300), (place / "scontrol.log").exists()) == (0, True)


def test_few_shot_over_ssh_goes_on_until_its_report_is_written(place):
    job = start(place, "ssh.sh", "hosts", "run", "fewshot", "--config", "c.json", statuses="1f 0 1f 0 1 done")
    said = job.communicate(timeout=300)[0].decode()
    assert job.returncode == 0, said
    assert len(started(place)) == 6


def test_a_sweep_over_ssh_goes_on_until_all_of_it_is_done(place):
    words = ("hosts", "run", "finetune", "--sweep", "--config", "c.json")
    job = start(place, "ssh.sh", *words, statuses="1s part 1s part 1 done")
    said = job.communicate(timeout=300)[0].decode()
    assert job.returncode == 0, said
    assert len(started(place)) == 6
    assert "last written: step_5" in said


@pytest.mark.parametrize("entry", ["fewshot", "evaluate"])
def test_a_command_that_does_not_train_is_ended_over_ssh_by_a_signal(entry, place):
    job = start(place, "ssh.sh", "hosts", "run", entry, "--config", "c.json", statuses="wait! done")
    wait_for(place / "starts")
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 75, said
    assert (place / "starts").read_text() == "1\n"
    assert not (place / "run" / "STOP").exists()


ALL, AB, A = "node-a slots=8 node-b slots=8 node-c slots=8", "node-a slots=8 node-b slots=8", "node-a slots=8"


@pytest.mark.parametrize(
    ("dead", "statuses", "ends", "nodes"),
    [
        ("", "done", 0, [ALL]),
        ("", "0+ done", 0, [ALL] * 2),
        ("", "2", 2, [ALL]),  # nothing is missing, so the input is at fault
        ("", "75 255+ done", 0, [ALL] * 3),
        ("node-c", "2 done", 0, [AB, A]),  # the batch does not divide among two
        ("node-c", "2 2", 2, [AB, A]),
        ("node-b node-c", "done", 0, [A]),
        ("node-a node-b node-c", "done", 1, []),
        ("", "1 1 1 done", 1, [ALL] * 3),  # three starts in a row without a checkpoint
        ("", "1 1 1+ 1 1 done", 0, [ALL] * 6),
    ],
)
def test_over_ssh_the_run_goes_on_with_the_nodes_that_answer(dead, statuses, ends, nodes, place):
    (place / "dead").write_text(dead)
    status, said = over_ssh(place, statuses=statuses)
    assert status == ends, said
    assert started(place) == nodes, said


@pytest.mark.parametrize(
    "text",
    [
        "node-a slots=8\nnode-b slots=8\nnode-c slots=8",  # no end of the last line
        "\ufeffnode-a slots=8\r\nnode-b slots=8\r\n\r\nnode-c slots=8\r\n",
        "  node-a\tslots=8  \n# node-x slots=8\nnode-b   slots=8 # the new one\n \n#\nnode-c slots=8#\n",
    ],
)
def test_over_ssh_every_host_of_a_hostfile_is_taken_however_it_is_written(text, place):
    (place / "hosts").write_bytes(text.encode())
    status, said = over_ssh(place, statuses="done")
    assert status == 0, said
    assert started(place) == [ALL]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# none\n\n", "hosts: no line 'host slots=GPUS'"),
        ("node-a slots=8\nnode-b\n", "hosts: line 2 is 'node-b'; 'host slots=GPUS' would be right"),
        ("node-a slots=8 slots=8\n", "hosts: line 1 is 'node-a slots=8 slots=8'; 'host slots=GPUS'"),
        ("node-a slots=none\r\n", "hosts: line 1 is 'node-a slots=none'; 'host slots=GPUS'"),
        ("node-a slots=8\nnode-a slots=4\n", "hosts: line 2 names node-a again"),
        (None, "hosts: No such file or directory"),
    ],
)
def test_over_ssh_a_hostfile_that_says_something_else_is_refused(text, what, place):
    (place / "hosts").unlink()
    if text is not None:
        (place / "hosts").write_text(text, newline="")
    status, said = over_ssh(place, statuses="done")
    assert (status, said.count("\n"), started(place)) == (2, 1, []), said
    assert what in said


@pytest.mark.parametrize(
    ("statuses", "ends", "starts"),
    [
        ("0+ 0 0+ done", 0, 4),  # the launcher was killed three times
        ("1 0 1 done", 1, 3),  # a start without a checkpoint, like any other
        ("0 0 0 done", 1, 3),
    ],
)
def test_over_ssh_status_0_is_the_end_only_where_the_run_says_that_it_is_finished(statuses, ends, starts, place):
    status, said = over_ssh(place, statuses=statuses)
    assert status == ends, said
    assert len(started(place)) == starts
    assert "status 0, not yet confirmed by the run" in said


def test_over_ssh_a_second_start_on_the_folder_is_refused_and_ends_nothing(place):
    first = start(place, "ssh.sh", "hosts", "run", "--config", "h14.json", statuses="wait!")
    wait_for(place / "starts")
    status, said = over_ssh(place, statuses="done")
    assert (status, said.count("\n")) == (2, 1), said
    assert f"{place}/run: launch/ssh.sh is at work in it (process {first.pid} on " in said
    first.send_signal(signal.SIGTERM)
    assert first.wait(300) == 75
    assert (len(started(place)), (place / "killed").read_text()) == (1, "")


def test_over_ssh_the_folder_is_free_once_the_script_is_dead_whatever_it_has_started(place):
    first = start(place, "ssh.sh", "hosts", "run", "--config", "h14.json", statuses="wait done")
    wait_for(place / "starts")
    first.kill()
    first.wait()
    status, said = over_ssh(place, statuses="wait done")
    (place / "run" / "STOP").touch()  # for what the first one has started
    assert status == 0, said


def test_over_ssh_a_folder_that_cannot_be_locked_is_used_all_the_same(place):
    stand_in(place, "flock", "#!/bin/sh\necho 'flock: 9: Function not implemented' >&2; exit 65\n")
    status, said = over_ssh(place, statuses="done")
    assert status == 0, said
    assert "nothing keeps a second launch/ssh.sh out of this folder" in said


# Of another checkout, of a folder whose name begins alike, and of one that "." would match.
OTHERS = """python -u launch/pretrain.py --local_rank=0 --out r.un --config h14.json
python -u launch/pretrain.py --local_rank=0 --out {place}/r.un-2 --config h14.json
python -u launch/pretrain.py --local_rank=0 --out {place}/r_un --config h14.json
python -u launch/pretrain.py --local_rank=0 --out /other{place}/r.un --config h14.json
"""


def test_over_ssh_what_a_broken_start_left_on_the_nodes_is_ended_and_nothing_else(place):
    (place / "processes").write_text(OTHERS.format(place=place))
    status, said = over_ssh(place, "r.un", statuses="255! done")
    assert status == 0, said
    mine = f"python -u launch/pretrain.py --local_rank=0 --out {place}/r.un --config h14.json\n"
    assert (place / "killed").read_text() == 3 * mine  # once on each node


@pytest.mark.parametrize("statuses", ["2! done", "75! done"])
def test_over_ssh_nothing_is_ended_where_the_ranks_ended_by_themselves(statuses, place):
    (place / "dead").write_text("node-c")
    status, said = over_ssh(place, statuses=statuses)
    assert status == 0, said
    assert (place / "killed").read_text() == ""


def test_over_ssh_a_run_that_is_under_way_on_a_node_is_left_alone(place):
    (place / "processes").write_text(f"python -u launch/pretrain.py --local_rank=0 --out {place}/r.un --config c\n")
    status, said = over_ssh(place, "r.un", statuses="done")
    assert (status, said.count("\n")) == (2, 1), said
    assert f"{place}/r.un: a run is under way in it on node-a; wait for it, stop it" in said
    assert (started(place), (place / "killed").read_text()) == ([], "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_over_ssh_a_signal_is_a_stop_and_the_end(number, place):
    job = start(place, "ssh.sh", "hosts", "run", "--config", "h14.json", statuses="wait done")
    wait_for(place / "starts")
    job.send_signal(number)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 75, said
    assert (place / "starts").read_text() == "1\n"


def over_ssh(place: Path, run: str = "run", *, statuses: str) -> tuple[int, str]:
    """Status and output of `launch/ssh.sh` on the run folder `run`."""
    job = start(place, "ssh.sh", "hosts", run, "--config", "h14.json", statuses=statuses)
    said = job.communicate(timeout=300)[0].decode()
    return job.returncode, said


def started(place: Path) -> list[str]:
    """The nodes of each start."""
    return (place / "nodes").read_text().splitlines() if (place / "nodes").exists() else []


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
