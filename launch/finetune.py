"""Fine-tune: deepspeed launch/finetune.py --config finetune/imagenet384.json --init RUN data.train=SHARDS"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/, where finetune.py hides finetune

from functools import partial

from finetune.config import FinetuneConfig
from pretrain.configfile import read_config
from pretrain.ranks.command import run_command, training_parser
from pretrain.ranks.stop import listen


def main() -> int:
    listen()
    parser = training_parser(
        "finetune",
        "Fine-tune a checkpoint on a task, at the task's resolution, with a zero-initialised linear head.",
        "finetune/imagenet384.json",
        FinetuneConfig,
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="choose the learning rate on held-out samples, then train on all: the config's section sweep",
    )
    args = parser.parse_intermixed_args()
    if args.sweep and args.extend:
        parser.error("--extend goes with one run; leave it out, or --sweep")
    task = read_config(FinetuneConfig, args.config, args.overrides)

    from finetune.head import load_transferred
    from finetune.sweep import Sweep, check_folder
    from pretrain.engine import processgroup
    from pretrain.training.experiment import run
    from pretrain.training.origin import init_option

    init, out = init_option(args.init, args.weights), args.out or Path("runs") / task.name
    world = processgroup.start(part_minutes=max(task.train.hang_minutes, task.train.slow_minutes))
    evaluators = []
    if task.fewshot:
        from fewshot.evaluator import FewshotEvaluator

        evaluators.append(partial(FewshotEvaluator, world=world))
    check_folder(out, sweep=args.sweep)
    train = partial(run, world=world, init=init, fill=load_transferred, evaluators=evaluators)
    if args.sweep:
        sweep = Sweep(task, out, world, train, init=init)
        return sweep.check() if args.check else sweep.run()
    return train(task, out, extend=args.extend, check=args.check)


if __name__ == "__main__":
    run_command(main)
