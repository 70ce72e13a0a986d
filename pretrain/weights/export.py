"""Weights out: one file or folder that other libraries read, with what is needed to test it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import files
from pretrain.checkpoint import archive
from pretrain.errors import InputError
from pretrain.model.positions import sincos2d
from pretrain.model.spec import Gelu, ViTSpec
from pretrain.weights import npzfile, selftest
from pretrain.weights.formats.format import DESCRIPTION, Format
from pretrain.weights.formats.table import to_file
from pretrain.weights.load import FileSource, Source, find
from pretrain.weights.pixels import Normalisation, fold
from pretrain.weights.read import FORMATS
from pretrain.weights.tensorfile import ENDINGS
from pretrain.weights.weights import Weights, fingerprint

DROPPABLE = ("representation", "head", "gelu")
MODEL = "model.safetensors"  # the file of tensors in a folder
CARD, README = "vit_foundry.json", "README.md"  # beside it
# What of a card the tensors' file says too, and what of the run's config it has: an evaluation goes by it.
_DESCRIBED = ("format", "model", "sha256", "step", "weights", "trained_on", "config", "source")
_EVALUATED = {"train": ("loss",), "data": ("eval_crop",)}

PREPROCESSING = """\
{colours} pixels in [0, 255]; the shorter side is resized to {resize} pixels (8/7 of the image size; bilinear,
antialiased), the centre of {size} × {size} is cut out, and x / 127.5 - 1 brings it to [-1, 1] (mean and standard
deviation 0.5).
"""
PREPROCESSING_WHOLE = """\
{colours} pixels in [0, 255]; the whole image is resized to {size} × {size} pixels, whatever its aspect (bilinear,
antialiased), and x / 127.5 - 1 brings it to [-1, 1] (mean and standard deviation 0.5).
"""


def export(
    source: Source,
    form: Format,
    out: Path,
    *,
    averaged: bool = False,
    drop: Sequence[str] = (),
    trained_on: Normalisation | None = None,
) -> Path:
    """Write WEIGHTS in a format, with a card and a README beside them. Nothing is left at `out` before all is whole.

    Args:
        source: the weights.
        form: the format.
        out: the file to write; of a format that is a folder, the folder.
        averaged: whether to write their Polyak average.
        drop: what to leave out, of DROPPABLE.
        trained_on: how the source's images were normalised, where it does not say and it was not as here; the export
            takes images as here.

    Returns:
        the card's path.

    Raises:
        InputError: the format cannot hold them, `out` exists, or has another ending than the format's files.
    """
    check_out(form, out)
    weights = source.read(averaged)
    if trained_on is not None:
        if not isinstance(source, FileSource) or source.pixels_told:
            raise InputError(f"--mean, --std: weights {source.name} say how images are normalised; leave both out")
        weights = replace(weights, tensors=fold(weights.tensors, trained_on, where=source.name))
    held = held_by(form, weights, drop)
    card = make_card(form, held, source)
    entries = [(row.name, to_file(row, held.tensors, held.spec)) for row in form.rows(held.spec)]
    described = {name: card[name] for name in _DESCRIBED}
    metadata = {"format": "pt", DESCRIPTION: json.dumps(described)}
    card_path, readme_path = companions(out, folder=not form.suffix)
    aside = out.with_name(f".{out.stem}.{os.getpid()}.partial{out.suffix}")
    try:
        with files.naming(out):
            if form.suffix:
                card["file"] = write_tensors(aside, entries, metadata)
            else:
                aside.mkdir()
                card["file"] = write_tensors(aside / MODEL, entries, metadata)
                for name, content in form.companions(held.spec, held.whole).items():
                    files.write_text(aside / name, json.dumps(content, indent=2) + "\n")
            texts = {card_path: json.dumps(card, indent=1) + "\n", readme_path: readme(form, card, out)}
            for path, text in texts.items():
                files.write_text(path if form.suffix else aside / path.name, text)
            os.replace(aside, out)
            files.flush(out.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
    return card_path


def check_out(form: Format, out: Path) -> None:
    """Raises InputError where `out` cannot be an export of this format, before anything is read."""
    if files.exists(out):
        raise InputError(f"--out {out}: exists; remove it, or give another --out")
    if form.suffix and out.suffix != form.suffix:
        name = out.stem if out.suffix in ENDINGS else out.name
        raise InputError(f"--out {out}: format {form.name} is a {form.suffix} file; {name}{form.suffix} would do")
    if not form.suffix and out.suffix in (".safetensors", ".npz", ".pth"):
        raise InputError(f"--out {out}: format {form.name} is a folder; a name without {out.suffix} would be right")
    files.make_folder(out.absolute().parent)


def companions(out: Path, *, folder: bool) -> tuple[Path, Path]:
    """Where the card and the README of an export are: in a folder's, or beside a file."""
    return (out / CARD, out / README) if folder else (Path(f"{out}.json"), Path(f"{out}.md"))


