"""Shards: made from a data set, indexed, checked, looked into.

    python launch/shards.py build mnist5k data/mnist5k        # a data set → shuffled shards and their index
    python launch/shards.py index data/shards                 # existing shards → their index
    python launch/shards.py index s3://bucket/train/ --out train.vfi    # … in an object store (https, s3, gs)
    python launch/shards.py verify data/shards                # read, compare and decode everything
    python launch/shards.py stats data/shards --html set.html # samples, classes, image sizes; a page of them
    python launch/shards.py order data/shards --global-batch 256 --seed 0 --steps 0:3
    python launch/shards.py locate data/shards 1234           # shard, key, byte and label of one sample

An INDEX is an index file, or a folder of shards that holds one (index.vfi); several are concatenated, as in a
config. Exit status: 0 done, 2 when the input is at fault.
"""

import sys
from pathlib import Path

# The repository's root, not launch/, where pretrain.py would shadow the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
from collections.abc import Callable
from typing import Any

from pretrain.console import deliver, say
from pretrain.ranks.command import DONE, Parser, run_command

# A command imports what it needs itself: --help waits for nothing, and `order` not for torch.


def build(args: argparse.Namespace) -> int:
    """Write a data set as WebDataset tars, shuffled over the whole set, with their index. The same source, split and
    options give the same bytes; a folder that holds them already is left as it is. Image files are JPEG, PNG, WebP,
    BMP, GIF, PPM or TIFF of at most 100 million pixels; each is decoded once.
    """
    from pretrain.datasets.sources import open_source
    from pretrain.shards.write import ShardLayout, unreadable_note, write_shards

    layout = ShardLayout(seed=args.seed, bytes=args.shard_bytes, samples=args.shard_samples)
    data = open_source(args.source, args.split, args.cache)
    path, written = write_shards(data, args.folder, layout, skip_unreadable=args.skip_unreadable)
    say_summary(path, f"{data.name}, split {data.split}:" if written else "already built:")
    if note := unreadable_note(path.parent):
        say(note)
    return DONE


def index(args: argparse.Namespace) -> int:
    """Read WebDataset tars, local ones whole, and write their index. Every sample needs one image (jpg, jpeg, png,
    webp) and a label: .cls with one integer, or .json with a list of integers. The first fault ends it, named by shard,
    sample and byte, and no index is written. Shards in object stores are read where they are; credentials come from
    AWS_* and GOOGLE_* variables alone.
    """
    from pretrain.shards.scan import index_shards

    options = {name: getattr(args, name) for name in ("base", "num_classes", "content", "workers")}
    say_summary(index_shards(args.shards, args.out, **options), "indexed:")
    return DONE


def say_summary(path: Path, what: str) -> None:
    from pretrain.index.index import Index
    from pretrain.shards.survey import summary

    found = Index.open(path)
    say(f"{what} {summary(found)}")
    say(f"{path}  {found.hash}")
    if unhashed := found.unhashed():
        say(f"note: content of the shards: {unhashed}", to=sys.stderr)


def verify(args: argparse.Namespace) -> int:
    """Read every shard whole and compare size, sha256 or etag, members, keys and labels with the index; decode every
    image. Lists the faults and ends with status 2 if there are any. A remote shard is copied to TMPDIR while it is
    checked.
    """
    from pretrain.index.index import Index
    from pretrain.shards.verify import verify

    say(verify(Index.open(args.index), workers=args.workers).text())
    return DONE


def stats(args: argparse.Namespace) -> int:
    """Figures of an index; with --html also a page with charts of them and a contact sheet of samples."""
    from pretrain.index.index import Index
    from pretrain.shards.survey import survey, survey_text

    if args.html:
        from pretrain.page.page import check_target
        from pretrain.shards.page import dataset_page

        check_target(args.html)  # now, not after minutes of counting
    found = survey(Index.open(args.index), args.images)
    if args.html:
        dataset_page(found).write(args.html)
    figures = found.figures()
    deliver([json.dumps(figures) if args.json else survey_text(figures)])
    if args.html:
        say(f"written: {args.html}", to=sys.stderr if args.json else sys.stdout)
    return DONE


def order(args: argparse.Namespace) -> int:
    """One JSON line a step: {"step": t, "ids": […]}, the canonical ids in batch order, as a run with this global batch
    and seed trains on them, on any number of ranks.
    """
    from pretrain.index.index import Index
    from pretrain.stream.heldout import hold_out
    from pretrain.stream.order import Order

    index = Index.open(args.index)
    trained = hold_out(index, args.held_out)[0] if args.held_out else None
    samples = index.samples if trained is None else len(trained)
    sequence = Order(samples, args.global_batch, args.seed, chunk=args.chunk, lanes=args.lanes)
    steps = ((step, sequence.ids(step)) for step in args.steps)
    deliver(json.dumps({"step": t, "ids": (ids if trained is None else trained[ids]).tolist()}) for t, ids in steps)
    return DONE


