"""Which updates are skipped, and what follows when too many are.

Every rank has the same `Guard` and passes it the same numbers, so all decide alike without communication.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

from pretrain.errors import DivergedError
from pretrain.section import Section, key

# A spike is judged by the spread of so many last losses, once there are at least the second number of them.
_WINDOW, _ENOUGH = 100, 50
# On a plateau the losses hardly differ, and every one would be a spike: the least deviation, as a share of the mean.
_LEAST_DEVIATION = 0.01


class GuardSection(Section):
    """Updates that are skipped, and what follows too many of them."""

    skips: int = key(3, about="Updates skipped in a row that are too many.", resume="stated", gt=0)
    then: Literal["stop", "rollback"] = key(
        "stop", about="What follows: the run ends, or returns to an earlier checkpoint.", resume="stated"
    )
    spike: float | None = key(
        None,
        about="Standard deviations above the mean of the last 100 losses that make a spike, which is skipped; null: "
        "spikes are trained on.",
        resume="stated",
        gt=1,
    )
    margin: int = key(
        100,
        about="Steps before the skipped ones that make no update either after a roll-back.",
        resume="stated",
        ge=0,
    )
    rollbacks: int = key(3, about="The most roll-backs of a run.", resume="stated", gt=0)


class RollBack(Exception):
    """Return to the newest checkpoint of at most `first` steps (the oldest, if there is none) and train from there.

    The updates of the steps `first` to `last`, counted from 0, are then skipped while their data are consumed.
    """

    def __init__(self, first: int, last: int, why: str) -> None:
        super().__init__(why)
        self.first, self.last = first, last


class Guard:
    """Decides which updates to skip, and ends the run or rolls it back when too many were skipped.

    An update is refused if the loss is not finite, if it spikes (where `spike` is set), and if a roll-back avoids the
    step. A spike is a loss above mean + spike · deviation of the last 100 losses that were trained on, from
    the 50th on; refused losses are not among them, as they would raise the limit. Steps are
    counted from 0.
    """

    def __init__(self, section: GuardSection) -> None:
        self._section = section
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._streak: list[int] = []  # the steps skipped in a row up to now
        self.skipped = 0  # updates, in the whole run
        self.avoided: list[tuple[int, int]] = []  # first and last step, one pair for each roll-back

    def calm(self, step: int) -> bool:
        """Whether a skip of `step` would be the first of a row: the step before it made its update."""
        return not self._streak and not self.avoids(step)

    def refuses(self, step: int, loss: float) -> str | None:
        """Why the update of `step` must be skipped, given the step's loss over the global batch; None: it is fine."""
        if self.avoids(step):
            return "avoided since a roll-back"
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._section.spike is None or len(self._losses) < _ENOUGH:
            return None
        # fsum and sqrt are exactly rounded: the same bits on every machine.
        mean = math.fsum(self._losses) / len(self._losses)
        deviation = math.sqrt(math.fsum((seen - mean) ** 2 for seen in self._losses) / len(self._losses))
        limit = mean + self._section.spike * max(deviation, _LEAST_DEVIATION * abs(mean))
        return f"the loss is {loss:.6g}, a spike above {limit:.6g}" if loss > limit else None

    def note(self, step: int, loss: float, grad_norm: float | None, reason: str | None) -> None:
        """Count the step after its update was made (`reason` None) or skipped (why).

        Raises:
            DivergedError: too many were skipped in a row, and the run is to end or has rolled back too often.
            RollBack: too many were skipped in a row, and the run is to roll back.
        """
        if reason is None:
            self._losses.append(loss)
            self._streak.clear()
            return
        self.skipped += 1
        if self.avoids(step):
            return  # its data were skipped, whatever the loss
        self._streak.append(step)
        if len(self._streak) < self._section.skips:
            return
        since = self._streak[0]
        norm = "" if grad_norm is None else f", gradient norm {grad_norm:.6g}"
        what = (
            f"step {step + 1}: {reason} (loss {loss:.6g}{norm}); {len(self._streak)} updates in a row were skipped, "
            f"from step {since + 1} on"
        )
        if self._section.then == "rollback" and len(self.avoided) < self._section.rollbacks:
            first = max(0, since - self._section.margin)
            self.avoided.append((first, step))
            raise RollBack(first, step, f"{what}; going back, steps {first + 1} to {step + 1} make no update")
        spent = f", after {len(self.avoided)} roll-backs" if self.avoided else ""
        advice = "" if self._section.then == "rollback" else ', train.guard.then="rollback"'
        raise DivergedError(
            f"{what}{spent}. No skipped update is in a checkpoint: they are whole. A lower optimizer.lr, a longer "
            f"schedule.warmup_steps, optimizer.clip_norm=1{advice} may help"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a run resumed from it decides as this one. Plain JSON."""
        return {
            "losses": list(self._losses),
            "streak": list(self._streak),
            "skipped": self.skipped,
            "avoided": [list(steps) for steps in self.avoided],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a `state()`, and keep avoiding the steps that this guard avoids."""
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        saved = [(first, last) for first, last in state["avoided"]]
        self.avoided = saved + [steps for steps in self.avoided if steps not in saved]
        self._streak = [step for step in state["streak"] if not self.avoids(step)]
        self.skipped = state["skipped"]

    def avoids(self, step: int) -> bool:
        """Whether a roll-back avoids `step`."""
        return any(first <= step <= last for first, last in self.avoided)
