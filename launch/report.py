"""A run's page and its certificate, also while it is going on.

    python launch/report.py runs/h14                        # runs/h14/report/run.html
    python launch/report.py runs/a runs/b --out compared    # several runs in one page
    python launch/report.py runs/h14 --verify               # what was promised of this run, proved from its files

Exit status: 0 done; 2 when what was given is at fault, or, with --verify, when something does not hold.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/

import argparse

from pretrain.console import deliver, say
from pretrain.errors import InputError
from pretrain.history.history import RunHistory
from pretrain.ranks.command import DONE, INPUT_AT_FAULT, Parser, run_command

REPORT = "report"  # in the folder of the run


def main() -> int:
    args = parser().parse_args()
    if args.verify:
        return verify(args.runs, args.out)
    if len(args.runs) > 1 and args.out is None:
        raise InputError("--out: not given; the page of several runs needs a folder, e.g. --out runs/compared")
    runs = [RunHistory.read(path) for path in args.runs]
    from pretrain.history.overlay import Overlay
    from pretrain.history.page import summary, write_page  # matplotlib

    overlay = Overlay.of(runs)
    deliver(summary(overlay))
    say(f"page: {write_page(overlay, args.out or runs[0].folder.path / REPORT)}")
    return DONE


def verify(runs: list[Path], out: Path | None) -> int:
    """Print the certificate of each run and write it down; 2 where something does not hold."""
    from pretrain.history.proof.certificate import certify, write  # torch

    made = []
    for run in runs:
        made.append(certify(run))
        deliver([made[-1].text()])
        if out is None:
            say(f"written: {write(made[-1:], run / REPORT)}")
    if out is not None:
        say(f"written: {write(made, out)}")
    return DONE if all(one.holds for one in made) else INPUT_AT_FAULT


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="launch/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = main.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, as --out of a training command")
    add("--out", type=Path, metavar="DIR", help="where the page goes (default: RUN/report)")
    add("--verify", action="store_true", help="the certificate: what holds, what does not, what cannot be known")
    return main


if __name__ == "__main__":
    run_command(main)
