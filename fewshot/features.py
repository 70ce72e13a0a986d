"""Feature layers, and how they are computed: every image once, on all ranks, in id order on rank 0."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import nearest
from pretrain.images.transforms import SquashImages, to_float
from pretrain.index.index import Index
from pretrain.model.arithmetic import exact_float32, threads
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.progress import Progress
from pretrain.ranks.collectives import World, all_gather_list, any_rank, gather_rows, require_same
from pretrain.storage.retry import Timeouts
from pretrain.stream.fault import Fault, first_fault
from pretrain.stream.loader import Batch, LoaderOptions, evaluation_batches

IMAGES = "images"  # beside the layers: digests of the images
CLASS_TOKEN = "class_token"
PIXEL_SIDE = 32  # pixels a side, at most, of the pixel baseline
SLICE = 8  # images that a thread of a CPU computes together

# By name: the images [b, c, h, w] in [-1, 1] as IMAGES, what the network returns with `features=True` [b, ·], its
# parameter CLASS_TOKEN where it has one, and the outputs of the submodules that a layer taps.
Outputs = Mapping[str, Tensor]
Source = Literal["trained", "untrained", "none"]


@dataclass(frozen=True)
class Layer:
    """One feature of an image. Those of a network that is not trained are baselines.

    Args:
        name: in configs and reports.
        description: in reports and in `--help`.
        forward: the network's outputs → features [b, d]. A KeyError says that the network has no such layer; it is
            then left out.
        network: whose outputs: the checkpoint's, those of the same network freshly initialised, or nobody's.
        taps: submodules of the network whose outputs `forward` reads too: "blocks.5" → [b, n, width];
            "blocks.-2" is the last but one block.
    """

    name: str
    description: str
    forward: Callable[[Outputs], Tensor]
    network: Source = "trained"
    taps: tuple[str, ...] = ()

    @property
    def baseline(self) -> bool:
        return self.network != "trained"


def pixels(images: Tensor) -> Tensor:
    """[b, c, h, w] → [b, c·s·s], row by row: averaged down to s = PIXEL_SIDE where it is larger, else s = h."""
    side = min(images.shape[-1], PIXEL_SIDE)
    return torch.flatten(F.adaptive_avg_pool2d(images, side) if side < images.shape[-1] else images, 1)


# Another layer is another entry here, and nothing else: configs, reports and help read this table.
LAYERS: dict[str, Layer] = {
    layer.name: layer
    for layer in (
        Layer("tanh", "representation, after tanh", lambda outputs: outputs["tanh"]),
        Layer("pre_tanh", "representation, before tanh", lambda outputs: outputs["pre_tanh"]),
        Layer(
            "cls",
            "class token after the final norm (patch tokens averaged, where the network has no class token)",
            lambda outputs: outputs["cls"],
        ),
        Layer("mean", "patch tokens after the final norm, averaged", lambda outputs: outputs["mean"]),
        Layer(
            "pixels",
            f"baseline: the preprocessed image, averaged down to {PIXEL_SIDE}x{PIXEL_SIDE} where larger",
            lambda outputs: pixels(outputs[IMAGES]),
            network="none",
        ),
        Layer(
            "untrained",
            "baseline: the same network freshly initialised, after tanh (without a head: class token)",
            lambda outputs: outputs["tanh"] if "tanh" in outputs else outputs["cls"],
            network="untrained",
        ),
    )
}


# A block's: counted from 1, or from the end with -1 as the last.
BLOCK = re.compile(r"block(-?[1-9]\d*)_(cls|mean)", re.ASCII)
BLOCK_FORMS = "blockN_cls blockN_mean (block N, from 1; block-1_cls is of the last)"


def find_layer(name: str) -> Layer | None:
    """The layer of that name: an entry of the table, or a block's; None where there is none."""
    if name in LAYERS:
        return LAYERS[name]
    if not (found := BLOCK.fullmatch(name)):
        return None
    number, kind = int(found[1]), found[2]
    tap = f"blocks.{number if number < 0 else number - 1}"
    which = f"block {number}" if number > 0 else "the last block" if number == -1 else f"block {-number} from the end"
    what = "class token (without one: patch tokens averaged)" if kind == "cls" else "patch tokens, averaged,"

    def forward(outputs: Outputs) -> Tensor:
        tokens = outputs[tap]
        if CLASS_TOKEN not in outputs:
            return tokens.mean(dim=1)
        return tokens[:, 0] if kind == "cls" else tokens[:, 1:].mean(dim=1)

    return Layer(name, f"{what} of the residual stream after {which}, before the final norm", forward, taps=(tap,))


