"""Lines outlive a disk that is full for a while."""

import json
import resource

import pytest

from pretrain.record.lines import Lines


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
