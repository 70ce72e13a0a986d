"""Few-shot: what linear probes make of frozen features.

    deepspeed launch/fewshot.py --config fewshot/imagenet.json --init runs/h14 data.support=T data.query=V
    python launch/fewshot.py --config C --init runs/h14 --init runs/l16       # one rank; several networks
    python launch/fewshot.py --features F.npz --out runs/given --shots 1,5    # features from elsewhere

Exit status: 0 done, 2 when what was given is at fault.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/, where fewshot.py hides fewshot

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

from pretrain import files
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.ranks.command import DONE, Parser, main_rank, run_command

KINDS = {"raw": (False,), "averaged": (True,), "both": (False, True)}  # --weights → whether averaged, in turn

# What else is needed is imported late: torch takes seconds, which a mistake in the config need not wait for.


def main() -> int:
    args = parser().parse_intermixed_args()
    return probe_file(args) if args.features else probe_weights(args)


def probe_weights(args: argparse.Namespace) -> int:
    from fewshot.config import FewshotConfig
    from fewshot.task import open_task
    from pretrain.configfile import read_config

    if not args.config or not args.init:
        raise InputError(
            f"{'--config' if not args.config else '--init'} is missing; --config C --init WEIGHTS, or "
            "--features F.npz --out DIR, would be right"
        )
    config = read_config(FewshotConfig, args.config, [*args.overrides, *protocol_overrides(args)])
    protocol, out = config.fewshot, args.out or Path("runs") / config.name
    task = open_task(config.data.support, config.data.query, shots=protocol.shots, seeds=protocol.seeds)

    import torch

    from fewshot import report, store, study
    from fewshot.score import fp64_device
    from fewshot.subject import open_entries
    from pretrain.engine import processgroup
    from pretrain.ranks import collectives

    world = processgroup.start()
    collectives.together(lambda: check_out(out) if world.main else None)  # one rank writes all
    dtype = getattr(torch, protocol.dtype)
    entries = open_entries(args.init, config.model.image_size, averaged=KINDS[args.weights], dtype=dtype)
    if world.main:
        for channels in {entry.spec.channels for entry in entries}:
            for note in task.colour_notes(channels, config.data.timeouts()):
                say(f"note: {note}")
    began = time.monotonic()
    taken = study.take_features(config, entries, task, out, world)
    extracted = time.monotonic()
    collectives.barrier()
    processgroup.stop()
    if not world.main:
        return DONE  # the probes are one rank's work, and the others need not wait for it

    device = fp64_device(world.device)
    scores = study.probe_features(config, taken, task, device)
    scores.seconds.update(features=extracted - began, total=time.monotonic() - began)
    names = list(dict.fromkeys(part.feature for part in taken))
    content = report.build_report(
        config.name,
        protocol,
        scores,
        draws=task.draws,
        weights=report.describe_entries(entries, names),
        images=report.describe_task(task, store.scored_again(taken[0].file)),
        arithmetic=report.describe_arithmetic(dtype),
        run={
            "ranks": world.size,
            "batch": protocol.batch,
            "device": str(device),
            "config": config.model_dump(mode="json"),
        },
    )
    return finish(content, out)


def probe_file(args: argparse.Namespace) -> int:
    from fewshot.config import FewshotConfig, ProtocolSection
    from fewshot.store import read_given
    from pretrain.configfile import read_config

    if args.init:
        raise InputError("--features and --init: one of the two; features need no weights")
    if args.weights != "raw":
        raise InputError(f"--features and --weights {args.weights}: one of the two; --weights goes with --init")
    if args.overrides and not args.config:
        raise InputError(f"{args.overrides[0]}: an override needs a --config; --shots, --seeds and --l2 do not")
    if not main_rank():
        return DONE
    name = args.features.stem
    if args.config:
        protocol = read_config(FewshotConfig, args.config, [*args.overrides, *protocol_overrides(args)]).fewshot
    else:
        protocol = ProtocolSection(**protocol_options(args))
    given, out = read_given(args.features), args.out or Path("runs") / name

    from fewshot import report, study

    check_out(out)
    began = time.monotonic()
    scores, draws = study.probe_given(given, protocol, name)
    scores.seconds["total"] = time.monotonic() - began
    content = report.build_report(
        name,
        protocol,
        scores,
        draws=draws,
        weights=report.describe_given(given, name),
        images=report.describe_rows(given, draws),
        arithmetic="features as given; probes in float64",
        run={"device": "cpu"},
    )
    return finish(content, out)


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be made or written to, before what would be lost with it is computed."""
    from pretrain.storage.location import local_path

    new = not os.path.lexists(out)
    files.make_folder(local_path(out))
    if new:
        out.rmdir()  # a fault found later leaves none behind


def finish(content: dict[str, Any], out: Path) -> int:
    from fewshot import page, report

    if aside := report.set_aside(content, out):
        say(f"{out / report.REPORT}: held another report, which is kept as {aside}")
    path = report.write_report(content, out)
    say(f"\n{page.table(content)}\n\nreport: {path}")
    return DONE


def protocol_options(args: argparse.Namespace) -> dict[str, Any]:
    """What --shots, --seeds and --l2 say, as keys of the config's `fewshot` section."""
    said = {"shots": args.shots, "seeds": args.seeds, "l2": args.l2}
    return {key: value for key, value in said.items() if value is not None}


def protocol_overrides(args: argparse.Namespace) -> list[str]:
    return [f"fewshot.{key}={json.dumps(value)}" for key, value in protocol_options(args).items()]


def numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """Parser of whole numbers from `least` on, separated by commas, each given once."""

    def parse(text: str) -> tuple[int, ...]:
        values = tuple(int(part) if part.isdecimal() else -1 for part in text.split(","))
        if min(values) < least or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(
                f"{text!r}: whole numbers from {least}, each once, separated by commas, would be right"
            )
        return values

    return parse


def strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 would be right")
    return value


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="launch/fewshot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("--config", metavar="C", help="a JSON file, or its name under configs/ (fewshot/imagenet.json)")
    main.add_argument(
        "--init",
        action="append",
        metavar="WEIGHTS",
        help="a run folder or a checkpoint inside one; may be given several times",
    )
    main.add_argument(
        "--weights",
        choices=tuple(KINDS),
        default="raw",
        help="of --init: as trained (the default), their Polyak average, or both side by side",
    )
    main.add_argument("--features", type=Path, metavar="F.npz", help="support_x, support_y, query_x, query_y to probe")
    main.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: runs/<name of the config, or of F>; another report that it holds is kept, as report-1, …",
    )
    main.add_argument("--shots", type=numbers(1), help="images of each class (default: the config's, or 1,5,10,25)")
    main.add_argument("--seeds", type=numbers(0), help="of the draws (default: the config's, or 0,1,2)")
    main.add_argument("--l2", type=strength, metavar="λ", help="of the ridge (default: the config's, or 1024)")
    main.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by launchers
    main.add_argument("overrides", nargs="*", metavar="key.path=value", help="laid over the config, last wins")
    return main


if __name__ == "__main__":
    run_command(main)
