"""Shards in, checkpoints out: everything that makes a representation.

For Python users it names `read_config`, `run`, `load_weights` and `open_index`. They are imported when first used, so
that importing a room stays cheap.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.configfile import read_config as read_config
    from pretrain.index.index import Index
    from pretrain.weights.load import load_weights as load_weights

    open_index = Index.open


class _Run(ModuleType):
    """The room `pretrain.run`, which is also a function: `pretrain.run.experiment.run`."""

    def __call__(self, *args: Any, **options: Any) -> int:
        status: int = import_module("pretrain.run.experiment").run(*args, **options)
        return status


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "run":  # set by whichever import of the room comes first
            value.__class__ = _Run
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "read_config":
        return import_module("pretrain.configfile").read_config
    if name == "run":
        return import_module("pretrain.run")
    if name == "load_weights":
        return import_module("pretrain.weights.load").load_weights
    if name == "open_index":
        return import_module("pretrain.index.index").Index.open
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
