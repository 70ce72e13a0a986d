"""Shards: made from a data set, indexed, checked, looked into.

    python launch/shards.py build mnist5k data/mnist5k        # a data set → shuffled shards and their index
    python launch/shards.py index data/shards                 # shards that exist already → their index
    python launch/shards.py index s3://bucket/train/ --out train.vfi    # … in an object store (https, s3, gs)
    python launch/shards.py verify data/shards                # read, compare and decode everything
    python launch/shards.py stats data/shards --html set.html # samples, classes, image sizes; a page of them
    python launch/shards.py order data/shards --global-batch 256 --seed 0 --steps 0:3
    python launch/shards.py locate data/shards 1234           # shard, key, byte and label of one sample

An INDEX is an index file, or a folder of shards that holds one (index.vfi); several are concatenated, as in a
config. Exit status: 0 done, 2 when what was given is at fault.
"""

import sys
from pathlib import Path

# The repository's root, not launch/, where pretrain.py would shadow the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json

from pretrain.console import deliver, say
from pretrain.index.index import Index
from pretrain.run.command import DONE, Parser, run_command

# A command imports what else it needs itself: webdataset brings torch, two seconds that `order` can spare.


def build(args: argparse.Namespace) -> int:
    from pretrain.datasets.sources import open_source
    from pretrain.shards.write import UNREADABLE_NAME, ShardLayout, write_shards

    layout = ShardLayout(seed=args.seed, bytes=args.shard_bytes, samples=args.shard_samples)
    data = open_source(args.source, args.split, args.cache)
    path, written = write_shards(data, args.folder, layout, skip_unreadable=args.skip_unreadable)
    _summary(path, f"{data.name}, split {data.split}:" if written else "already built:")
    listing = path.with_name(UNREADABLE_NAME)
    if listing.exists():
        say(f"without {len(listing.read_bytes().splitlines()):,} files that cannot be read: {listing}")
    return DONE


def index(args: argparse.Namespace) -> int:
    from pretrain.shards.scan import index_shards

    path = index_shards(
        args.shards,
        args.out,
        base=args.base,
        num_classes=args.num_classes,
        content=args.content,
        workers=args.workers,
    )
    _summary(path, "indexed:")
    return DONE


def _summary(path: Path, what: str) -> None:
    found = Index.open(path)
    labels = f"lists of up to {found.longest} labels" if found.multilabel else "one label each"
    counts = f"{found.samples:,} samples, {found.num_classes:,} classes, {labels}"
    say(f"{what} {counts}; shards: {len(found.shards):,}")
    say(f"{path}  {found.hash}")
    if unhashed := found.unhashed():
        say(f"note: content of the shards: {unhashed}", to=sys.stderr)


def verify(args: argparse.Namespace) -> int:
    from pretrain.shards.verify import verify

    found = verify(Index.open(args.index), workers=args.workers)
    say(f"in order: {found.samples:,} samples, {found.bytes:,} bytes; shards: {found.shards:,}")
    if found.without_digest:
        say(
            f"note: no sha256 or etag is recorded of {found.without_digest:,} shards: other images of the same sizes "
            "would have passed (index without --headers-only records sha256)"
        )
    return DONE


def stats(args: argparse.Namespace) -> int:
    from pretrain.shards.survey import survey, survey_text

    if args.html:
        from pretrain.page.page import check_target
        from pretrain.shards.page import dataset_page

        check_target(args.html)  # now, not after minutes of counting
    found = survey(Index.open(args.index), args.images)
    figures = found.figures()
    if args.html:
        dataset_page(found).write(args.html)
    deliver([json.dumps(figures) if args.json else survey_text(figures)])
    if args.html:
        say(f"written: {args.html}", to=sys.stderr if args.json else sys.stdout)
    return DONE


def order(args: argparse.Namespace) -> int:
    from pretrain.stream.order import Order

    first, end = args.steps
    samples = Index.open(args.index).samples
    sequence = Order(samples, args.global_batch, args.seed, chunk=args.chunk, lanes=args.lanes)
    deliver(json.dumps({"step": step, "ids": sequence.ids(step).tolist()}) for step in range(first, end))
    return DONE


def locate(args: argparse.Namespace) -> int:
    from pretrain.shards.survey import locate

    deliver([json.dumps(locate(Index.open(args.index), args.id))])
    return DONE


def step_range(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) <= int(end)):
        raise argparse.ArgumentTypeError(f"{text!r}: steps are A:B, meaning A ≤ t < B, counted from 0; e.g. 0:10")
    return int(first), int(end)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on would be right")
    return int(text)


def index_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "index",
        nargs="+",
        metavar="INDEX",
        help="an index file, or a folder of shards that holds one; several are concatenated",
    )


