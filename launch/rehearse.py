"""Rehearse a run on its real machines: deepspeed launch/rehearse.py --config h14.json data.train=SHARDS

In minutes and in a scratch folder: memory against the plan, steps on the largest images, the loader live and cached,
storage, a save, a kill, restores on the same and on fewer ranks, evaluation, few-shot, a stop on request, an export.
A table and a verdict; exit status 2 where the real run would fail.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root

import argparse
import signal
from typing import NoReturn

from pretrain.configfile import read_config
from pretrain.console import say
from pretrain.ranks.command import DONE, INPUT_AT_FAULT, Parser, main_rank, run_command
from pretrain.rehearsal.findings import SCRATCH
from pretrain.training.config import RunConfig

INTERRUPTED = 130
ENDS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    args = parser().parse_intermixed_args()
    config = read_config(RunConfig, args.config, args.overrides)
    if args.measure:
        return measure(config, args.measure, args.seconds)
    out = args.out or Path("runs") / f"{config.name}-rehearsal"
    for number in ENDS:
        signal.signal(number, interrupt)
    try:
        return rehearse(config, out, args)
    except KeyboardInterrupt:
        if main_rank():
            left = f"{out / SCRATCH} is left" if (out / SCRATCH).exists() else "its scratch folder is gone"
            say(f"interrupted: the rehearsed run's processes are ended, {left}", to=sys.stderr)
        return INTERRUPTED


def rehearse(config: RunConfig, out: Path, args: argparse.Namespace) -> int:
    from pretrain.rehearsal.judge import Limits
    from pretrain.rehearsal.rehearsal import Commands, Rehearsal, meet

    given = ["--config", args.config, *args.overrides]
    here = Path(__file__).resolve()
    commands = Commands(
        [sys.executable, str(here), *given, "--seconds", str(args.seconds), "--measure"],
        [sys.executable, str(here.with_name("pretrain.py")), *given],
    )
    memory = None if args.device_memory is None else int(args.device_memory * 2**30)
    limits = Limits(args.grace, args.live, memory)
    report = Rehearsal(config, commands, out, meet(), limits).run(keep=args.keep)
    return INPUT_AT_FAULT if report.failing else DONE


def measure(config: RunConfig, out: Path, seconds: float) -> int:
    """What the ranks of the run that is measured do."""
    from pretrain.engine import processgroup
    from pretrain.rehearsal.measure import measure as measured

    train = config.train
    world = processgroup.start(part_minutes=max(train.hang_minutes, train.slow_minutes))
    measured(config, out, world, seconds)
    return DONE


def interrupt(*_: object) -> NoReturn:
    for number in ENDS:  # launchers send a second one, which must not end what the first one sets off
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def parser() -> Parser:
    main = Parser(prog="launch/rehearse.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_config("h14.json", lambda: RunConfig)
    add = main.add_argument
    add("--out", type=Path, metavar="DIR", help="on the disk of the real run; default: runs/<name>-rehearsal")
    add("--keep", action="store_true", help="keep the scratch folder and the ranks' output")
    add("--grace", type=float, default=30.0, metavar="S", help="seconds that a stop may take; 30: DeepSpeed's")
    add(
        "--live",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of the cached rate, to be reached live",
    )
    add("--device-memory", type=float, metavar="GIB", help="plan for a device of so much memory, not the one at hand")
    add("--seconds", type=float, default=20.0, metavar="S", help="for which each rate is measured")
    add("--measure", type=Path, help=argparse.SUPPRESS)  # given to the ranks of a run that is measured
    return main


if __name__ == "__main__":
    run_command(main)