def held_by(form: Format, weights: Weights, drop: Sequence[str] = ()) -> Weights:
    """The weights as a format holds them: without what is dropped, fixed positions as learned ones.

    Raises:
        InputError: it cannot hold something that is not dropped, or there is nothing to drop.
    """
    spec, tensors = replace(weights.spec, dropout=0.0, drop_path=0.0), dict(weights.tensors)
    spec, tensors = _without(spec, tensors, drop)
    lacking = form.lacks(spec)
    if lacking:
        told = "; ".join(f"{name}: {reason}" for name, reason in lacking.items())
        mend = "another"
        if all(name in DROPPABLE for name in lacking):
            may = [*drop, *lacking]
            if "representation" in may and spec.num_classes and "head" not in may:  # the head goes with it
                may.append("head")
            mend = f"--drop {','.join(may)}, or another"
        raise InputError(f"--format {form.name} cannot hold these weights: {told}; {mend} --format would do")
    if form.learned_positions and spec.positions == "sincos2d":
        table = sincos2d(spec.grid, spec.width, device=torch.device("cpu"), dtype=torch.float32)
        if spec.pool == "cls":  # the class token has no position then
            table = torch.cat([torch.zeros(1, 1, spec.width), table], dim=1)
        spec, tensors["position_embedding"] = replace(spec, positions="learned"), table
    return replace(weights, spec=spec, tensors=form.fitted(spec, tensors))


def _without(spec: ViTSpec, tensors: dict[str, Any], drop: Sequence[str]) -> tuple[ViTSpec, dict[str, Any]]:
    unknown = [name for name in drop if name not in DROPPABLE]
    if unknown:
        raise InputError(f"--drop {','.join(unknown)}: what may be dropped is {', '.join(DROPPABLE)}")
    there = {"representation": spec.representation_size, "head": spec.num_classes, "gelu": True}
    absent = [name for name in drop if not there[name]]
    if absent:
        raise InputError(f"--drop {','.join(absent)}: these weights have none; leave it out")
    if "representation" in drop and "head" not in drop and spec.num_classes:
        raise InputError(
            "--drop representation: the head was trained on the representation layer's output and means nothing "
            "without it; --drop representation,head would be right"
        )
    for name in ("representation", "head"):
        if name in drop:
            tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    return (
        replace(
            spec,
            representation_size=None if "representation" in drop else spec.representation_size,
            num_classes=0 if "head" in drop else spec.num_classes,
            gelu=_other_gelu(spec.gelu) if "gelu" in drop else spec.gelu,
        ),
        tensors,
    )


def _other_gelu(gelu: Gelu) -> Gelu:
    return "tanh" if gelu == "exact" else "exact"


def make_card(form: Format, held: Weights, source: Source) -> dict[str, Any]:
    """What an export says of itself: its network, its source, how images are prepared, and what to expect of one."""
    size = held.spec.image_size
    resize = size if held.whole else round(size * 8 / 7)
    words = PREPROCESSING_WHOLE if held.whole else PREPROCESSING
    colours = "Grey" if held.spec.channels == 1 else "RGB"
    return {
        "format": form.name,
        "library": form.library,
        "model": asdict(held.spec),
        "arguments": form.arguments(held.spec),
        "sha256": fingerprint(held.tensors),
        "step": held.step,
        "weights": "averaged" if held.averaged else "raw",
        "trained_on": held.trained_on,
        "config": {
            section: {name: source.config[section][name] for name in names if name in source.config.get(section, {})}
            for section, names in _EVALUATED.items()
        },
        "source": {"path": str(source.path), "sha256": source.sha256},
        "preprocessing": {
            "words": words.format(colours=colours, resize=resize, size=size).replace("\n", " ").strip(),
            "resize": [size, size] if held.whole else resize,  # both sides, or the shorter one
            "crop": size,
            "mean": 0.5,
            "std": 0.5,
        },
        "image": "pixel number i, counted over channels, rows and columns, is (i² mod 251) / 125 − 1",
        "tolerance": selftest.TOLERANCE,
        "expected": selftest.expected(held.spec, held.tensors),
    }


