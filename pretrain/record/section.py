"""The config section `logging`."""

from __future__ import annotations

from pretrain.section import Section, key

TELLING = 1.2  # excess of the slowest rank's time over the usual one's that is told


class LoggingSection(Section):
    """What is written down, and how often."""

    every: int = key(10, about="Steps between lines of metrics.", resume="free", gt=0)
    tensorboard: bool = key(True, about="Whether metrics go to TensorBoard files too.", resume="free")
    peak_tflops: float | None = key(
        None, about="A device's peak for MFU, in TFLOP/s; null: that of its data sheet.", resume="free", gt=0
    )