def nearest_layer(name: str) -> str | None:
    """The layer whose name `name` is a misspelling of; None where none is near."""
    number = re.search(r"-?[1-9]\d*", name, re.ASCII)
    blocks = [f"block{number[0] if number else 1}_{kind}" for kind in ("cls", "mean")]
    return nearest(name.lower(), [*LAYERS, *blocks])


def layers_of(names: Sequence[str]) -> list[Layer]:
    """The layers of names that `find_layer` knows."""
    return [layer for name in names if (layer := find_layer(name))]


def missing_block(name: str, depth: int) -> bool:
    """Whether `name` is that of a block which a network of `depth` blocks does not have."""
    found = BLOCK.fullmatch(name)
    return found is not None and abs(int(found[1])) > depth


def representation(spec: ViTSpec) -> Layer:
    """The layer that the protocol probes: after tanh where there is a representation head, else the class token."""
    return LAYERS["tanh" if spec.representation_size else "cls"]


def headline(features: Sequence[str]) -> str | None:
    """The feature that leads a network's report: the first that is no baseline; None of baselines alone."""
    return next((layer.name for layer in layers_of(features) if not layer.baseline), None)


def widths(spec: ViTSpec, names: Sequence[str]) -> dict[str, int]:
    """How many numbers each feature has for one image; without those that the network does not have.

    Found by running the network on the meta device, which computes nothing.
    """
    layers, found = layers_of(names), {}
    with torch.device("meta"), torch.no_grad():
        model = VisionTransformer(spec)
        layers = [layer for layer in layers if all(_submodule(model, tap) for tap in layer.taps)]
        images = torch.empty(1, spec.channels, spec.image_size, spec.image_size)
        with _tapped(model, layers) as run:
            outputs = run(images)
        for layer in layers:
            try:
                found[layer.name] = layer.forward(outputs).shape[1]
            except KeyError:
                continue
    return found


def _submodule(model: nn.Module, tap: str) -> nn.Module | None:
    """The submodule that a tap names; None where the network has none of that name."""
    found: Any = model
    try:
        for name in tap.split("."):
            found = found[int(name)] if isinstance(found, nn.ModuleList) else getattr(found, name)
    except (AttributeError, IndexError):
        return None
    return found if isinstance(found, nn.Module) else None


