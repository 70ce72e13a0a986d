"""Loading a checkpoint into an engine with any ranks and ZeRO stage, and reading the values back out to check them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pretrain.checkpoint.pieces import AVERAGE, WEIGHT, Pieces, fingerprint
from pretrain.checkpoint.step import Checkpoint
from pretrain.engine.fragments import check_names, held, kinds, parameter_begins, refresh
from pretrain.engine.step import set_loss_scale
from pretrain.errors import InputError
from pretrain.ranks.collectives import all_gather_list, together


@torch.no_grad()
def restore(engine: Any, checkpoint: Checkpoint, loaded: Callable[[int], None] = lambda values: None) -> None:
    """Load a checkpoint's weights, optimizer states and counts into `engine`. Collective.

    Every value is then read back out of the engine: what it holds must have the fingerprints that were saved, and the
    network must compute with it.

    Args:
        engine: to load into.
        checkpoint: to load.
        loaded: is told how many more values this rank has loaded, of its `values_held`.

    Raises:
        InputError: the checkpoint does not hold what this optimizer needs, or the engine does not hold what was loaded.
    """
    optimizer, state = engine.basic_optimizer, checkpoint.state
    missing = [kind for kind in kinds(engine) if kind not in (*state["fingerprints"], AVERAGE)]
    if missing:
        raise InputError(f"checkpoint {checkpoint.path}: holds no {', '.join(missing)}; it is of another optimizer")

    def fill() -> None:
        pieces = Pieces(checkpoint)
        for fragment in held(engine):
            for kind in kinds(engine):
                # An average that begins now begins as the weights.
                source = kind if kind in state["fingerprints"] else WEIGHT
                view = fragment.view(optimizer, kind)
                if view.device.type == "cpu" and view.dtype is torch.float32:
                    pieces.read(source, fragment.name, view, fragment.begin)
                else:
                    host = torch.empty(fragment.numel)
                    pieces.read(source, fragment.name, host, fragment.begin)
                    view.copy_(host)
                loaded(fragment.numel)

    together(fill)
    optimizer.set_updates(state["updates"])
    set_loss_scale(engine, state["loss_scale"])
    engine.global_steps = checkpoint.step
    refresh(engine)
    check_names(engine)  # again: when the engine was built, the weights were not set yet
    for kind, written in state["fingerprints"].items():
        if kind in kinds(engine) and (found := fingerprint_of(engine, kind)) != written:
            raise InputError(
                f"checkpoint {checkpoint.path}: after loading, the fingerprint of {kind} is {found}, {written} was "
                "saved; the engine does not hold what the checkpoint does"
            )


def fingerprint_of(engine: Any, kind: str) -> str:
    """The fingerprint of all values of `kind` that the ranks hold; where copies differ, a differing one. Collective."""
    optimizer, begins = engine.basic_optimizer, parameter_begins(engine)
    mine = sum(fingerprint(part.view(optimizer, kind).float(), begins[part.name] + part.begin) for part in held(engine))
    prints = [value % 2**64 for value in all_gather_list([mine])]
    if engine.zero_optimization_stage() == 0:  # every rank has all values
        odd = [value for value in prints if value != prints[0]]
        return f"{(odd or prints)[0]:016x}"
    return f"{sum(prints) % 2**64:016x}"