def readme(form: Format, card: dict[str, Any], out: Path) -> str:
    """The text beside an export: what it is, how images are prepared, and a script that loads and compares it."""
    path, beside = (out.name, f"{out.name}.json") if form.suffix else (".", CARD)
    step = "" if card["step"] is None else f" after step {card['step']:,}"
    script = f"{selftest.BEGIN.format(path=repr(path), card=repr(beside))}\n{form.example}\n{selftest.END}"
    spec = ViTSpec.recorded(card["model"])
    return (
        f"# {out.name}\n\nA Vision Transformer of {spec.describe()}, for {form.library}; its {card['weights']} weights"
        f"{step}, sha256 of the source {card['source']['sha256'][:16]}….\n\n"
        f"Images: {card['preprocessing']['words']}\n\n"
        f"This script, run in the folder of this file, loads the weights with {form.library} and prints the largest "
        f"difference from what is expected of a synthetic image; on any device it should be below "
        f"{selftest.TOLERANCE:g} of the largest value.\n\n```python\n{script}```\n"
    )


def write_tensors(path: Path, entries: Sequence[tuple[str, torch.Tensor]], metadata: dict[str, str]) -> dict[str, Any]:
    """Write named tensors into a container that the ending of `path` names; its size and sha256."""
    container = npzfile if path.suffix == ".npz" else archive
    return container.write(path, entries, metadata)


@dataclass(frozen=True)
class Comparison:
    """An output of an export's network against what its card expects."""

    reader: str
    output: str
    difference: float  # relative to the largest value expected, at least 1

    @property
    def right(self) -> bool:
        return self.difference <= selftest.TOLERANCE


def check(out: Path) -> tuple[list[Comparison], str]:
    """Compare an export with its card, read by this project and by the format's library.

    Returns:
        the comparisons; and why the library was not asked, or the empty string.

    Raises:
        InputError: no card, or weights that cannot be read.
    """
    card = read_card(out)
    form = FORMATS[card["format"]]
    weights = find(out).read()
    ours = selftest.expected(weights.spec, weights.tensors)
    if ours.keys() != card["expected"].keys():
        raise InputError(
            f"{out}: its card expects {', '.join(card['expected']) or 'nothing'}, and its network gives "
            f"{', '.join(ours)}; export the weights again"
        )
    found = _compared("vit-foundry", ours, card["expected"])
    names: dict[str, Any] = {"PATH": str(out), "card": card, "images": selftest.image(ViTSpec.recorded(card["model"]))}
    try:
        with torch.no_grad():
            exec(compile(form.example, f"<example of {form.name}>", "exec"), names)
    except ImportError as error:
        return found, f"{form.library} was not asked: {error}; install it and check again"
    return [*found, *_compared(form.library, names["outputs"], card["expected"])], ""


def _compared(reader: str, outputs: dict[str, Any], wanted: dict[str, list[float]]) -> list[Comparison]:
    return [Comparison(reader, *found) for found in sorted(selftest.difference(outputs, wanted).items())]


def read_card(out: Path) -> dict[str, Any]:
    """The card of an export. Raises InputError: there is none, or it is no card."""
    if not files.exists(out):
        raise InputError(f"{out}: no such file or folder; give what export.py --out has written")
    path, _ = companions(out, folder=files.is_folder(out))
    if not files.is_file(path):
        raise InputError(
            f"{out}: has no card {path}, so it is no export, or not all of one; give what export.py --out has written"
        )
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ViTSpec.recorded(card["model"])
        if card["format"] not in FORMATS or not isinstance(card["expected"], dict):
            raise ValueError(f"format {card['format']!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged: {error!r}; export the weights again") from None
    return card
