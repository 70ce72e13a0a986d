"""Pre-train: deepspeed launch/pretrain.py --config h14.json data.train=SHARDS"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/, where pretrain.py hides pretrain

from functools import partial

from pretrain.configfile import read_config
from pretrain.ranks.command import run_command, training_parser
from pretrain.ranks.stop import listen
from pretrain.training.config import RunConfig


def main() -> int:
    listen()
    args = training_parser("pretrain", "Pre-train a Vision Transformer.", "h14.json", RunConfig).parse_intermixed_args()
    config = read_config(RunConfig, args.config, args.overrides)

    from pretrain.engine import processgroup
    from pretrain.training.experiment import run
    from pretrain.training.origin import init_option

    init, out = init_option(args.init, args.weights), args.out or Path("runs") / config.name
    train = config.train
    world = processgroup.start(part_minutes=max(train.hang_minutes, train.slow_minutes))
    evaluators = []
    if config.fewshot:
        from fewshot.evaluator import FewshotEvaluator

        evaluators.append(partial(FewshotEvaluator, world=world))
    return run(config, out, world, init=init, evaluators=evaluators, extend=args.extend, check=args.check)


if __name__ == "__main__":
    run_command(main)