@contextmanager
def _tapped(model: nn.Module | None, layers: Sequence[Layer]) -> Iterator[Callable[[Tensor], Outputs]]:
    """A function of images that returns all that the forwards of `layers` may read; threads may call it at once."""
    kept = threading.local()

    def keep(tap: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: kept.tapped.update({tap: output})

    def run(images: Tensor) -> Outputs:
        kept.tapped = {}
        return {IMAGES: images, **own, **(model(images, features=True) if model else {}), **kept.tapped}

    token = getattr(model, CLASS_TOKEN, None)
    own = {} if token is None else {CLASS_TOKEN: token}

    taps = dict.fromkeys(tap for layer in layers for tap in layer.taps)
    found = {tap: _submodule(model, tap) for tap in taps} if model else {}
    hooks = [module.register_forward_hook(keep(tap)) for tap, module in found.items() if module is not None]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _computing(
    model: nn.Module | None, layers: Sequence[Layer], device: torch.device
) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """A function of images [b, c, h, w] that returns the layers, fp32 [b, ·] each.

    A CPU computes SLICE images on one thread, and as many slices at once as torch has threads: their number then
    changes no digit. Parameters that DeepSpeed partitions (ZeRO-3) are gathered for one slice at a time.
    """
    partitioned = model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    at_once = 1 if partitioned else torch.get_num_threads()
    with exact_float32(), _tapped(model, layers) as run, threads(1), ThreadPoolExecutor(at_once) as pool:

        def compute(images: Tensor) -> list[Tensor]:
            with torch.no_grad():  # not inference_mode: parameters gathered inside would be unfit for training
                outputs = run(images)
                return [layer.forward(outputs).float() for layer in layers]

        def compute_slices(images: Tensor) -> list[Tensor]:
            found = (map if at_once == 1 else pool.map)(compute, images.split(SLICE))
            return [torch.cat(parts) for parts in zip(*found, strict=True)]

        yield compute if device.type != "cpu" else compute_slices


@dataclass(frozen=True)
class Extraction:
    """How features are computed: on which ranks, and how images are read.

    Args:
        spec: of the network: image size and channels.
        batch: images that one rank computes together.
        workers: decode threads per rank.
        timeouts: of remote shards.
    """

    spec: ViTSpec
    batch: int
    workers: int
    world: World
    timeouts: Timeouts | None = None


def extract(
    model: nn.Module | None,
    layers: Sequence[Layer],
    index: Index,
    ids: NDArray[np.int64],
    how: Extraction,
    *,
    doing: str = "features",
    unreadable: list[Fault] | None = None,
) -> dict[str, NDArray[Any]] | None:
    """Features of canonical `ids` [n] by layer, fp32 [n, ·] in that order, on rank 0; else None. Collective.

    Under IMAGES it also returns a digest of each image's pixels, int64 [n]: equal images have equal digests in whatever
    shards they lie. It is −1 for an image that does not decode.

    Images are squashed and centre-cropped (`SquashImages`), fp32 in [-1, 1]. The network computes in the type of its
    weights; fp32 is fp32, with no TF32 in its products (`exact_float32`). The last batches are padded, so each image is
    computed in the same row of the same shape of batch: bit-equal for any number of ranks, and on a CPU of threads.
    Another batch size may change the last digits, as matrix products of another shape do.

    Args:
        model: whose outputs the layers read; None where they read the images alone.
        doing: begins every message.
        unreadable: is extended by the images that do not decode, those of all ranks on every rank; they are then
            computed as grey. None: they raise.

    Raises:
        InputError: an image does not decode, or a chunk cannot be read (StorageError: for now, after `how.timeouts`);
            the same on every rank.
    """
    world = how.world
    require_same(index.hash, f"{doing}: the index")
    found: dict[str, NDArray[Any]] = {IMAGES: np.empty(len(ids), np.int64)}
    done = 0
    batches = evaluation_batches(
        index,
        SquashImages(how.spec.image_size, how.spec.channels),
        LoaderOptions(
            world.rank,
            world.size,
            how.workers,
            unreadable_chunks="stop",
            pin=world.device.type != "cpu",
            timeouts=how.timeouts,
        ),
        batch=how.batch,
        ids=ids,
    )
    grey: list[Fault] = []
    with (
        batches,
        _evaluating(model),
        _computing(model, layers, world.device) as compute,
        Progress(doing, "images", len(ids) if world.main else 0) as progress,
    ):
        for part in batches:
            refused = [fault for fault in part.faults if fault.of_chunk or unreadable is None]
            if any(any_rank(world.device, bool(refused))):
                fault = first_fault(all_gather_list([replace(one, reason=one.describe(index)) for one in refused]))
                raise fault.error(f"{doing}: ", "" if fault.passing else "; mend it or leave it out")
            grey += part.faults
            features = compute(to_float(part.images.to(world.device, non_blocking=True), torch.float32))
            rows = gather_rows(torch.cat(features, dim=1))
            labelled = gather_rows(torch.stack([torch.from_numpy(part.ids), _digests(part)], dim=1).to(world.device))
            if rows is None or labelled is None:
                continue
            owners, digests = labelled.unbind(dim=1)
            real = owners >= 0
            here = slice(done, done + int(real.sum()))
            if not np.array_equal(owners[real].cpu().numpy(), ids[here]):
                raise RuntimeError(f"features came out of order at image {done}")
            split = rows[real].cpu().split([values.shape[1] for values in features], dim=1)
            for layer, values in zip(layers, split, strict=True):
                array = found.setdefault(layer.name, np.empty((len(ids), values.shape[1]), np.float32))
                array[here] = values.numpy()
            found[IMAGES][here] = digests[real].cpu().numpy()
            progress.advance(here.stop - done)
            done = here.stop
    if unreadable is not None:
        unreadable += all_gather_list(grey)
    return found if world.main else None


def count_repeated(query: NDArray[np.int64], support: NDArray[np.int64]) -> int:
    """How many query images are support images too, given the digests of both."""
    return int((np.isin(query, support) & (query >= 0)).sum())


def _digests(batch: Batch) -> Tensor:
    """int64 [b] of uint8 images [b, c, h, w]: 63 bits, so that equal ones are no accident among any number."""
    rows = batch.images.contiguous().numpy()
    digests = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") >> 1 for row in rows]
    return torch.tensor(digests).where(batch.valid, -1)


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    """The network in eval mode, and afterwards in the mode it was in, unless something is raised."""
    training = model is not None and model.training
    if model is not None:
        model.eval()
    yield
    if model is not None:
        model.train(training)


def preprocessing(image_size: int) -> str:
    """A sentence: what `extract` does to an image."""
    squashed = (16 * image_size + 7) // 14
    return (
        f"squash to {squashed}x{squashed} (bilinear, half-pixel centres, no antialias, uint8), "
        f"centre crop {image_size}x{image_size}, to [-1, 1]"
    )
