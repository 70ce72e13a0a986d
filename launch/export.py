"""Export weights to a format that other libraries read, or check an export:

python launch/export.py runs/h14 --format timm --out h14.safetensors --weights averaged --drop representation,head
python launch/export.py --check h14.safetensors
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root

import argparse
from typing import Any

from pretrain.console import say
from pretrain.errors import InputError
from pretrain.ranks.command import DONE, Parser, run_command

FORMATS = ("safetensors", "npz", "big_vision", "torchvision", "timm", "hf")


def main() -> int:
    args = parser().parse_args()
    if args.check:
        return check(Path(args.weights_path))
    if not args.format or not args.out:
        missing = "--format" if not args.format else "--out"
        raise InputError(f"{missing} is missing; WEIGHTS --format F --out PATH, or --check PATH, would be right")
    from pretrain.weights.export import export
    from pretrain.weights.load import choose
    from pretrain.weights.read import FORMATS as known

    drop = [name for name in args.drop.split(",") if name]
    source = choose(args.weights_path)
    averaged, pixels = args.weights == "averaged", normalisation(args)
    card = export(source, known[args.format], args.out, averaged=averaged, drop=drop, trained_on=pixels)
    if pixels is not None:
        say(f"taken to be trained on images of {pixels}; the export's patch embedding takes x / 127.5 - 1")
    say(f"{args.out}: {args.format}, from {source.path}\n{card}: what to expect; compare with --check {args.out}")
    return DONE


def normalisation(args: argparse.Namespace) -> Any:
    """What --mean and --std say; None without them."""
    from pretrain.weights.pixels import checked

    if args.mean is None and args.std is None:
        return None
    if args.mean is None or args.std is None:
        raise InputError("--mean and --std go together, a number for each channel: --mean 0.485,0.456,0.406 --std …")
    return checked(args.mean.split(","), args.std.split(","), where=args.weights_path)


def check(path: Path) -> int:
    from pretrain.weights.export import check as compare

    found, not_asked = compare(path)
    for one in found:
        verdict = "equal" if one.right else "DIFFERENT"
        say(f"{one.reader}: {one.output}: {verdict}, largest difference {one.difference:.1e}")
    if not_asked:
        say(f"note: {not_asked}")
    wrong = sorted({one.reader for one in found if not one.right})
    if wrong:
        raise InputError(
            f"{path}: as read by {' and '.join(wrong)} the network gives other values than its card expects; the "
            "file, or the card, is not what was exported"
        )
    return DONE


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="launch/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = main.add_argument
    add(
        "weights_path",
        metavar="WEIGHTS",
        help="a run folder, a checkpoint inside one, or a file or URL of any known format",
    )
    add("--format", choices=FORMATS, help="of the export; hf is a folder, the others are files")
    add("--out", type=Path, metavar="PATH", help="what to write; the card and a README lie beside it")
    add("--weights", choices=("raw", "averaged"), default="raw", help="as trained (the default), or their average")
    add(
        "--drop", default="", metavar="PART,…", help="leave out what the format cannot hold: representation, head, gelu"
    )
    told = "how the images of WEIGHTS from elsewhere were normalised, where the file does not say, of values in [0, 1]"
    add("--mean", metavar="R,G,B", help=told)
    add("--std", metavar="R,G,B", help="beside --mean; the export takes x / 127.5 - 1")
    add("--check", action="store_true", help="compare the export WEIGHTS with its card")
    return main


if __name__ == "__main__":
    run_command(main)
