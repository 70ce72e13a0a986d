"""Plan a run before it is paid for: memory, time, traffic, data, checkpoints and money.

    python launch/plan.py --config h14.json --nodes 8 --gpus-per-node 8 --gpu-memory 80
    python launch/plan.py --config l16.json --nodes 1 --gpus-per-node 8 --gpu-memory 40 --price-per-gpu-hour 2.5
    python launch/plan.py --config C … --measure     # on the device that the run will use: how fast it really is
    python launch/plan.py --config finetune/imagenet384.json --init runs/h14 …

Every number that is assumed is named, with the option that changes it; docs/planning.md explains them.
Exit status: 0 planned, also where the run does not fit ("fits": false); 2 when what was given is at fault.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/, where pretrain.py hides pretrain

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from finetune.config import FinetuneConfig
from pretrain.configfile import read_config
from pretrain.console import deliver
from pretrain.errors import InputError
from pretrain.ranks.command import DONE, Parser, run_command
from pretrain.training.config import RunConfig, TrainingConfig


def main() -> int:
    args = parser().parse_intermixed_args()
    read = training_config(args.config, args.overrides)
    config = read.of(network(args, read))

    from pretrain.plan.assumptions import Given, assume
    from pretrain.plan.plan import machines_text, make_plan

    given = Given(**{name: value for name, value in vars(args).items() if name in Given.__dataclass_fields__})
    job, cluster, assumed = assume(config, given)
    if not args.json:  # at once: tracing the network takes longer than all before
        deliver([f"{config.name} on {machines_text(job, cluster)}"])
    plan = make_plan(job, cluster, assumed, config.train.micro_batch)
    deliver([json.dumps(plan.json(), indent=1) if args.json else plan.text()])
    return DONE


def training_config(name: str, overrides: Iterable[str]) -> TrainingConfig:
    """A pre-training or a fine-tuning config, whichever it is: the latter names no sizes of a network."""
    try:
        return read_config(RunConfig, name, overrides)
    except InputError as as_pretraining:
        try:
            return read_config(FinetuneConfig, name, overrides)
        except InputError as as_finetuning:
            # It is a config of the kind that finds less at fault with it.
            raise min((as_pretraining, as_finetuning), key=lambda error: str(error).count("\n")) from None


def network(args: argparse.Namespace, config: TrainingConfig) -> Any:
    """The network of --init; None where the config names its own. Raises InputError: it names none."""
    if not config.needs_weights:
        return None
    if not args.init:
        raise InputError(
            f"config {args.config}: a fine-tuning config, which names no network; --init WEIGHTS would say which: a "
            "run folder, a checkpoint inside one, or a file of any known format"
        )
    from pretrain.weights.load import choose

    return choose(args.init).spec


def parser() -> Parser:
    main = Parser(prog="launch/plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_config("h14.json", lambda: RunConfig)
    add = main.add_argument
    add("--nodes", type=count, required=True, metavar="N", help="machines")
    add("--gpus-per-node", type=count, required=True, metavar="G", help="GPUs of each, or CPU ranks")
    memory = "of each GPU; with --device cpu of each machine, whose ranks share it"
    add("--gpu-memory", type=positive, required=True, metavar="GiB", help=memory)
    add("--json", action="store_true", help="the plan as JSON; docs/planning.md says what each key is")
    add("--measure", action="store_true", help="measure for a minute how fast the device at hand is")
    add("--price-per-gpu-hour", type=positive, metavar="P", help="in any currency")
    add("--init", metavar="WEIGHTS", help="of a fine-tuning config: the weights whose network it is")
    add(
        "--device",
        choices=("cuda", "cpu"),
        help="what the ranks compute on; default: cuda, or with --measure what is here",
    )
    add("--gpu", metavar="NAME", help="h200, h100, a100, a100-80gb, …; default: by its memory")
    add("--mfu", type=share, metavar="S", help="share of the peak that passes reach; default: by the network's width")
    add("--tflops", type=positive, metavar="T", help="peak of a device in TFLOP/s; default: its data sheet's")
    add("--bandwidth-within", type=positive, metavar="GB/s", help="from a device to those of its node, as reached")
    add("--bandwidth-between", type=positive, metavar="GB/s", help="from a node to the others, as reached")
    add(
        "--samples", type=count, metavar="N", help="training samples; default: those of data.train, or the recipe's set"
    )
    add("--image-bytes", type=positive, metavar="B", help="of an encoded image; default: by data.train, or ImageNet's")
    add("--decode-ms", type=positive, metavar="MS", help="of a decode thread for an image")
    add("--storage", type=positive, metavar="GB/s", help="what the run folder's file system takes from all ranks")
    return main


def count(text: str) -> int:
    return checked(text, int, lambda value: value >= 1, "a whole number from 1")


def positive(text: str) -> float:
    return checked(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def share(text: str) -> float:
    return checked(text, float, lambda value: 0 < value <= 1, "a share above 0 and up to 1, such as 0.4")


def checked(text: str, kind: Callable[[str], Any], right: Callable[[Any], bool], wanted: str) -> Any:
    """The number that `text` says. Raises ArgumentTypeError: it is none, or not of the kind wanted."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not right(value):
        raise argparse.ArgumentTypeError(f"found {text!r}; {wanted} would be right")
    return value


if __name__ == "__main__":
    run_command(main)
