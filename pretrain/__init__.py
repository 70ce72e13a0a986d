"""Shards in, checkpoints out: everything that makes a representation.

For Python users it names `read_config`, `run`, `load_weights` and `open_index`. They are imported when first used, so
that importing a room stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.configfile import read_config as read_config
    from pretrain.index.index import Index
    from pretrain.training.experiment import run as run
    from pretrain.weights.load import load_weights as load_weights

    open_index = Index.open

_DOORS = {
    "read_config": ("pretrain.configfile", "read_config"),
    "run": ("pretrain.training.experiment", "run"),
    "load_weights": ("pretrain.weights.load", "load_weights"),
    "open_index": ("pretrain.index.index", "Index.open"),
}


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, path = _DOORS[name]
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
