"""An evaluation from images to scores, with storage that comes and goes."""

import sys

import pytest

from fewshot.config import DataSection, FewshotConfig, ProtocolSection
from fewshot.study import take_features
from fewshot.subject import open_entries
from fewshot.task import open_task
from pretrain.errors import StorageError


@pytest.mark.parametrize("answered", [0, 2], ids=["shards are asked for", "samples are read"])
def test_storage_that_does_not_answer_is_waited_for_as_the_config_says(
    answered, digit_shards, remote, tiny, drawn, run_folder, alone, tmp_path
):
    support, (server, query) = digit_shards[0], remote(digit_shards[1])  # of two shards
    config = FewshotConfig(
        name="far",
        data=DataSection(support=support, query=query, workers=1, patience_minutes=0.01),
        fewshot=ProtocolSection(shots=(1,), seeds=(0,), features=("pixels",)),
    )
    entries = open_entries([run_folder(tmp_path / "run", drawn(tiny()))], None)
    task = open_task(support, query, shots=(1,), seeds=(0,))
    server.usual, server.good = 503, answered
    with pytest.raises(StorageError, match=r"503 Service Unavailable; given up after .* in 0\.\d s") as caught:
        take_features(config, entries, task, tmp_path / "out", alone)
    assert str(caught.value).startswith("features of data.query: ") == bool(answered)
    server.usual = None
    (taken,) = take_features(config, entries, task, tmp_path / "out", alone)
    assert taken.file.is_file()


def test_features_are_taken_though_nobody_reads_the_console(
    digit_shards, tiny, drawn, run_folder, alone, tmp_path, monkeypatch
):
    config = FewshotConfig(name="mute", data=DataSection(workers=1), fewshot=ProtocolSection(features=("pixels",)))
    entries = open_entries([run_folder(tmp_path / "run", drawn(tiny()))], None)
    task = open_task(*digit_shards, shots=(1,), seeds=(0,))
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    (taken,) = take_features(config, entries, task, tmp_path / "out", alone)
    assert taken.file.is_file()
    with pytest.raises(OSError, match="No space left"):
        full.close()
