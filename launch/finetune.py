"""Fine-tune: deepspeed launch/finetune.py --config finetune/imagenet384.json --init RUN data.train=SHARDS"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/, where finetune.py hides finetune

import argparse

from finetune.config import FinetuneConfig
from pretrain.ranks.stop import listen
from pretrain.run.command import Parser, run_command
from pretrain.run.configfile import read_config


def main() -> int:
    listen()
    parser = Parser(
        prog="launch/finetune.py",
        description="Fine-tune a checkpoint on a task, at the task's resolution, with a zero-initialised linear head; "
        "resumes what --out holds.",
    )
    parser.add_argument(
        "--config", required=True, help="a JSON file, or its name under configs/ (finetune/imagenet384.json)"
    )
    parser.add_argument(
        "--init", metavar="WEIGHTS", help="a pre-training run folder, or a checkpoint inside one; a resume needs none"
    )
    parser.add_argument(
        "--weights", choices=("raw", "averaged"), help="of --init: as trained (the default), or their Polyak average"
    )
    parser.add_argument("--out", type=Path, help="run folder; default: runs/<name of the config>")
    parser.add_argument("--extend", action="store_true", help="resume with another train.steps/epochs or schedule")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by launchers
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="laid over the config, last wins")
    args = parser.parse_intermixed_args()
    task = read_config(FinetuneConfig, args.config, args.overrides)

    from finetune.head import load_transferred
    from pretrain.engine import processgroup
    from pretrain.run.experiment import run
    from pretrain.run.origin import init_option

    init, out = init_option(args.init, args.weights), args.out or Path("runs") / task.name
    return run(task, out, processgroup.start(), init=init, fill=load_transferred, extend=args.extend)


if __name__ == "__main__":
    run_command(main)