def parser() -> argparse.ArgumentParser:
    main = Parser(
        prog="python launch/shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    make = commands.add_parser(
        "build",
        help="a data set → shuffled shards and their index",
        description="Write a data set as WebDataset tars, shuffled over the whole set, with their index. The "
        "same source, split and options give the same bytes; a folder that holds them already is left as it "
        "is. Image files are JPEG, PNG, WebP, BMP, GIF, PPM or TIFF of at most 100 million pixels; each is decoded "
        "once.",
    )
    make.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images (FOLDER/<class>/*.jpg, or FOLDER/<split>/<class>/*.jpg, or with a labels.json that "
        "lists labels per file; pretrain/datasets/folder.py shows all forms), a published set as its archive unpacks "
        "(Tiny-ImageNet, Places365, Pets, Flowers, CIFAR), mnist5k, digits, fashion-mnist, cifar10, cifar100, flowers, "
        "pets, or imagenet:FOLDER",
    )
    make.add_argument("folder", metavar="DIR", help="where the shards go; made if missing")
    make.add_argument(
        "--split",
        help="part of the source (default: train): train, val, all (mnist5k); train, test, all (digits); "
        "train, test (fashion-mnist, cifar10, cifar100); train, val, test (flowers); trainval, test (pets); "
        "train, val (imagenet); the folder's own, in any usual spelling",
    )
    make.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    make.add_argument(
        "--shard-bytes",
        type=positive,
        default=256 << 20,
        metavar="N",
        help="most bytes of samples a shard (default: 268435456)",
    )
    make.add_argument(
        "--shard-samples",
        type=positive,
        default=10_000,
        metavar="N",
        help="most samples a shard (default: 10000)",
    )
    make.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out files that cannot be read, and list them in DIR/unreadable.txt; without it they end the build",
    )
    make.add_argument("--cache", metavar="DIR", help="where downloads are kept (default: ~/.cache/vit-foundry)")
    make.set_defaults(run=build)

    scan = commands.add_parser(
        "index",
        help="existing shards → their index",
        description="Read WebDataset tars, local ones whole, and write their index. Every sample "
        "needs one image (jpg, jpeg, png, webp) and a label: .cls with one integer, or .json with a list of "
        "integers. The first fault ends it, named by shard, sample and byte, and no index is written. Shards in "
        "object stores are read where they are; credentials come from AWS_* and GOOGLE_* variables alone.",
    )
    scan.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, patterns ('shard-{000..009}.tar', 'train/*.tar'), or folders of tars; also http(s)://, s3:// and "
        "gs:// URLs (http folders cannot be listed)",
    )
    scan.add_argument("--out", metavar="FILE", help="the index (default: index.vfi beside local shards)")
    scan.add_argument(
        "--base",
        metavar="URL",
        help="record the shards as lying in the folder at URL, by their file names: an index for their upload",
    )
    scan.add_argument("--num-classes", type=positive, metavar="K", help="refuse labels outside 0 … K-1")
    how = scan.add_mutually_exclusive_group()
    how.add_argument(
        "--sha256",
        dest="content",
        action="store_const",
        const=True,
        help="read remote shards whole too, as local ones are: the index's hash then stands for the images as well, "
        "and is the same wherever copies of the shards lie",
    )
    how.add_argument(
        "--headers-only",
        dest="content",
        action="store_const",
        const=False,
        help="read no shard whole, only headers and labels: faster, but the hash then does not know the images",
    )
    scan.add_argument("--workers", type=positive, metavar="N", help="processes (default: by cores and shards)")
    scan.set_defaults(run=index)

    check = commands.add_parser(
        "verify",
        help="full check of an index against its shards",
        description="Read every shard whole and compare size, sha256 or etag, members, keys and labels with the "
        "index; decode every image. Lists the faults and ends with status 2 if there are any. A remote shard is "
        "copied to TMPDIR for as long as it is looked at.",
    )
    index_argument(check)
    check.add_argument("--workers", type=positive, metavar="N", help="processes (default: by cores and shards)")
    check.set_defaults(run=verify)

    figures = commands.add_parser(
        "stats",
        help="samples, bytes, classes, image sizes, as figures or as a page to look at",
        description="Figures of an index; with --html also charts of them and a contact sheet of samples.",
    )
    index_argument(figures)
    figures.add_argument("--json", action="store_true", help="as JSON")
    figures.add_argument(
        "--images",
        type=positive,
        default=1000,
        metavar="N",
        help="decode N images, spread evenly, for their sizes (default: 1000)",
    )
    figures.add_argument("--html", type=Path, metavar="OUT", help="write a page that needs no other file")
    figures.set_defaults(run=stats)

    sequence = commands.add_parser(
        "order",
        help="which samples each training step takes",
        description='One JSON line a step: {"step": t, "ids": […]}, the canonical ids in batch order, as a '
        "run with this global batch and seed trains on them, on any number of ranks.",
    )
    index_argument(sequence)
    sequence.add_argument("--global-batch", type=positive, required=True, metavar="B", help="samples a step")
    sequence.add_argument("--seed", type=int, required=True, metavar="S", help="the run's seed")
    sequence.add_argument("--steps", type=step_range, required=True, metavar="A:B", help="steps A ≤ t < B, from 0")
    sequence.add_argument("--chunk", type=positive, default=8, metavar="G", help="samples read together (default: 8)")
    sequence.add_argument("--lanes", type=positive, metavar="V", help="lanes (default: by N and B)")
    sequence.set_defaults(run=order)

    place = commands.add_parser(
        "locate",
        help="where one sample lies",
        description="JSON: shard, key, byte offset and label of the sample with canonical id ID (0 … samples-1).",
    )
    index_argument(place)
    place.add_argument("id", type=int, metavar="ID", help="canonical id")
    place.set_defaults(run=locate)
    return main


def main() -> int:
    args = parser().parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    run_command(main)
