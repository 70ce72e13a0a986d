"""Train each variant while rank 1 meets a loss or gradients that are no numbers at given steps: one process group.

argv: the config, where to put the runs, variants {name: {"changes": [...], "losses": [steps], "gradients": [steps],
"spikes": [steps whose loss is a thousand times what it is],
"refuses": [steps done after which an evaluation refuses, once], "passing": whether by storage that may come back}}.
Files are written slowly where an evaluation refuses.
"""

import json
import sys
import time
from pathlib import Path

import torch

from pretrain.checkpoint import archive
from pretrain.checkpoint import folder as checkpoints
from pretrain.configfile import read_config
from pretrain.engine import guards, processgroup
from pretrain.engine.quiet import get_accelerator
from pretrain.errors import DivergedError, InputError, StorageError
from pretrain.ranks.command import DONE, STOPPED
from pretrain.training import recipe, trainer
from pretrain.training.config import RunConfig
from pretrain.training.experiment import run

config_file, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
world = processgroup.start()
now = {"step": -1, "slow": False}
seed_step, choose_loss = trainer.seed_step, recipe.choose_loss


def note_step(seed, step, world):
    now["step"] = step
    seed_step(seed, step, world)


def poisoned(variant):
    def choose(*args):
        loss_of = choose_loss(*args)

        def loss(logits, *rest):
            if world.rank == 1 and now["step"] in variant.get("gradients", ()):
                logits.register_hook(lambda gradient: gradient * torch.nan)
            value = loss_of(logits, *rest) * (1000 if now["step"] in variant.get("spikes", ()) else 1)
            return value * torch.nan if world.rank == 1 and now["step"] in variant.get("losses", ()) else value

        return loss

    return choose


class Measuring:
    """An evaluation that refuses the first time it is asked to be made after a step of `refuses`."""

    every, scores = 3, ("eval/step",)

    def __init__(self, refuses, error):
        self.refuses, self.error, self.made = set(refuses), error, []

    def run(self, model, step):
        if step in self.refuses:
            self.refuses.remove(step)
            raise self.error(f"no evaluation after step {step}")
        self.made.append(step)
        yield "eval/step", float(step)


def slowly(path, tensors, write=archive.write):
    time.sleep(0.3 if now["slow"] else 0.0)
    return write(path, tensors)


def note_newest(name, attempt):
    newest = checkpoints.newest(out / name / "checkpoints")[0]
    (out / f"{name}.{world.rank}.{attempt}.refused").write_text(str(newest.step))


trainer.seed_step, archive.write = note_step, slowly
guards._ENOUGH = 5  # the runs are shorter than what a spike is told from
get_accelerator().is_fp16_supported = lambda: True
for name, variant in variants.items():
    recipe.choose_loss = poisoned(variant)
    now["slow"] = "refuses" in variant
    config = read_config(RunConfig, config_file, variant["changes"])
    measuring = Measuring(variant.get("refuses", ()), StorageError if "passing" in variant else InputError)
    evaluators = [lambda config, measuring=measuring: measuring] if "refuses" in variant else []
    for attempt in range(1 + len(measuring.refuses)):
        try:
            status = run(config, out / name, world, evaluators=evaluators)
            assert status == (STOPPED if "passing" in variant and attempt < len(variant["refuses"]) else DONE)
            if status == STOPPED:
                note_newest(name, attempt)
        except DivergedError as error:
            (out / f"{name}.{world.rank}.diverged").write_text(str(error))
        except InputError:
            note_newest(name, attempt)
    if evaluators:
        assert run(config, out / name, world, evaluators=evaluators) == 0, "nothing to do"
        (out / f"{name}.{world.rank}.made").write_text(json.dumps(measuring.made))
processgroup.stop()
