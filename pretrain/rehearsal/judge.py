"""From figures to findings: what was measured beside what the run needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.page.text import bytes_text, duration_text, number_text
from pretrain.rehearsal.children import starved
from pretrain.rehearsal.findings import Finding

# Of planned memory, within which a measurement agrees: a share, and bytes where there is next to nothing to plan.
_SLACK, _LITTLE = 0.10, 64 << 20
# A loss that restarts higher is off by far more than another order of additions makes.
_SAME, _ROUNDED, _DROPPED = 1e-4, 2e-2, 0.25  # relative: fp32; half precision; other dropout masks
_LESS_MEMORY = (
    "a smaller train.micro_batch, train.activation_checkpointing or a higher ZeRO stage "
    "(python launch/plan.py names what fits)"
)

Figures = Mapping[str, Any]
Losses = Mapping[int, float]  # by steps completed


@dataclass(frozen=True)
class Limits:
    """What the real run is held to."""

    grace: float = 30.0  # seconds from the request to stop until the ranks are killed
    live: float = 0.95  # of the rate on a cached batch
    device_memory: int | None = None  # bytes; None: what the device has


def planned_memory(figures: Figures, limits: Limits) -> Finding:
    """The plan of a rank's memory against its device."""
    plan = figures["plan"]
    room, needed = _room(figures, limits), plan["total"]
    fits = needed <= room
    parts = ", ".join(
        f"{name} {bytes_text(plan[name])}"
        for name in ("parameters", "gradients", "optimizer", "average", "activations", "buffers")
        if plan[name]
    )
    kept = plan["without_checkpointing"]
    spare = f"train.activation_checkpointing could be off: {bytes_text(kept)}" if needed < kept <= room else ""
    return Finding(
        "memory planned",
        f"{bytes_text(needed)} a rank ({parts})",
        f"at most {bytes_text(room)}, what {figures['device']} has for it",
        "ok" if fits else "fails",
        spare if fits else _LESS_MEMORY,
    )


def worst_step(ranks: Sequence[Figures], limits: Limits, failure: str) -> Finding:
    """Steps on the largest images of the data, and the memory that they took, against device and plan.

    Args:
        ranks: the figures of each rank.
        failure: why a rank ended before; empty: none did.
    """
    known = [rank for rank in ranks if "peak_bytes" in rank]
    if len(known) < len(ranks) or not known:
        change = _LESS_MEMORY if starved(failure) else "what the message names, or the code, before the run is started"
        return Finding("worst-case step", failure, "steps on the largest images", "fails", change)
    figures = max(known, key=lambda rank: rank["peak_bytes"])
    peak, planned, room = figures["peak_bytes"], figures["plan"]["total"], _room(figures, limits)
    over = peak > planned + max(_SLACK * planned, _LITTLE)
    seen = (
        f"peak {bytes_text(peak)}, {peak / planned - 1:+.0%} of the plan; {_seconds(figures['step_seconds'])} a step; "
        f"images up to {bytes_text(max(rank['largest_bytes'] for rank in known))}, a micro-batch of them loaded in "
        f"{_seconds(max(rank['largest_seconds'] for rank in known))}"
    )
    needed = f"at most {bytes_text(room)}"
    unreadable = [fault for rank in known for fault in rank["unreadable"]]
    if peak > room:
        return Finding("worst-case step", seen, needed, "fails", _LESS_MEMORY)
    if unreadable:
        return Finding("worst-case step", seen, needed, "note", f"cannot be read: {unreadable[0]}")
    change = f"the peak is beyond the plan of {bytes_text(planned)}: leave so much more room" if over else ""
    return Finding("worst-case step", seen, needed, "note" if over else "ok", change)


def loader(ranks: Sequence[Figures], limits: Limits) -> Finding:
    """Training on what the loader gives against training on one batch that is at hand."""
    live, cached = (ranks[0][f"{kind}_images_per_second"] for kind in ("live", "cached"))
    share, wait = live / cached, max(rank["data_wait"] for rank in ranks)
    alone = len(ranks) * min(rank.get("loader_images_per_second", math.inf) for rank in ranks)
    seen = (
        f"{number_text(live)} images/s, {share:.0%} of {number_text(cached)} on a cached batch; data wait {wait:.0%}"
        + (f"; the loader alone {number_text(alone)}" if math.isfinite(alone) else "")
    )
    needed = f"at least {limits.live:.0%} of the cached batch"
    if share >= limits.live:
        return Finding("loader", seen, needed, "ok")
    workers = ranks[0]["workers"]
    if alone < 1.2 * cached:
        more = math.ceil(1.3 * workers * cached / alone)
        change = (
            f"the loader alone is no faster: data.workers={more} where the host has the cores (now {workers}), smaller "
            "images in the shards, faster storage (see there)"
        )
    else:
        change = (
            "the loader alone is fast enough, so it takes the trainer's cores: more cores a rank, or fewer data.workers"
        )
    return Finding("loader", seen, needed, "fails", change)


