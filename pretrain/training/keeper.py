"""What happens between two steps: saves, evaluations, and stops on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from pretrain.engine.guards import RollBack
from pretrain.errors import DivergedError, InputError
from pretrain.ranks.collectives import any_rank, is_main
from pretrain.ranks.stop import Stop
from pretrain.record.best import Best
from pretrain.record.metrics import Metrics
from pretrain.record.pulse import Pulse
from pretrain.training.evaluation import Evaluator, due, evaluate
from pretrain.training.saver import SaveError, Saver


class Keeper:
    """Saves, evaluates and stops a run between its steps.

    As a context manager it also keeps what a failing run has: where all ranks fail alike inside, the steps completed up
    to then are saved, and a save under way is finished.
    """

    def __init__(
        self,
        engine: Any,
        saver: Saver,
        evaluators: Sequence[Evaluator],
        stop: Stop,
        *,
        pulse: Pulse,
        metrics: Metrics,
        start: int,
        steps: int,
        best: Best | None = None,
    ) -> None:
        """`start`, `steps`: completed when the run starts (a checkpoint of them exists), and when it ends."""
        self._engine, self._saver, self._evaluators, self._stop = engine, saver, evaluators, stop
        self._pulse, self._metrics, self.done, self._steps = pulse, metrics, start, steps
        self._best = best

    def requests(self, done: int) -> tuple[bool, bool, bool]:
        """This rank's requests after `done` steps, for the ranks to agree on: stop, save; and whether it writes yet."""
        return self._stop.asked(), self._saver.due(done), self._saver.writing

    def step(self, done: int, stopping: bool, saving: bool, writing: bool) -> bool:
        """Save and evaluate after `done` steps where that is due; False where the run is to stop. Collective.

        Args:
            stopping, saving, writing: the ranks' `requests`, each true where it is on any rank.

        Raises:
            InputError: the checkpoint that ends the run could not be written, or an evaluator's data not be read.
        """
        self.done, last = done, done == self._steps
        stopping = stopping and not last
        with self._pulse.paused("saving"):
            if not writing:
                self._saver.finish()
            if saving or stopping or last:
                self._pulse.beat(done - 1, "save")
                self._saver.save(done, wait=stopping or last)  # before the evaluation, which may fail
        if not stopping and not self.evaluate(done):  # the grace period of a stop is for the checkpoint
            stopping = True
            self._pulse.beat(done - 1, "save")
            with self._pulse.paused("saving"):
                self._saver.ensure(done)
        return not stopping

    def evaluate(self, done: int) -> bool:
        """Run the evaluators due after `done` steps; False if the ranks agreed to stop amid them. Collective.

        Nothing is written down then: the evaluation runs first when the run is started again.
        """
        chosen = due(self._evaluators, done, last=done == self._steps)
        if not chosen:
            return True
        self._pulse.beat(done - 1, "evaluation")  # opening the data counts towards it

        def before_batch() -> bool:
            self._pulse.beat(done - 1, "evaluation")  # however large a set is, each of its batches is progress
            return not any(any_rank(self._engine.device, self._stop.asked()))

        with self._pulse.paused("evaluating"):
            values = evaluate(chosen, self._engine, done, before_batch)
        if values is None:
            return False
        self._metrics.evaluated(done, values, self._pulse)
        if self._best is not None:
            self._keep_best(self._best, done, values)
        return True

    def _keep_best(self, best: Best, done: int, values: Mapping[str, float]) -> None:
        """Have the checkpoint of `done` steps, and name it as the best, if these values say so. Collective."""
        if best.beaten_by(values):
            self._pulse.beat(done - 1, "save")
            try:
                with self._pulse.paused("saving"):
                    self._saver.ensure(done)
            except SaveError as error:  # there was no room; training continues
                self._metrics.say(f"{error}; the best of them stays the best")
                return
            if is_main():
                best.name(done, values)
                self._saver.prune()
        elif done == self._steps and best.score is None:
            self._metrics.say(f"note: checkpoint.best: no {best.metric} was a number, so no checkpoint is the best")

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if getattr(error, "only_this_rank", False) or isinstance(error, SaveError):
            return
        with self._pulse.paused("saving"):
            if isinstance(error, InputError):
                self._saver.ensure(self.done)
            elif error is None or isinstance(error, DivergedError | RollBack):
                self._saver.finish()
