"""Frozen features of a network: every image once, on all ranks, in id order on rank 0."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.images.transforms import SquashImages, to_float
from pretrain.index.index import Index
from pretrain.progress import Progress
from pretrain.ranks.collectives import World, all_gather_list, any_rank, gather_rows, require_same
from pretrain.storage.retry import Timeouts
from pretrain.stream.fault import Fault, first_fault
from pretrain.stream.loader import Batch, LoaderOptions, evaluation_batches

IMAGES = "images"  # beside the layers: digests of the images


def extract(
    model: nn.Module,
    index: Index,
    ids: NDArray[np.int64],
    *,
    layers: Sequence[str],
    image_size: int,
    channels: int,
    batch: int,
    workers: int,
    world: World,
    timeouts: Timeouts | None = None,
    doing: str = "features",
    unreadable: list[Fault] | None = None,
) -> dict[str, NDArray[Any]] | None:
    """Features of canonical `ids` [n] by layer, fp32 [n, ·] in that order; None but on rank 0. Collective.

    Under IMAGES it also returns a digest of each image's pixels, int64 [n]: equal images are known by it in whatever
    shards they lie. It is −1 for an image that does not decode.

    `model(images, features=True)` must return the layers; images are squashed and centre-cropped to
    `image_size` (`SquashImages`), fp32 in [-1, 1]. The network computes in the type of its weights; fp32 is fp32, with
    no TF32 in its products (`exact_float32`). The last batches are padded to `batch`, so every image is
    computed in the same place of the same shape of batch: bit-equal for any number of ranks. Another `batch`
    may change the last digits, as matrix products of another shape do.

    Images that do not decode are added to the list `unreadable`, those of all ranks on every rank, and seen as grey.
    Without that list they raise InputError, as a chunk that cannot be read always does (StorageError: for now, after
    `timeouts` where it is remote); the same on every rank.
    """
    require_same(index.hash, f"{doing}: the index")
    found: dict[str, NDArray[Any]] = {IMAGES: np.empty(len(ids), np.int64)}
    done = 0
    batches = evaluation_batches(
        index,
        SquashImages(image_size, channels),
        LoaderOptions(
            world.rank,
            world.size,
            workers,
            unreadable_chunks="stop",
            pin=world.device.type != "cpu",
            timeouts=timeouts,
        ),
        batch=batch,
        ids=ids,
    )
    grey: list[Fault] = []
    training = model.training
    model.eval()
    # Not inference_mode: under ZeRO-3 the parameters gathered inside would be unfit for training afterwards.
    with (
        batches,
        torch.no_grad(),
        exact_float32(),
        Progress(doing, "images", len(ids) if world.main else 0) as progress,
    ):
        for part in batches:
            refused = [fault for fault in part.faults if fault.of_chunk or unreadable is None]
            if any(any_rank(world.device, bool(refused))):
                fault = first_fault(all_gather_list([replace(one, reason=one.describe(index)) for one in refused]))
                raise fault.error(f"{doing}: ", "" if fault.passing else "; mend it or leave it out")
            grey += part.faults
            images = to_float(part.images.to(world.device, non_blocking=True), torch.float32)
            features = model(images, features=True)
            rows = gather_rows(torch.cat([features[layer].float() for layer in layers], dim=1))
            told = gather_rows(torch.stack([torch.from_numpy(part.ids), _digests(part)], dim=1).to(world.device))
            if rows is None or told is None:
                continue
            owners, digests = told.unbind(dim=1)
            real = owners >= 0
            taken = ids[done : done + int(real.sum())]
            if not np.array_equal(owners[real].cpu().numpy(), taken):
                raise RuntimeError(f"features came out of order at image {done}")
            widths = [features[layer].shape[1] for layer in layers]
            for layer, values in zip(layers, rows[real].cpu().split(widths, dim=1), strict=True):
                if layer not in found:
                    found[layer] = np.empty((len(ids), values.shape[1]), np.float32)
                found[layer][done : done + len(taken)] = values.numpy()
            found[IMAGES][done : done + len(taken)] = digests[real].cpu().numpy()
            done += len(taken)
            progress.advance(len(taken))
    model.train(training)
    if unreadable is not None:
        unreadable += all_gather_list(grey)
    return found if world.main else None


def again(query: NDArray[np.int64], support: NDArray[np.int64]) -> int:
    """How many query images are support images, given the digests of both."""
    return int((np.isin(query, support) & (query >= 0)).sum())


def _digests(batch: Batch) -> Tensor:
    """int64 [b] of uint8 images [b, c, h, w]: 63 bits, so that equal ones are no accident among any number."""
    rows = batch.images.contiguous().numpy()
    digests = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") >> 1 for row in rows]
    return torch.tensor(digests).where(batch.valid, -1)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, products of fp32 numbers are computed in fp32: in no TF32, which cuDNN's convolutions use unless told
    otherwise, and in no bf16, which oneDNN may.
    """
    backends: Any = torch.backends  # parts of which type checkers do not see
    parts: list[Any] = []
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        parts = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        parts += [backends.mkldnn.matmul, backends.mkldnn.conv]
    # The older switches too: torch raises where it finds the two kinds in contradiction.
    matmul = _unless_mixed(torch.get_float32_matmul_precision)
    convolution = _unless_mixed(lambda: backends.cudnn.allow_tf32)
    before = [part.fp32_precision for part in parts]
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            backends.cudnn.allow_tf32 = convolution
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


def _unless_mixed(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # the newer switches are set, and these say nothing
        return None


def preprocessing(image_size: int) -> str:
    """In words, what `extract` does to an image."""
    squashed = (16 * image_size + 7) // 14
    return (
        f"squash to {squashed}x{squashed} (bilinear, half-pixel centres, no antialias, uint8), "
        f"centre crop {image_size}x{image_size}, to [-1, 1]"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32", "bfloat16", …"""
    return str(dtype).removeprefix("torch.")
