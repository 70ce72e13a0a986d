"""How many samples may be unreadable before a run ends, and when."""

import json

import pytest
import torch

from pretrain.errors import InputError, StorageError
from pretrain.index.index import SampleExtent
from pretrain.ranks.collectives import World
from pretrain.record.folder import RunFolder
from pretrain.record.quarantine import Quarantine
from pretrain.stream.fault import NOT_READ, Fault
from pretrain.stream.loader import Batch
from pretrain.stream.section import DataSection

NOTHING = torch.zeros(0)


class Somewhere:
    def extents(self, ids):
        return [SampleExtent("a.tar", 512, 1024, first_id=int(ids[0]), count=1)]


@pytest.fixture
def quarantine(tmp_path):
    def make(global_batch=1000, **options):
        world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        return Quarantine(RunFolder(tmp_path), Somewhere(), world, DataSection(**options), global_batch)

    return make


def fail(quarantine, step, *faults):
    quarantine.add(Batch(NOTHING, NOTHING, NOTHING.numpy(), NOTHING, faults=faults))
    assert quarantine.pending
    quarantine.write(step)
    assert not quarantine.pending


def images(count):
    return [Fault(number, 0, str(number), "no image") for number in range(count)]


@pytest.mark.parametrize("before", [0, 100_000])
def test_a_storage_that_fails_late_ends_the_run_as_soon_as_one_that_fails_early(quarantine, before):
    found = quarantine()
    if before:
        fail(found, 5, *images(3))
    fail(found, before, *images(99))
    with pytest.raises(
        InputError, match=r"of the last 10,000 images could not be read, above data.max_unreadable=0.01"
    ):
        fail(found, before + 1, *images(20))


def test_a_rate_below_the_limit_goes_on_for_ever(quarantine):
    found = quarantine()
    for step in range(500):
        fail(found, step, *images(9))  # 0.9 %


def test_a_chunk_ends_the_run_by_its_own_reason_and_what_followed_is_not_listed(quarantine, tmp_path):
    found = quarantine(max_unreadable=1.0)
    with pytest.raises(InputError, match=r"^step 8: truncated \(data\.unreadable_chunks"):
        fail(found, 7, Fault(1, 0, None, NOT_READ), Fault(2, 0, None, "truncated"), Fault(3, 0, None, NOT_READ))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [2]
    fail(quarantine(unreadable_chunks="quarantine", max_unreadable=1.0), 7, Fault(2, 0, None, "truncated"))


@pytest.mark.parametrize("chunks", ["stop", "quarantine"])
def test_storage_that_does_not_answer_ends_the_run_whatever_is_quarantined(quarantine, chunks):
    later = Fault(1, 0, None, "503", passing=True), Fault(2, 0, None, f"{NOT_READ}: 503", passing=True)
    with pytest.raises(StorageError, match=r"^step 8: 503$"):
        fail(quarantine(unreadable_chunks=chunks), 7, *later)
    with pytest.raises(StorageError, match=r"^step 8: 503$"):  # and by a share of unreadable samples no less
        fail(quarantine(unreadable_chunks=chunks, max_unreadable=0.0), 7, *images(3), *later)


def test_storage_that_does_not_answer_leaves_damaged_chunks_to_be_quarantined(quarantine):
    damaged, later = Fault(1, 0, None, "truncated"), Fault(2, 0, None, "503", passing=True)
    with pytest.raises(StorageError, match=r"^step 8: 503$"):
        fail(quarantine(unreadable_chunks="quarantine"), 7, damaged, later)
    with pytest.raises(InputError, match=r"^step 8: truncated") as caught:
        fail(quarantine(), 7, damaged, later)
    assert not isinstance(caught.value, StorageError), "it stays when the storage has come back"
