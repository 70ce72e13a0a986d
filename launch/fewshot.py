"""Few-shot: what linear probes make of frozen features.

    deepspeed launch/fewshot.py --config fewshot/imagenet.json --init runs/h14 data.support=T data.query=V
    python launch/fewshot.py --config C --init runs/h14 --init runs/l16       # one rank; several networks
    python launch/fewshot.py --config C --init runs/h14 --every 10000         # accuracy over training
    python launch/fewshot.py --features F.npz --out runs/given --shots 1,5    # features from elsewhere
    python launch/fewshot.py --apply runs/fewshot --init runs/h14 data.query=V    # its saved probes on other images

Exit status: 0 done, 2 when what was given is at fault.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not launch/, where fewshot.py hides fewshot

import argparse
import shlex
import time
from collections.abc import Callable
from typing import Any

from pretrain.configfile import read_config
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.ranks.command import DONE, Parser, main_rank, run_command
from pretrain.record import reportfolder

KINDS = {"raw": (False,), "averaged": (True,), "both": (False, True)}  # --weights → whether averaged, in turn
DEFAULT = ROOT / "configs/fewshot/imagenet.json"  # the protocol for features that are given without a config


def main() -> int:
    args = parser().parse_intermixed_args()
    if args.apply:
        return apply_saved(args)
    return probe_file(args) if args.features else probe_weights(args)


def probe_weights(args: argparse.Namespace) -> int:
    if not args.config or not args.init:
        raise InputError(
            f"{'--config' if not args.config else '--init'} is missing; --config C --init WEIGHTS, or "
            "--features F.npz --out DIR, would be right"
        )
    import torch

    from fewshot import cache, closeup, saved, score
    from fewshot.config import FewshotConfig
    from fewshot.report import report
    from fewshot.task import open_task
    from pretrain.engine import processgroup
    from pretrain.ranks import collectives
    from pretrain.weights.networks import open_networks

    config = read_config(FewshotConfig, args.config, overrides(args))
    protocol, out = config.fewshot, args.out or Path("runs") / config.name
    task = open_task(config.data.support, config.data.query, protocol)
    world = processgroup.start()
    collectives.together(lambda: reportfolder.check_out(out) if world.main else None)  # one rank writes everything
    dtype = getattr(torch, protocol.dtype)
    size, kinds = config.model.image_size, KINDS[args.weights]
    networks = open_networks(args.init, size, averaged=kinds, dtype=dtype, every=args.every)
    if world.main:
        for channels in {network.spec.channels for network in networks}:
            for note in task.colour_notes(channels, config.data.timeouts()):
                say(f"note: {note}")
    began = time.monotonic()
    kept = cache.FeatureCache(config, task.splits, out / cache.FOLDER, world)
    kept.check(networks)
    features = [kept.features(network) for network in networks]
    extracted = time.monotonic()
    collectives.barrier()
    processgroup.stop()
    if not world.main:
        return DONE  # one rank fits the probes, and the others need not wait for it

    device = score.fp64_device(world.device)
    scores = score.score_networks(features, task, protocol, device)
    scores.seconds.update(features=extracted - began, total=time.monotonic() - began)
    run = {"ranks": world.size, "threads": torch.get_num_threads(), "command": command_line()}
    probes = saved.fitted_probes(features, task.draws, scores)
    content = report.report_networks(config, features, task, scores, device.type, run)
    near = closeup.look_at_networks(features, task, protocol, scores, device)
    return finish(content, near, out, lambda folder: saved.write_probes(folder, probes, task.support.classes))


def probe_file(args: argparse.Namespace) -> int:
    if args.init or args.weights != "raw" or args.every is not None:
        other = "--init" if args.init else f"--weights {args.weights}" if args.weights != "raw" else "--every"
        raise InputError(f"--features and {other}: one of the two; features need no weights")
    if not main_rank():
        return DONE
    from fewshot import closeup, score
    from fewshot.config import FewshotConfig
    from fewshot.given import read_given
    from fewshot.report import report

    protocol = read_config(FewshotConfig, args.config or DEFAULT, overrides(args)).fewshot
    name = args.features.stem
    given, out = read_given(args.features), args.out or Path("runs") / name
    reportfolder.check_out(out)
    began = time.monotonic()
    scores, draws = score.score_given(given, protocol, name)
    scores.seconds["total"] = time.monotonic() - began
    near = closeup.look_at_given(given, draws, protocol, scores)
    run = {"command": command_line()}
    return finish(report.report_given(given, name, protocol, draws, scores, run), near, out)


def command_line() -> str:
    """What a shell is told to get the report again, on one rank: without what launchers add."""
    return shlex.join(["python", *(word for word in sys.argv if not word.startswith("--local"))])


def apply_saved(args: argparse.Namespace) -> int:
    if args.features or not args.init:
        what = "--features: one of the two" if args.features else "no --init: the WEIGHTS that they were fitted to"
        raise InputError(f"--apply and {what}; --apply DIR --init WEIGHTS data.query=INDEX would be right")
    for name in ("every", "shots", "seeds", "l2"):
        if getattr(args, name) is not None:
            raise InputError(f"--apply and --{name}: probes are applied as they were fitted; leave --{name} out")
    import torch

    from fewshot import apply, saved
    from fewshot.config import FewshotConfig
    from pretrain.engine import processgroup
    from pretrain.ranks import collectives
    from pretrain.weights.networks import open_networks

    config = read_config(FewshotConfig, args.config or DEFAULT, overrides(args))
    out = args.out or Path("runs") / config.name
    probes = saved.read_probes(args.apply)
    query = apply.open_query(config.data.query, probes)
    world = processgroup.start()
    collectives.together(lambda: reportfolder.check_out(out) if world.main else None)
    dtype = getattr(torch, config.fewshot.dtype)
    networks = open_networks(args.init, config.model.image_size, averaged=KINDS[args.weights], dtype=dtype)
    began = time.monotonic()
    features, applied = apply.apply_probes(probes, query, networks, config, out, world)
    collectives.barrier()
    processgroup.stop()
    if not world.main:
        return DONE
    run = {"ranks": world.size, "device": str(world.device), "command": command_line()}
    content = apply.report_applied(probes, query, features, applied, run)
    content["seconds"] = {"total": time.monotonic() - began}
    if aside := reportfolder.set_aside(content, out / apply.FOLDER):
        say(f"{out / apply.FOLDER}: held another report, which is kept as {aside}")
    path = apply.write_applied(content, query, applied, out)
    say(f"\n{apply.table(content)}\n\nreport: {path}")
    return DONE


def overrides(args: argparse.Namespace) -> list[str]:
    """The command line's overrides; --shots, --seeds and --l2 are short for three."""
    short = {"shots": args.shots and f"[{args.shots}]", "seeds": args.seeds and f"[{args.seeds}]", "l2": args.l2}
    return [*args.overrides, *(f"fewshot.{key}={value}" for key, value in short.items() if value)]


