"""A file of named tensors, of any kind: its names and shapes are known, its values are read one tensor at a time.

Nothing in a file is executed: torch's files are read with `weights_only`, NumPy's without pickles.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import InputError
from pretrain.weights import npzfile

# Types that weights have; all are exact in fp32.
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class TensorFile:
    """Named tensors that lie in a file or folder.

    Args:
        where: the file or folder, for messages.
        shapes: of each tensor, by name.
        values: reads one tensor, as it is stored.
        notes: what the file says of itself, by name: metadata of safetensors, a `config.json` beside it.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    values: Callable[[str], Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One tensor in fp32.

        Raises:
            InputError: it cannot be read, or is not of a floating-point type of at most 32 bits.
        """
        tensor = self.values(name)
        if tensor.dtype not in _FLOATS.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"weights {self.where}: {name} is {kind}; weights are float32, float16 or bfloat16, so this file is "
                "damaged or holds something else"
            )
        return tensor.float()

    def renamed(self, names: Mapping[str, str]) -> TensorFile:
        """The same tensors under other names: `names` maps new → old, and leaves out what it does not name."""
        return TensorFile(
            self.where,
            {new: self.shapes[old] for new, old in names.items()},
            lambda new: self.values(names[new]),
            self.notes,
        )

    def without_prefix(self, prefix: str) -> TensorFile:
        """The tensors whose names begin with `prefix`, without it; the others are left out."""
        return self.renamed({name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)})


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a file, or of a folder that holds `model.safetensors` and maybe `config.json`.

    Raises:
        InputError: the file cannot be read, or holds anything but tensors.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npz":
        return TensorFile(str(path), *npzfile.read(path))
    if path.suffix in (".pt", ".pth", ".bin"):
        return _open_torch(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise InputError(
        f"weights {path}: ends in {path.suffix or 'nothing'}; a file of weights ends in .safetensors, .npz, .pth, "
        ".pt or .bin; of another program's training checkpoint save the state dict alone, as .pth"
    )


def _open_safetensors(path: Path) -> TensorFile:
    def refuse(error: Exception) -> InputError:
        return InputError(f"weights {path}: cannot be read as safetensors: {error}; the file is damaged or cut short")

    try:
        file = safe_open(str(path), framework="pt", device="cpu")
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        notes = file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise refuse(error) from None

    def values(name: str) -> Tensor:
        try:
            return file.get_tensor(name)
        except (SafetensorError, ValueError) as error:
            raise refuse(error) from None

    return TensorFile(str(path), shapes, values, notes)


def _open_folder(folder: Path) -> TensorFile:
    config, preprocessor = folder / "config.json", folder / "preprocessor_config.json"
    whole, index = folder / "model.safetensors", folder / INDEX
    notes: dict[str, Any] = {}
    if config.is_file():
        notes["config"] = _read_json(config)
    if preprocessor.is_file():
        notes["preprocessor"] = _read_json(preprocessor)
    if whole.is_file():
        file = _open_safetensors(whole)
        return TensorFile(str(folder), file.shapes, file.values, {**file.notes, **notes})
    if not index.is_file():
        raise InputError(
            f"weights {folder}: holds neither model.safetensors nor {INDEX}, so it is no folder of weights"
        )
    parts = _read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) and "/" not in part for part in parts.values()):
        raise InputError(f"weights {index}: no weight_map of tensor names to files of this folder")
    opened = {part: _open_safetensors(folder / part) for part in sorted(set(parts.values()))}
    shapes = {name: shape for file in opened.values() for name, shape in file.shapes.items()}
    if shapes.keys() != parts.keys():
        differing = sorted(shapes.keys() ^ parts.keys())
        raise InputError(f"weights {folder}: {INDEX} and the files differ in {', '.join(differing)}")
    return TensorFile(str(folder), shapes, lambda name: opened[parts[name]].values(name), notes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"weights {path}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"weights {path}: a JSON object was expected, found {type(found).__name__}")
    return found


def _open_torch(path: Path) -> TensorFile:
    try:
        _check_stored(path)
        # Mapped, so that a tensor is in memory only once it is read; what is not stored plainly cannot be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what its unpickler, its zip reader and its parser raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if said.startswith("Weights only load failed"):  # then comes advice to execute what is in the file
            said = "it holds other objects, or is damaged"
        raise InputError(
            f"weights {path}: torch cannot read it as plain tensors: {said}; save the state dict alone, with "
            "torch.save(model.state_dict(), …)"
        ) from None
    state, levels = found, 0
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        nested = [name for name in ("state_dict", "model", "module") if isinstance(state.get(name), dict)]
        levels += 1
        if len(nested) != 1 or levels > 3:  # a pickled dict may hold itself
            raise InputError(
                f"weights {path}: no state dict; found {', '.join(map(str, list(state)[:8])) or 'nothing'}"
            )
        state = state[nested[0]]
    if not isinstance(state, dict):
        raise InputError(f"weights {path}: no state dict; found {type(state).__name__}")
    if odd := [str(name) for name, value in state.items() if not (isinstance(name, str) and _is_plain(value))]:
        raise InputError(f"weights {path}: a state dict holds tensors alone; found also {', '.join(odd[:8])}")
    tensors: dict[str, Tensor] = state
    return TensorFile(str(path), {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__)


def _check_stored(path: Path) -> None:
    """Raises ValueError for compressed entries: torch writes none, and would unpack a pickle of any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            compressed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise ValueError(f"{', '.join(compressed[:8])} compressed, which torch never writes")


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
