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
    args = training_parser(
        "finetune",
        "Fine-tune a checkpoint on a task, at the task's resolution, with a zero-initialised linear head.",
        "finetune/imagenet384.json",
        FinetuneConfig,
    ).parse_intermixed_args()
    task = read_config(FinetuneConfig, args.config, args.overrides)

    from finetune.head import load_transferred
    from pretrain.engine import processgroup
    from pretrain.training.experiment import run
    from pretrain.training.origin import init_option

    init, out = init_option(args.init, args.weights), args.out or Path("runs") / task.name
    world = processgroup.start(part_minutes=max(task.train.hang_minutes, task.train.slow_minutes))
    evaluators = []
    if task.fewshot:
        from fewshot.evaluator import FewshotEvaluator

        evaluators.append(partial(FewshotEvaluator, world=world))
    return run(
        task,
        out,
        world,
        init=init,
        fill=load_transferred,
        evaluators=evaluators,
        extend=args.extend,
        check=args.check,
    )


if __name__ == "__main__":
    run_command(main)