def finish(
    content: dict[str, Any], near: Any, out: Path, write_besides: Callable[[Path], None] = lambda folder: None
) -> int:
    """Write and say what was found. `near`: the `Closeup` on the report's page."""
    from fewshot.report import report, text

    if aside := reportfolder.set_aside(content, out / report.FOLDER):
        say(f"{out / report.FOLDER}: held another report, which is kept as {aside}")
    folder = report.write_report(content, near, out)
    write_besides(folder)
    say(f"\n{text.table(content)}\n\npage: {folder / 'report.html'}\nreport: {folder / 'report.md'}")
    return DONE


def config_class() -> Any:
    from fewshot.config import FewshotConfig

    return FewshotConfig


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="launch/fewshot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_config("fewshot/imagenet.json", config_class, required=False)
    add = main.add_argument
    many = "a run folder, a checkpoint inside one, or a file or URL of any known format; may be given several times"
    add("--init", action="append", metavar="WEIGHTS", help=many)
    kinds = "of --init: as trained (the default), their Polyak average, or both side by side"
    add("--weights", choices=tuple(KINDS), default="raw", help=kinds)
    steps = "of each --init, a run folder: all checkpoints after a multiple of N steps, and the newest"
    add("--every", type=int, metavar="N", help=steps)
    saved = "a folder of --out or a file of saved probes, to be applied to data.query"
    add("--apply", type=Path, metavar="PROBES", help=saved)
    add("--features", type=Path, metavar="F.npz", help="support_x, support_y, query_x, query_y to probe")
    out = "default: runs/<name of the config, or of F>; another report that it holds is kept, as report-1, …"
    add("--out", type=Path, metavar="DIR", help=out)
    add("--shots", metavar="K,…", help="images of each class: fewshot.shots (default: the config's, or 1,5,10,25)")
    add("--seeds", metavar="S,…", help="of the draws: fewshot.seeds (default: the config's, or 0,1,2)")
    add("--l2", metavar="λ", help="of the ridge: fewshot.l2 (default: the config's, or 1024)")
    return main


if __name__ == "__main__":
    run_command(main)
