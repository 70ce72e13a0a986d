"""The best checkpoint of a run: which one an evaluation scored best, named by the file `checkpoints/best`."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.ranks.collectives import is_main, on_main, together
from pretrain.record.folder import RunFolder


class Best:
    """Keeps `checkpoints/best` on the checkpoint with the best score, of equal ones the first.

    At every start it is found anew, from the scores in `metrics.jsonl` and the checkpoints that exist. So it is right
    after a resume, after a roll-back, under another metric, and after a kill between an evaluation and the file.
    """

    def __init__(self, folder: RunFolder, metric: str) -> None:
        """`metric`: the name of a score; a loss is better where it is lower. Collective."""
        self.metric = metric
        self._folder = folder
        self._sign = -1 if metric.endswith("loss") else 1
        self.score: float | None = None  # of the best one; rank 0's
        together(lambda: self._find() if is_main() else None)

    def beaten_by(self, values: Mapping[str, float]) -> bool:
        """Whether these values of an evaluation hold a better score; those of rank 0. Collective."""
        return on_main(lambda: self._better(values.get(self.metric)))

    def name(self, step: int, values: Mapping[str, float]) -> None:
        """Name the checkpoint of `step` steps, evaluated with these values, as the best. For rank 0."""
        checkpoints.point_to(self._folder.checkpoints, checkpoints.BEST, step)
        self.score = values[self.metric]

    def _better(self, score: float | None) -> bool:
        if score is None or score != score:  # NaN is better than nothing
            return False
        return self.score is None or self._sign * score > self._sign * self.score

    def _find(self) -> None:
        folder, best = self._folder.checkpoints, None
        for step, score in self._folder.scores(self.metric):
            if self._better(score) and files.is_folder(checkpoints.step_path(folder, step)):
                best, self.score = step, score
        if best is not None:
            checkpoints.point_to(folder, checkpoints.BEST, best)
        else:
            (folder / checkpoints.BEST).unlink(missing_ok=True)
