"""When a run saves; training waits only for a copy of the state."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint import pieces
from pretrain.checkpoint.pieces import Share
from pretrain.checkpoint.section import CheckpointSection
from pretrain.console import say
from pretrain.engine.fragments import kinds
from pretrain.engine.snapshot import Snapshot
from pretrain.engine.step import loss_scale
from pretrain.errors import InputError
from pretrain.ranks.collectives import World, all_gather_list, broadcast_object, gather_object
from pretrain.record.events import Events
from pretrain.record.folder import RunFolder


class SaveError(InputError):
    """The checkpoint that ends a run could not be written."""


class Saver:
    """Saves every so many steps, every so many minutes, and when told to.

    A save copies the state to the host; a thread writes the copy while training continues. When every rank's thread is
    done, rank 0 commits the checkpoint. One save runs at a time: the next waits for it.
    """

    def __init__(
        self,
        engine: Any,
        folder: RunFolder,
        world: World,
        state: Callable[[int], dict[str, Any]],
        section: CheckpointSection,
        events: Events,
        *,
        start: int,
    ) -> None:
        """
        Args:
            state: given the completed steps, what a checkpoint holds besides parameters and optimizer.
            start: steps completed before: a checkpoint of them exists.

        Raises:
            InputError: the disk has no room for a checkpoint.
        """
        self._engine, self._run, self._world, self._state = engine, folder, world, state
        self._folder, self._section, self._events = folder.checkpoints, section, events
        self._seconds = section.every_minutes * 60 if section.every_minutes else float("inf")
        self._saved_at = time.monotonic()
        self._thread: threading.Thread | None = None
        self._result: Share | Exception | None = None
        self._under_way: tuple[Path, int, float, float] | None = None  # folder, step, when begun, seconds waited
        self._snapshot = Snapshot(engine)
        self._background = section.background
        self._newest = start  # steps of the newest checkpoint
        self._bytes = 4 * len(kinds(engine)) * _values(engine)
        if missing := broadcast_object(self._missing() if world.main else None):
            raise InputError(f"--out: {missing}")

    def due(self, done: int) -> bool:
        """Whether a save is due after `done` steps. Ranks may differ: each asks its own clock."""
        if self._section.every and done % self._section.every == 0:
            return True
        return time.monotonic() - self._saved_at >= self._seconds

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, done: int, *, wait: bool = False, folder: Path | None = None) -> bool:
        """Save after `done` steps, and `wait` until it is committed; False if it could not be written. Collective.

        Args:
            folder: where to; None: the run's checkpoints.

        Raises:
            SaveError: with `wait`, a checkpoint of the run could not be written.
        """
        final = wait and folder is None
        self.finish()
        began, into = time.monotonic(), folder or self._folder
        if folder is None:
            self._saved_at = began
        if short := broadcast_object(self._missing() if self._world.main else None):
            return self._failed(done, short, final)
        copied = not wait and self._copies()
        values = self._snapshot.take() if copied else self._snapshot.values()
        target = checkpoints.partial_path(into, done)

        def write() -> None:
            try:
                self._run.sync(self._world.rank)  # no file of the run may end before its checkpoint
                self._result = pieces.write_share(
                    target, self._world.rank, self._snapshot.pieces, values, self._snapshot.begins
                )
            except Exception as error:  # rank 0 reports it
                self._result = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        self._under_way = into, done, began, time.monotonic() - began
        # Taken now: it describes this step.
        self._known = {
            "updates": self._engine.basic_optimizer.updates,
            "zero_stage": self._engine.zero_optimization_stage(),
            "loss_scale": loss_scale(self._engine),
            **self._state(done),
        }
        return True if copied else self.finish(final=final)

    def ensure(self, done: int) -> None:
        """Save after `done` steps unless that checkpoint exists. Collective.

        Raises:
            SaveError: it could not be written.
        """
        self.finish()
        if self._newest < done:
            self.save(done, wait=True)

    def finish(self, *, final: bool = False) -> bool:
        """Wait for the save under way, if there is one, and commit it; False if it failed. Collective.

        Raises:
            SaveError: it was `final` and could not be written.
        """
        if self._thread is None or self._under_way is None:
            return True
        self._thread.join()
        self._thread, (into, done, began, waited), self._under_way = None, self._under_way, None
        assert self._result is not None
        results = gather_object(self._result)
        failure = None
        if results is not None:  # rank 0
            records = [result for result in results if isinstance(result, Share)]
            try:
                for rank, result in enumerate(results):
                    if not isinstance(result, Share):
                        raise OSError(f"rank {rank}: {result}") from result
                path = checkpoints.commit(into, done, records, self._known)
            except OSError as error:
                failure = str(error)
                shutil.rmtree(checkpoints.partial_path(into, done), ignore_errors=True)
            else:
                if into == self._folder:
                    self.prune()
                took = time.monotonic() - began
                aside = "" if final or not self._background else f", training waited {waited:.1f} s"
                say(f"saved {path} in {took:.1f} s{aside}")
                if into == self._folder:
                    self._events.add("saved", done, seconds=round(took, 3))
        if failure := broadcast_object(failure):
            return self._failed(done, failure, final)
        if into == self._folder:
            self._newest = done
        return True

    def _copies(self) -> bool:
        """Whether to write from a copy while training continues: configured, and every host has the memory."""
        if self._background:
            here = socket.gethostname()
            ranks = all_gather_list([here]).count(here)
            lacking = [why for why in all_gather_list([self._snapshot.lacks(ranks)]) if why]
            if lacking:
                self._background = False
                if self._world.main:
                    say(f"training waits for saves from here on: {lacking[0]}")
        return self._background

    def prune(self) -> None:
        """Remove the checkpoints that are not to be kept. For rank 0."""
        try:
            checkpoints.prune(self._folder, self._section.keep, self._section.keep_every)
        except OSError as error:  # the new one is committed all the same
            say(f"{self._folder}: an old checkpoint could not be removed: {error}")

    def _failed(self, done: int, why: str, final: bool) -> bool:
        self._events.add("unsaved", done, reason=why)
        if final:
            raise SaveError(f"step {done} could not be saved: {why}. The checkpoints under {self._folder} are whole")
        if self._world.main:
            say(f"step {done} could not be saved: {why}; training continues from memory")
        return False

    def _missing(self) -> str | None:
        """What the disk lacks for a checkpoint; None: nothing."""
        place = self._folder
        try:
            while not files.exists(place):
                place = place.parent
            free = shutil.disk_usage(place).free
        except InputError as error:
            return str(error)
        except OSError as error:
            return str(files.failure(place, error))
        if free >= self._bytes:
            return None
        return f"{place} has {free / 2**30:.1f} GiB free, a checkpoint takes {self._bytes / 2**30:.1f}; make room"


def _values(engine: Any) -> int:
    """How many values the network's parameters have."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
