"""Fitted linear probes in a file, with what they were fitted to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewshot.cache import NetworkFeatures
from fewshot.features import layers_of, preprocessing
from fewshot.probes.fitted import Linear
from fewshot.score import Scores
from fewshot.task import Draw
from pretrain import files
from pretrain.errors import InputError
from pretrain.model.arithmetic import dtype_name
from pretrain.storage.location import local_path
from pretrain.weights.networks import Network

FILE = "probes.safetensors"  # in a report's folder
_NOTE = "vit-foundry probes"  # the file's only metadata: several would lie in no fixed order


@dataclass(frozen=True)
class Origin:
    """What fixes the features that a probe takes.

    Args:
        sha256: of the weights.
        network: the sizes and settings of the network as it is run, among them the image size.
        dtype: that it computes in.
        feature, layer: the feature's name and description.
        preprocessing: of the images.
    """

    sha256: str
    network: dict[str, Any]
    dtype: str
    feature: str
    layer: str
    preprocessing: str

    @classmethod
    def of(cls, network: Network, sha256: str, name: str) -> Origin:
        """Of the feature `name` of a network whose weights have this hash."""
        (layer,) = layers_of([name])
        return cls(
            sha256,
            json.loads(json.dumps(asdict(network.spec))),  # as a file gives it back
            dtype_name(network.dtype),
            name,
            layer.description,
            preprocessing(network.spec.image_size),
        )


@dataclass(frozen=True)
class SavedProbe:
    """A linear probe fitted on one support set; `support_sha256` is that of the set's ids (`Draw.sha256`)."""

    origin: Origin
    probe: str
    shots: int
    seed: int
    l2: float | None
    support_sha256: str
    linear: Linear

    @property
    def description(self) -> dict[str, Any]:
        """All but the numbers of the layer, for JSON."""
        told = {name: value for name, value in vars(self).items() if name != "linear"}
        return {**told, "origin": asdict(self.origin)}


@dataclass(frozen=True)
class ProbeFile:
    """The probes of a file, and the names of their classes; None where the support set names none."""

    path: Path
    probes: tuple[SavedProbe, ...]
    names: tuple[str, ...] | None

    @property
    def classes(self) -> int:
        return len(self.probes[0].linear.bias)


def fitted_probes(networks: Sequence[NetworkFeatures], draws: Sequence[Draw], scores: Scores) -> list[SavedProbe]:
    """The linear probes that `scores` has kept, for `write_probes`."""
    owners = {one.network.id: one for one in networks}
    drawn = {(draw.shots, draw.seed): draw.sha256 for draw in draws}
    return [
        SavedProbe(
            Origin.of(owners[row.weights].network, owners[row.weights].sha256, row.features),
            row.probe,
            row.shots,
            row.seed,
            row.l2,
            drawn[row.shots, row.seed],
            linear,
        )
        for row, linear in scores.fitted.items()
    ]


def write_probes(folder: Path, probes: Sequence[SavedProbe], names: Sequence[str] | None) -> None:
    """Write `folder`/FILE, whole or not at all, in fp64; of no probes, remove the file of an earlier report."""
    if not probes:
        (folder / FILE).unlink(missing_ok=True)
        return
    tensors: dict[str, Tensor] = {}
    for number, probe in enumerate(probes):
        tensors |= {f"{number}.weight": probe.linear.weight, f"{number}.bias": probe.linear.bias}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = json.dumps({"names": names and list(names), "probes": [probe.description for probe in probes]})
    note = {"content": content, "sha256": _digest(content, tensors)}
    with files.atomic_write(folder / FILE) as file:
        file.write(safetensors.torch.save(tensors, {_NOTE: json.dumps(note)}))


def read_probes(path: Path) -> ProbeFile:
    """Read what `write_probes` has written. `path`: the file, or the folder of a report or of its evaluation.

    Raises InputError: there is none, or it is damaged.
    """
    path = _find(path)
    where = f"probes {path}"
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            note = (file.metadata() or {}).get(_NOTE)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if note else {}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{where}: cannot be read as safetensors: {error}; fit the probes anew") from None
    if note is None:
        raise InputError(f"{where}: holds no probes; {FILE} of a few-shot report would be right")
    try:
        said = json.loads(note)
        content = said["content"]
        if _digest(content, tensors) != said["sha256"]:
            raise ValueError("its values are not those that were written")
        found = json.loads(content)
        probes = tuple(
            SavedProbe(
                **{**row, "origin": Origin(**row["origin"])},
                linear=Linear(tensors[f"{number}.weight"], tensors[f"{number}.bias"]),
            )
            for number, row in enumerate(found["probes"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: damaged, or of another version: {error}; fit the probes anew") from None
    return ProbeFile(path, probes, found["names"] and tuple(found["names"]))


def _find(path: Path) -> Path:
    path = local_path(path)
    if files.is_file(path):
        return path
    places = (path / FILE, path / "report" / FILE)
    found = next((place for place in places if files.is_file(place)), None)
    if found is None:
        what = f"no {FILE}, also not in report/" if files.exists(path) else "no such file or folder"
        raise InputError(
            f"probes {path}: {what}; a few-shot evaluation's folder or file of probes would be right "
            "(fewshot.save_probes says which it writes)"
        )
    return found


def _digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
