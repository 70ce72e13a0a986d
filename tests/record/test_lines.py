"""Lines outlive a disk that is full for a while."""

import json
import resource

import pytest

from pretrain.record.folder import RunFolder
from pretrain.record.lines import Lines, check_of, first_check, next_check, split_check


@pytest.fixture
def room():
    """Limits the size of the files that this process writes, as a full disk does: the last write is cut."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_there_is_no_room_for_comes_later_whole_and_in_order(tmp_path, room, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    lines.add({"step": 1})
    room(20)
    for step in (2, 3, 4):
        lines.add({"step": step})
    cut = path.read_text()
    assert len(cut) == 20
    assert not cut.endswith("\n"), "in the middle of a line"
    room(None)
    lines.add({"step": 5})
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    said = capsys.readouterr().out
    assert said == f"{path}: File too large; its lines wait in memory until there is room\n", "said once"


def test_numbers_that_are_none_become_null_and_no_line_makes_no_file(tmp_path):
    Lines(tmp_path / "none.jsonl").close()
    assert not (tmp_path / "none.jsonl").exists()
    lines = Lines(tmp_path / "some.jsonl")
    lines.add({"loss": float("nan"), "lr": 1e-3}, {"loss": float("inf")})
    assert (tmp_path / "some.jsonl").read_text() == '{"loss": null, "lr": 0.001}\n{"loss": null}\n'
    lines.close()


def checks(path) -> list[bool]:
    """Of each line, whether its check is that of the lines up to it."""
    found, before = [], first_check(b"")
    for number, line in enumerate(path.read_text().splitlines()):
        text, check = split_check(line)
        found.append(check == next_check(before, text))
        before = check or first_check(b"".join(path.read_bytes().splitlines(keepends=True)[: number + 1]))
    return found


def test_checked_lines_are_one_chain_over_a_rewind_and_a_full_disk(tmp_path, room):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, checked=True)
    lines.add({"step": 1, "loss": float("nan")}, {"step": 2})
    room(path.stat().st_size + 20)
    lines.add({"step": 3})
    room(None)
    lines.add({"step": 4})
    lines.close()
    assert lines.check == check_of(path)
    with path.open("a") as torn:
        torn.write('{"step": 5, "lo')
    assert lines.check == check_of(path), "a torn line is none"
    RunFolder(tmp_path).rewind(3)
    resumed = Lines(path, checked=True)
    resumed.add({"step": 4, "loss": 0.5})
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert checks(path) == [True] * 4


def test_the_chain_holds_lines_from_before_there_were_checks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    lines = Lines(path, checked=True)
    lines.add({"step": 3}, {"step": 4})
    lines.close()
    assert checks(path) == [False, False, True, True]
    path.write_text(path.read_text().replace('"step": 1', '"step": 0'))
    assert checks(path) == [False, False, False, True]
