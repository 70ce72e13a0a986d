"""Train each variant while rank 1 meets a loss or gradients that are no numbers at given steps: one process group.

argv: the config, where to put the runs, variants {name: {"changes": [...], "losses": [steps], "gradients": [steps]}}.
"""

import json
import sys
from pathlib import Path

import torch

from pretrain.engine import distributed
from pretrain.engine.guards import DivergedError
from pretrain.run import setup, trainer
from pretrain.run.config import RunConfig, read_config
from pretrain.run.experiment import fresh, run

config_file, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
world = distributed.start()
now = {"step": -1}
seed_step, choose_loss = trainer.seed_step, setup.choose_loss


def note_step(seed, step, world):
    now["step"] = step
    seed_step(seed, step, world)


def poisoned(variant):
    def choose(*args):
        loss_of = choose_loss(*args)

        def loss(logits, *rest):
            if world.rank == 1 and now["step"] in variant.get("gradients", ()):
                logits.register_hook(lambda gradient: gradient * torch.nan)
            value = loss_of(logits, *rest)
            return value * torch.nan if world.rank == 1 and now["step"] in variant.get("losses", ()) else value

        return loss

    return choose


trainer.seed_step = note_step
for name, variant in variants.items():
    setup.choose_loss = poisoned(variant)
    config = read_config(RunConfig, config_file, variant["changes"])
    try:
        assert run(config, out / name, world, fill=fresh(config)) == 0
    except DivergedError as error:
        (out / f"{name}.{world.rank}.diverged").write_text(str(error))
distributed.stop()
