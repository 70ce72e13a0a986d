"""The config section `checkpoint`."""

from __future__ import annotations

from pretrain.section import Section, key


class CheckpointSection(Section):
    """When to save, and how many to hold. The last step is always saved."""

    every: int | None = key(None, about="Steps between saves; null: not by steps.", resume="free", gt=0)
    every_minutes: float | None = key(None, about="Minutes between saves; null: not by time.", resume="free", gt=0)
    keep: int = key(2, about="How many of the newest checkpoints are kept.", resume="free", gt=0)
    keep_every: int | None = key(
        None,
        about="The first checkpoint of every so many steps is never removed; null: all but the newest are.",
        resume="free",
        gt=0,
    )
    best: str | None = key(
        None,
        about="The score of the evaluations whose best checkpoint is never removed and named by the file "
        "`checkpoints/best`; null: none.",
        resume="free",
        examples=["eval/top1", "averaged/eval/top1", "eval/loss", "fewshot/5shot_ridge"],
    )
    background: bool = key(
        True, about="Whether a copy in the host's memory is written while training continues.", resume="free"
    )
