"""Evaluate: accuracy, ReaL, calibration and confusions of any weights on labelled images.

    deepspeed launch/evaluate.py --config evaluate/imagenet.json --init runs/imagenet384 data.eval=shards/val
    python launch/evaluate.py --config C --init runs/a --init b.safetensors     # one rank; side by side
    python launch/evaluate.py --config C --init runs/a --weights both           # raw and averaged

Exit status: 0 done, 2 when what was given is at fault.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/

import argparse
import time

from finetune.evaluation.config import EvaluateConfig
from pretrain.configfile import read_config
from pretrain.console import say
from pretrain.ranks.command import DONE, Parser, run_command
from pretrain.record import reportfolder

KINDS = {"raw": (False,), "averaged": (True,), "both": (False, True)}  # --weights → whether averaged, in turn


def main() -> int:
    args = parser().parse_intermixed_args()
    config = read_config(EvaluateConfig, args.config, args.overrides)
    out = args.out or Path("runs") / config.name

    import torch

    from finetune.evaluation import page, report
    from finetune.evaluation.evaluate import evaluate
    from finetune.evaluation.sets import check_network, notes, open_sets
    from pretrain.engine import processgroup
    from pretrain.ranks import collectives
    from pretrain.weights.networks import open_networks

    world = processgroup.start()
    collectives.together(lambda: reportfolder.check_out(out) if world.main else None)  # one rank writes everything
    sets = open_sets(config.data, world)
    dtype = getattr(torch, config.evaluate.dtype)
    networks = open_networks(args.init, config.model.image_size, averaged=KINDS[args.weights], dtype=dtype)
    for network in networks:
        check_network(network, sets)
    # It looks at some images: a storage that does not answer must not cost what was predicted.
    noted = collectives.together(lambda: notes(networks, sets, config.data) if world.main else [])
    began = time.monotonic()
    results = [result for network in networks for result in evaluate(network, sets, config, world)]
    collectives.barrier()
    processgroup.stop()
    if not world.main:
        return DONE
    run = {"ranks": world.size, "device": str(world.device)}
    content = report.build_report(config, results, noted, run)
    content["seconds"] = {"predictions": time.monotonic() - began}
    if aside := reportfolder.set_aside(content, out / report.FOLDER):
        say(f"{out / report.FOLDER}: held another report, which is kept as {aside}")
    path = report.write_report(content, results, out)
    say(f"\n{page.table(content)}\n\nreport: {path}")
    return DONE


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="launch/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_config("evaluate/imagenet.json", lambda: EvaluateConfig)
    add = main.add_argument
    many = "a run folder, a checkpoint inside one, or a file or URL of any known format; may be given several times"
    add("--init", action="append", required=True, metavar="WEIGHTS", help=many)
    kinds = "of --init: as trained (the default), their Polyak average, or both side by side"
    add("--weights", choices=tuple(KINDS), default="raw", help=kinds)
    out = "default: runs/<name of the config>; another report in its folder evaluation is kept, as evaluation-1, …"
    add("--out", type=Path, metavar="DIR", help=out)
    return main


if __name__ == "__main__":
    run_command(main)