def locate(args: argparse.Namespace) -> int:
    """JSON: shard, key, byte offset and label of the sample with canonical id ID (0 … samples-1)."""
    from pretrain.index.index import Index
    from pretrain.shards.survey import locate

    deliver([json.dumps(locate(Index.open(args.index), args.id))])
    return DONE


def step_range(text: str) -> range:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) <= int(end)):
        raise argparse.ArgumentTypeError(f"{text!r}: steps are A:B, meaning A ≤ t < B, counted from 0; e.g. 0:10")
    return range(int(first), int(end))


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a share from 0 to below 1 would be right")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on would be right")
    return int(text)


def parser() -> argparse.ArgumentParser:
    main = Parser(
        prog="python launch/shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(run.__name__, help=help, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    command = add(build, "a data set → shuffled shards and their index")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images (FOLDER/<class>/*.jpg, or FOLDER/<split>/<class>/*.jpg, or with a labels.json that "
        "lists labels per file; pretrain/datasets/folder.py shows all forms), a published set as its archive unpacks "
        "(Tiny-ImageNet, ImageNet, Places365, SUN397, iNaturalist, Pets, Flowers, CIFAR), mnist5k, digits, "
        "fashion-mnist, cifar10, cifar100, flowers, pets, or imagenet:FOLDER",
    )
    command.add_argument("folder", metavar="DIR", help="where the shards go; made if missing")
    command.add_argument(
        "--split",
        help="part of the source (default: train): train, val, all (mnist5k); train, test, all (digits); "
        "train, test (fashion-mnist, cifar10, cifar100); train, val, test (flowers); trainval, test (pets); "
        "train, val (imagenet); the folder's own, in any usual spelling",
    )
    command.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    add_count(command, "--shard-bytes", "most bytes of samples a shard (default: 268435456)", default=256 << 20)
    add_count(command, "--shard-samples", "most samples a shard (default: 10000)", default=10_000)
    command.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out files that cannot be read, and list them in DIR/unreadable.txt; without it they end the build",
    )
    command.add_argument("--cache", metavar="DIR", help="where downloads are kept (default: ~/.cache/vit-foundry)")

    command = add(index, "existing shards → their index")
    command.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, patterns ('shard-{000..009}.tar', 'train/*.tar'), or folders of tars; also http(s)://, s3:// and "
        "gs:// URLs (http folders cannot be listed)",
    )
    command.add_argument("--out", metavar="FILE", help="the index (default: index.vfi beside local shards)")
    command.add_argument(
        "--base",
        metavar="URL",
        help="record the shards as lying in the folder at URL, by their file names: an index for their upload",
    )
    add_count(command, "--num-classes", "refuse labels outside 0 … N-1")
    content = command.add_mutually_exclusive_group()
    content.add_argument(
        "--sha256",
        dest="content",
        action="store_true",
        default=None,
        help="read remote shards whole too, as local ones are: the index's hash then stands for the images as well, "
        "and is the same wherever copies of the shards lie",
    )
    content.add_argument(
        "--headers-only",
        dest="content",
        action="store_false",
        default=None,
        help="read no shard whole, only headers and labels: faster, but the hash then does not know the images",
    )
    add_count(command, "--workers", "processes (default: by cores and shards)")

    command = add(verify, "full check of an index against its shards")
    add_index(command)
    add_count(command, "--workers", "processes (default: by cores and shards)")

    command = add(stats, "samples, bytes, classes, image sizes, as figures or as a page to look at")
    add_index(command)
    command.add_argument("--json", action="store_true", help="as JSON")
    add_count(command, "--images", "decode N images, spread evenly, for their sizes (default: 1000)", default=1000)
    command.add_argument("--html", type=Path, metavar="OUT", help="write a page that needs no other file")

    command = add(order, "which samples each training step takes")
    add_index(command)
    add_count(command, "--global-batch", "samples a step", required=True)
    command.add_argument("--seed", type=int, required=True, metavar="S", help="the run's seed")
    command.add_argument("--steps", type=step_range, required=True, metavar="A:B", help="steps A ≤ t < B, from 0")
    add_count(command, "--chunk", "samples read together (default: 8)", default=8)
    add_count(command, "--lanes", "lanes (default: by samples and global batch)")
    command.add_argument(
        "--held-out", type=share, default=0.0, metavar="SHARE", help="the run's data.held_out (default: 0)"
    )

    command = add(locate, "where one sample lies")
    add_index(command)
    command.add_argument("id", type=int, metavar="ID", help="canonical id")
    return main


def add_index(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "index",
        nargs="+",
        metavar="INDEX",
        help="an index file, or a folder of shards that holds one; several are concatenated",
    )


def add_count(command: argparse.ArgumentParser, name: str, help: str, **options: Any) -> None:
    command.add_argument(name, type=positive, metavar="N", help=help, **options)


def main() -> int:
    args = parser().parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    run_command(main)
