"""A stream that is killed again and again, and resumed on other numbers of ranks and threads.

Every rank's loader runs in this process; `kills.py` and tests/system/test_elastic_command.py kill real runs.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from pretrain.images.transforms import TrainImages
from pretrain.index.index import Index
from pretrain.stream.loader import LoaderOptions, TrainLoader
from pretrain.stream.order import Order

BATCH, STEPS, KILLS, SAVED_EVERY = 24, 300, 50, 4
WORLDS = (1, 2, 4, 3)

Step = tuple[list[int], str]  # ids, hash of the pixels


def killed(shards: Path) -> dict[str, int]:
    """Counts of what came of a run of 300 steps that was killed at 50 random ones, against the undisturbed run."""
    index = Index.open(shards)
    order = Order(index.samples, BATCH, seed=0)
    draw = random.Random(0)
    trained: list[Step] = []
    saved, again = 0, 0
    for number, kill in enumerate([*sorted(draw.sample(range(1, STEPS), KILLS)), STEPS]):
        again += len(trained) - saved
        del trained[saved:]
        with closing(_steps(index, order, saved, WORLDS[number % len(WORLDS)], draw.randint(1, 3))) as steps:
            while len(trained) < kill:
                trained.append(next(steps))
                if len(trained) % SAVED_EVERY == 0:
                    saved = order.check(json.loads(json.dumps(order.state(index.hash, len(trained)))), index.hash)
    with closing(_steps(index, order, 0, 1, 1)) as steps:
        undisturbed = [next(steps) for _ in range(STEPS)]
    expected = Counter((x // index.samples, u) for x, u in enumerate(u for ids, _ in undisturbed for u in ids))
    found = Counter((x // index.samples, u) for x, u in enumerate(u for ids, _ in trained for u in ids))
    return {
        "kills": KILLS,
        "steps trained again": again,
        "samples": STEPS * BATCH,
        "lost": (expected - found).total(),
        "duplicated": (found - expected).total(),
        "out of order": sum(ids != order.ids(step).tolist() for step, (ids, _) in enumerate(trained)),
        "steps of other pixels": sum(one != other for one, other in zip(trained, undisturbed, strict=True)),
        "hash of (step, ids, pixels) equal": int(_fingerprint(trained) == _fingerprint(undisturbed)),
    }


def _steps(index: Index, order: Order, start: int, world: int, workers: int) -> Generator[Step, None, None]:
    """The global batches from a step on, all ranks' parts joined."""
    images, share = TrainImages(32, 3, seed=0), BATCH // world
    loaders = [
        TrainLoader(index, order, images, LoaderOptions(rank, world, workers), micro_batch=share, start_step=start)
        for rank in range(world)
    ]
    try:
        while True:
            parts = [next(loader) for loader in loaders]
            pixels = hashlib.sha256(b"".join(part.images.numpy().tobytes() for part in parts)).hexdigest()
            yield [u for part in parts for u in part.ids.tolist()], pixels
    finally:
        for loader in loaders:
            loader.close()


def _fingerprint(steps: list[Step]) -> str:
    return hashlib.sha256(json.dumps(list(enumerate(steps))).encode()).hexdigest()
