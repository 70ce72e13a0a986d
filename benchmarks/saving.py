"""What a checkpoint costs training: written in the background, against a save that training waits for.

    python benchmarks/saving.py [--rounds 5] [--width 768] [--stage 0] [--save-steps 12]

One rank, AdamW, an average of the weights: 16 bytes a parameter are saved. The batch is chosen so that a save that is
waited for takes about --save-steps steps. Then windows of 20 steps take turns: without a save, with one in the
background, with one that is waited for. The first step of a window is the one that saves. Seconds of steps, medians and
spread; JSON: runs/bench/saving.json.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as on a GPU host, where the cores have time for the disk

import argparse
import shutil
import statistics
import tempfile
import time

import torch

from benchmarks.table import print_table, save, spread
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.section import CheckpointSection
from pretrain.engine import processgroup
from pretrain.engine.engine import build_engine
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.schedule import AveragingSection
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.engine.step import accumulate, agree, update
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.record.events import Events
from pretrain.record.folder import RunFolder
from pretrain.training.saver import Saver

WINDOW = 20


class Training:
    """A network that takes steps on random images, and saves."""

    def __init__(self, width: int, stage: int, out: Path) -> None:
        self.world = processgroup.start()
        spec = ViTSpec(
            patch_size=16, layers=12, width=width, mlp=4 * width, heads=width // 64, image_size=32, num_classes=1000
        )
        model = VisionTransformer(spec)
        initialize(model, 0)
        optimizer = build_optimizer(model, OptimizerSection(lr=1e-4, averaging=AveragingSection()))
        section = DeepSpeedSection(zero_optimization={"stage": stage})
        self.engine = build_engine(model, optimizer, section, batch_layout(8, None, self.world.size), 1.0)
        self.folder = RunFolder(out)
        self.folder.create()
        self.savers = {background: self._saver(background) for background in (True, False)}
        self.done, self.batch = 0, 8

    def _saver(self, background: bool) -> Saver:
        section = CheckpointSection(keep=1, background=background)
        return Saver(
            self.engine, self.folder, self.world, lambda done: {}, section, Events(self.folder, self.world), start=0
        )

    def step(self, saver: Saver | None = None, saves: bool = False) -> float:
        """Seconds of a step, as the trainer takes it."""
        began = time.perf_counter()
        images = torch.randn(self.batch, 3, 32, 32)
        loss = self.engine(images).float().square().mean()
        accumulate(self.engine, loss)
        agreed = agree(self.world, loss, saver is not None and saver.writing)
        update(self.engine, lr=1e-4, decay=0.999)
        self.done += 1
        if saver and not agreed.flags[0]:
            saver.finish()
        if saver and saves:
            saver.save(self.done)
        return time.perf_counter() - began

    def window(self, saver: Saver | None) -> list[float]:
        """Seconds of each of the steps of a window; the first one saves, if there is a `saver`."""
        seconds = [self.step(saver, saves=number == 0) for number in range(WINDOW)]
        if saver:
            saver.finish()
            assert checkpoints.newest(self.folder.checkpoints)[0].step == self.done - WINDOW + 1  # type: ignore[union-attr]
        return seconds

    def calibrate(self, save_steps: float) -> None:
        """Choose the batch so that a save takes so many steps."""
        self.window(self.savers[False])  # warms up
        took = statistics.median(self.window(self.savers[False])[0] for _ in range(3)) - self.step()
        per_image = (self.step_of(64) - self.step_of(16)) / 48
        fixed = self.step_of(16) - 16 * per_image
        self.batch = max(1, round((took / save_steps - fixed) / per_image))

    def step_of(self, batch: int) -> float:
        """Seconds of a step of `batch` images."""
        self.batch = batch
        return statistics.median(self.step() for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
    parser.add_argument("--save-steps", type=float, default=12)
    args = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="saving_", dir="."))
    try:
        training = Training(args.width, args.stage, out)
        training.calibrate(args.save_steps)
        kinds = {"no save": None, "background": training.savers[True], "waited for": training.savers[False]}
        windows: dict[str, list[list[float]]] = {name: [] for name in kinds}
        for number in range(args.rounds + 1):
            for name, saver in kinds.items():
                found = training.window(saver)
                if number:  # the first round warms up
                    windows[name].append(found)
        size = checkpoints.newest(training.folder.checkpoints)[0].bytes  # type: ignore[union-attr]
    finally:
        shutil.rmtree(out)
    normal = [statistics.median(window) for window in windows["no save"]]
    plain = [sum(window) for window in windows["no save"]]
    rows, ratios = [], {}
    for name, found in windows.items():
        saving = [window[0] / step for window, step in zip(found, normal, strict=True)]
        whole = [sum(window) / seconds for window, seconds in zip(found, plain, strict=True)]
        ratios[name] = {"saving_step": saving, "window": whole}
        rows.append([name, *spread(saving, ".2f"), *spread(whole, ".3f")])
    title = (
        f"A checkpoint of {size / 1e9:.2f} GB; a normal step takes {statistics.median(normal):.2f} s (batch "
        f"{training.batch})"
    )
    print_table(title, ["", "first step ÷ normal", "low – high", f"{WINDOW} steps ÷ without", "low – high"], rows)
    save("saving", {"windows": windows, "ratios": ratios, "bytes": size, "batch": training.batch})


if __name__ == "__main__":
    main()