def storage(ranks: Sequence[Figures]) -> Finding:
    """What storage gives all ranks at once against what training at the cached rate reads."""
    figures = ranks[0]
    given, requests = (sum(rank[f"{what}_per_second"] for rank in ranks) for what in ("read_bytes", "requests"))
    needed = figures["cached_images_per_second"] * figures["sample_bytes"]
    asked = figures["cached_images_per_second"] * figures["requests_per_image"]
    return Finding(
        "storage",
        f"{bytes_text(given)}/s in {number_text(requests)} requests/s, all ranks reading",
        f"{bytes_text(needed)}/s in {number_text(asked)} requests/s",
        "ok" if given >= needed else "fails",
        "" if given >= needed else "shards nearer to the ranks, larger images' shards resized, or a larger data.chunk",
    )


def save(seconds: float, checkpoint: int, room: int, copies: int) -> Finding:
    """A checkpoint's time and size, and whether the disk holds as many as there are at a time.

    Args:
        room: bytes that were free before anything was saved.
        copies: checkpoints that the disk holds at a time.
    """
    needed = copies * checkpoint
    fits = room >= needed
    return Finding(
        "save",
        f"{bytes_text(checkpoint)} in {_seconds(seconds)} ({bytes_text(checkpoint / max(seconds, 1e-3))}/s); "
        f"{bytes_text(room)} free",
        f"room for {copies} checkpoints at a time: {bytes_text(needed)}",
        "ok" if fits else "fails",
        "" if fits else "room on the disk of --out, a smaller checkpoint.keep, or another disk",
    )


def continued(part: str, reference: Losses, found: Losses, *, half: bool, dropped: bool) -> Finding:
    """The losses of steps made again after a restore against those of the run that was not killed yet.

    Args:
        half: whether the network computes in half precision.
        dropped: whether the steps were made with other dropout masks, which are drawn for each rank.
    """
    steps = sorted(reference.keys() & found.keys())
    tolerance = _DROPPED if dropped else _ROUNDED if half else _SAME
    apart = max((abs(found[step] / reference[step] - 1) for step in steps if reference[step]), default=math.nan)
    good = apart <= tolerance
    return Finding(
        part,
        f"resumed; losses of steps {steps[0]} to {steps[-1]} differ by {apart:.1e} of their value"
        if steps
        else "resumed",
        f"the losses of the run that was not killed, within {tolerance:g}",
        "ok" if good else "fails",
        "" if good else "do not start: a resume would not continue this run",
    )


def grace(seconds: float, step: float, saving: float, ended: Sequence[int | None], limits: Limits) -> Finding:
    """From SIGTERM to the end of the last rank.

    Args:
        seconds: as seen.
        step, saving: of a whole step and of a save, which the signal may come just after the beginning of.
        ended: the ranks' exit statuses, all 75 where they stopped with a checkpoint.
    """
    worst, needed = seconds + step + saving, f"at most {limits.grace:g} s, with a checkpoint"
    if set(ended) != {75}:
        statuses = ", ".join(sorted({str(status) for status in ended}))
        return Finding(
            "signal", f"status {statuses} after {_seconds(seconds)}", needed, "fails", "what the ranks' log names"
        )
    seen = f"{_seconds(seconds)} to status 75; {_seconds(worst)} where a step and a save had just begun"
    if worst <= limits.grace:
        return Finding("signal", seen, needed, "ok")
    ask = math.ceil(1.5 * worst)
    change = (
        f"a longer grace period (Slurm: --signal=USR1@{ask}; --grace {ask} here says so), fewer micro-batches a step, "
        "checkpoints on a faster disk"
    )
    return Finding("signal", seen, needed, "fails", change)


def scores(part: str, found: Mapping[str, Any], seconds: float) -> Finding:
    """What an evaluation found, and how long all of it took."""
    broken = [name for name, value in found.items() if value is None or not math.isfinite(value)]
    told = ", ".join(f"{name} {number_text(value)}" for name, value in found.items() if name not in broken)
    return Finding(
        part,
        f"{told or 'nothing'}; all evaluations took {_seconds(seconds)}",
        "finite scores",
        "fails" if broken or not found else "ok",
        f"{', '.join(broken) or 'no score'}: not a number after a few steps; look at the data evaluated"
        * bool(broken or not found),
    )


def _room(figures: Figures, limits: Limits) -> int:
    """Bytes that a rank may take of its device; on a CPU host, which its ranks share, beyond what it takes at rest."""
    whole = limits.device_memory or figures["device_bytes"]
    if figures["resting_bytes"]:
        return max(0, whole // figures["host_ranks"] - figures["resting_bytes"])
    return int(whole)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration_text(seconds)
