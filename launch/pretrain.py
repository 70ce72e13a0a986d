"""Pre-train: deepspeed launch/pretrain.py --config h14.json data.train=SHARDS"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/, where pretrain.py hides pretrain

import argparse
from functools import partial

from pretrain.ranks.stop import listen
from pretrain.run.command import Parser, run_command
from pretrain.run.config import RunConfig
from pretrain.run.configfile import read_config


def main() -> int:
    listen()
    parser = Parser(
        prog="launch/pretrain.py",
        description="Pre-train a Vision Transformer: starts anew, from given weights, or resumes what --out holds.",
    )
    parser.add_argument("--config", required=True, help="a JSON file, or its name under configs/ (h14.json)")
    parser.add_argument("--out", type=Path, help="run folder; default: runs/<name of the config>")
    parser.add_argument("--init", metavar="WEIGHTS", help="start from the weights of a run folder or checkpoint")
    parser.add_argument(
        "--weights", choices=("raw", "averaged"), help="of --init: as trained (the default), or their Polyak average"
    )
    parser.add_argument("--extend", action="store_true", help="resume with another train.steps/epochs or schedule")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by launchers
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="laid over the config, last wins")
    args = parser.parse_intermixed_args()
    config = read_config(RunConfig, args.config, args.overrides)

    from pretrain.engine import processgroup
    from pretrain.run.experiment import run
    from pretrain.run.origin import init_option

    init, out = init_option(args.init, args.weights), args.out or Path("runs") / config.name
    world = processgroup.start()
    evaluators = []
    if config.fewshot:
        from fewshot.evaluator import FewshotEvaluator

        evaluators.append(partial(FewshotEvaluator, config, world))
    return run(config, out, world, init=init, evaluators=evaluators, extend=args.extend)


if __name__ == "__main__":
    run_command(main)
