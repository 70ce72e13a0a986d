"""Look inside a network: the ViT paper's Figures 6 and 7, and a page of them.

    python launch/visualize.py --init runs/imagenet1k-b16 --out inside                      # filters and positions
    python launch/visualize.py --init runs/imagenet1k-b16 --images photos/ --out inside     # attention as well

Exit status: 0 done, 2 when what was given is at fault.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root, not launch/, where pretrain.py hides pretrain

import argparse

from pretrain import files, load_weights
from pretrain.console import say
from pretrain.ranks.command import DONE, Parser, run_command
from pretrain.storage.location import local_path


def main() -> int:
    args = parser().parse_args()
    from finetune.inside.examples import find_examples
    from finetune.inside.page import write
    from finetune.inside.view import EXAMPLES, look_inside

    weights = load_weights(args.init, averaged=args.weights == "averaged")
    examples = find_examples(args.images, EXAMPLES) if args.images else None
    out = local_path(args.out)
    files.make_folder(out)
    view = look_inside(weights, examples)
    page = write(view, out)
    if view.attention is None:
        say("note: no --images: attention distance and rollout need some; filters and positions are drawn")
    else:
        say(f"attention over {len(view.attention.seen):,} of {view.attention.found:,} images")
    say(f"page: {page}")
    return DONE


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="launch/visualize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = main.add_argument
    add(
        "--init",
        required=True,
        metavar="WEIGHTS",
        help="a run folder, a checkpoint inside one, or a file or URL of any known format",
    )
    kinds = "as trained (the default), or their Polyak average"
    add("--weights", choices=("raw", "averaged"), default="raw", help=kinds)
    images = "files, folders of images, an INDEX; of more than 128, as many are taken, spread evenly"
    add("--images", nargs="+", metavar="IMAGES", help=images)
    out = "folder for the figures, index.html and inside.json; an earlier look at this place is replaced"
    add("--out", required=True, metavar="DIR", help=out)
    return main


if __name__ == "__main__":
    run_command(main)
