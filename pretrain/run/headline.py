"""The first lines of a run: what is trained, on what, by whom."""

from __future__ import annotations

from math import ceil, log2

from pretrain.plan.peak import unlisted
from pretrain.run.setup import Setup


def headline(setup: Setup, start: int, origin: str) -> str:
    """Of a run that starts after `start` steps; `origin` tells from which weights."""
    config, index, recipe, layout = setup.config, setup.index, setup.recipe, setup.recipe.layout
    spec, device = config.model.spec(), setup.world.device
    epochs = recipe.steps * layout.global_batch / index.samples
    lines = [
        f"{config.name}: {'; '.join(filter(None, (spec.near(), spec.describe(), origin)))}",
        f"data: {index.samples:,} samples in {len(index.shards):,} shards; steps {start:,} to {recipe.steps:,}, "
        f"{epochs:.4g} epochs",
        f"batch {layout.global_batch} = {layout.ranks} ranks × {layout.accumulation} accumulation × micro-batch "
        f"{layout.micro_batch}; {str(recipe.dtype).removeprefix('torch.')}, ZeRO {config.deepspeed.stage}, "
        f"{device.type}",
    ]
    if unhashed := index.unhashed():
        lines.append(f"note: content of the shards: {unhashed}")
    lines += [f"note: {note}" for note in setup.notes]
    if short := _short_read_ahead(setup):
        lines.append(f"note: {short}")
    if config.logging.peak_tflops is None:
        lines += unlisted(device, recipe.dtype)
    return "\n".join(lines)


def _short_read_ahead(setup: Setup) -> str:
    """Where a rank's lanes, which all change chunk at about the same time, need more than may be read ahead."""
    order, data = setup.order, setup.config.data
    samples = order.lane_count * order.chunk / setup.world.size
    needed = samples * setup.index.bytes / setup.index.samples / 2**20
    if needed <= data.read_ahead_mib:
        return ""
    return (
        f"{order.lane_count:,} lanes of {order.chunk} samples are {needed:,.0f} MiB a rank; with "
        f"data.read_ahead_mib={data.read_ahead_mib} training may wait each time they change chunk; "
        f"{2 ** ceil(log2(needed))} would do, or fewer data.lanes in a new run"
    )
