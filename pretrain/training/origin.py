"""What a run began from: a seed, or weights. Its checkpoints carry it, and a resume from anything else is refused."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.ranks.collectives import is_main, on_main, together
from pretrain.ranks.command import CommandLineError
from pretrain.record.folder import RunFolder
from pretrain.storage.store import is_remote
from pretrain.weights.load import Source, choose, find

# {"seed": …}, or {"source", "sha256" and "step" of WEIGHTS, "weights": "raw" or "averaged", "model": their network}.
Origin = dict[str, Any]


@dataclass(frozen=True)
class Init:
    """WEIGHTS to begin from, as the command names them: `--init` and `--weights`."""

    path: Path | str  # a str where it is a URL
    averaged: bool = False

    @property
    def kind(self) -> str:
        """As `--weights` says it."""
        return "averaged" if self.averaged else "raw"

    def origin(self, chosen: Source) -> Origin:
        """The origin of a run that begins from the weights `chosen`, told by their hash, so that they may be moved."""
        return {
            "source": chosen.name,  # as a resume from elsewhere names it
            "sha256": chosen.sha256,
            "step": chosen.step,
            "weights": self.kind,
            "model": asdict(chosen.spec),
        }


def init_option(path: str | None, weights: str | None) -> Init | None:
    """What `--init` and `--weights` say together. Raises CommandLineError where there is only the second."""
    if path is None and weights is not None:
        raise CommandLineError(f"--weights {weights}: goes with --init; leave it out, or give --init WEIGHTS too")
    return None if path is None else Init(path if is_remote(path) else Path(path), weights == "averaged")


def describe(origin: Origin | None) -> str:
    """In a few words. None: of a run begun before it was recorded."""
    if origin is None:
        return "what is not recorded"
    if "seed" in origin:
        return f"seed {origin['seed']}"
    kind = "averaged weights" if origin["weights"] == "averaged" else "weights"
    step = "" if origin["step"] is None else f"step {origin['step']}, "
    return f"{kind} of {origin['source']} ({step}sha256 {origin['sha256'][:12]}…)"


def beginning(folder: RunFolder, init: Init | None, *, needed: bool) -> tuple[Source | None, ViTSpec | None]:
    """The weights that a new run begins from, and their network. Collective.

    Args:
        needed: whether a run cannot begin without weights.

    Returns:
        (None, None) for a run that draws its parameters. A run that resumes needs no weights to begin from: None,
        and the network it began from (its own, if that was not recorded).

    Raises:
        InputError: `init` names no weights, or is missing; none of the run's own checkpoints can be read.
    """
    begun, passed_over = on_main(lambda: checkpoints.newest(folder.checkpoints))
    if begun is not None:
        return None, ViTSpec.recorded((begun.state.get("origin") or {}).get("model", begun.state["model"]))
    refuse_unreadable(folder, passed_over)
    if init is not None:
        chosen = choose(init.path)
        together(lambda: chosen.check_kind(init.averaged))
        return chosen, chosen.spec
    if needed:
        raise InputError(
            f"--init: not given, and {folder.path} holds no checkpoint to resume; give --init WEIGHTS to begin, or the "
            "--out of a run that has begun"
        )
    return None, None


def refuse_unreadable(folder: RunFolder, passed_over: dict[Path, str]) -> None:
    """Refuse to begin anew where there are checkpoints, all of them damaged."""
    if passed_over:
        raise InputError(
            f"{folder.path}: holds checkpoints, but none that can be read: {'; '.join(passed_over.values())}. Mend or "
            "remove them, or give another --out to start anew"
        )


def check_origin(saved: Checkpoint, init: Init | None) -> None:
    """Refuse to resume `saved` with weights that its run did not begin from. Collective. Raises as `check_began`."""
    began: Origin | None = saved.state.get("origin")
    if init is not None and began is None:
        _note(f"{saved.path} does not record what its run began from; --init {init.path} is not compared")
    if init is not None and began is not None:
        check_began(began, init, saved.path.parent.parent)


def check_began(began: Origin, init: Init, folder: Path) -> None:
    """Refuse weights that the run in `folder`, whose origin is `began`, did not begin from. Collective.

    Weights are compared by hash, so a moved or copied folder is the same. Where the weights are no longer to be
    read, the path that is recorded will do: a job that is put back into the queue repeats its command line.

    Raises:
        InputError: naming what the run began from and what was given.
    """
    mend = (
        f"the run in {folder} began from {describe(began)}; leave --init out to resume it, or give "
        "another --out to begin another run"
    )
    if "seed" in began:
        raise InputError(f"--init {init.path}: {mend}")
    if is_remote(init.path) and (init.path, init.kind) == (began["source"], began["weights"]):
        return  # not to be downloaded again by each restart
    try:
        # Sizes will do, as the hashes of gigabytes are not worth a resume's time. They tell less than what the run
        # found when it began: before a refusal the hashes are asked for too.
        given = init.origin(on_main(lambda: find(init.path)))
        if not _same(given, began):
            given = init.origin(choose(init.path))
    except InputError as error:
        source, given_path = (Path(os.path.abspath(path)) for path in (began["source"], init.path))
        told_alike = given_path in (source, source.parent, source.parent.parent) and init.kind == began["weights"]
        if not told_alike:
            raise type(error)(f"{error}; {mend}") from None
        _note(f"{error}; not needed to resume")
        return
    if not _same(given, began):
        raise InputError(f"--init {init.path}: names {describe(given)}, but {mend}")


def _same(one: Origin, other: Origin) -> bool:
    return (one["sha256"], one["weights"]) == (other["sha256"], other["weights"])


def _note(text: str) -> None:
    if is_main():
        say(f"note: {text}")
