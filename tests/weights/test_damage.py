"""Damaged weights, safetensors and torch's: refused with the name of the tensor or file, and nothing is executed."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import InputError
from pretrain.model.spec import ARCHITECTURES, ViTSpec
from pretrain.weights.formats.table import to_file
from pretrain.weights.load import load_weights
from pretrain.weights.read import FORMATS

INDEX = "model.safetensors.index.json"


@pytest.fixture
def written(tmp_path, network, monkeypatch):
    """written(format) -> path: the tensors of a small network alone, as the library's users have them."""
    spec: ViTSpec = network().spec
    sizes = {name: getattr(spec, name) for name in ("patch_size", "layers", "width", "mlp", "heads")}
    monkeypatch.setitem(ARCHITECTURES, "small", sizes)

    def write(name):
        form, own = FORMATS[name], network().state_dict()
        tensors = {row.name: to_file(row, own, spec).contiguous() for row in form.rows(spec)}
        if name == "hf":
            (tmp_path / "vit").mkdir()
            (tmp_path / "vit/config.json").write_text(json.dumps(form.companions(spec, False)["config.json"]))
            save_file(tensors, tmp_path / "vit/model.safetensors")
            return tmp_path / "vit"
        torch.save(tensors, tmp_path / "vit.pth")
        return tmp_path / "vit.pth"

    return write


def changed(path, change):
    """Read the tensors, have `change` change the dict, and write them again."""
    file = path / "model.safetensors" if path.is_dir() else path
    tensors = load_file(file) if path.is_dir() else torch.load(file)
    change(tensors)
    save_file(tensors, file) if path.is_dir() else torch.save(tensors, file)


def refusal(path):
    with pytest.raises(InputError) as refused:
        load_weights(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["timm", "torchvision", "hf"])
def test_every_tensor_counts(name, written):
    """Each is dropped in turn, some are reshaped or of whole numbers; one is added."""
    path = written(name)
    load_weights(path)
    file = path / "model.safetensors" if path.is_dir() else path
    good = file.read_bytes()
    names = list(load_file(file) if path.is_dir() else torch.load(file))
    for tensor in names:
        changed(path, lambda tensors, tensor=tensor: tensors.pop(tensor))
        refusal(path)
        file.write_bytes(good)
    for tensor in names[::5]:
        changed(path, lambda tensors, tensor=tensor: tensors.update({tensor: tensors[tensor].repeat_interleave(3, 0)}))
        refusal(path)
        file.write_bytes(good)
        changed(path, lambda tensors, tensor=tensor: tensors.update({tensor: tensors[tensor].long()}))
        assert f"{tensor} is int64; weights are float32" in refusal(path)
        file.write_bytes(good)
    changed(path, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    assert "left over: extra.weight" in refusal(path)


@pytest.mark.parametrize("name", ["timm", "torchvision", "hf"])
def test_all_that_is_missing_left_over_and_misshapen_is_listed(name, written):
    path = written(name)
    table = [row.name for row in FORMATS[name].rows(load_weights(path).spec)]
    weights = [tensor for tensor in table if "norm" in tensor or "ln_" in tensor]

    def change(tensors):
        del tensors[weights[0]]
        tensors["odd"] = torch.ones(1)
        tensors[weights[1]] = torch.ones(2, 2, 2)

    changed(path, change)
    said = refusal(path)
    assert f"missing: {weights[0]}" in said
    assert "left over: odd" in said
    assert f"of another shape: {weights[1]} [2, 2, 2]" in said


@pytest.mark.parametrize("name", ["timm", "hf"])
def test_a_file_that_was_cut_short(name, written):
    path = written(name)
    file = path / "model.safetensors" if path.is_dir() else path
    good = file.read_bytes()
    for kept in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:kept])
        assert str(file) in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        b"<!DOCTYPE html><html></html>",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b"\xff\xfe{}    ",
        b"",
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_something_else(content, suffix, tmp_path):
    path = tmp_path / f"vit{suffix}"
    path.write_bytes(content)
    refusal(path)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_pickle_is_executed(written, tmp_path):
    tensors, mark = torch.load(written("timm")), tmp_path / "executed"
    torch.save({**tensors, "odd": Touch(mark)}, tmp_path / "vit.pth")
    said = refusal(tmp_path / "vit.pth")
    assert "torch cannot read it as plain tensors: it holds other objects, or is damaged; save" in said
    assert "model.state_dict()" in said
    for suffix in (".pt", ".bin", ".safetensors"):
        (tmp_path / f"plain{suffix}").write_bytes(pickle.dumps(Touch(mark)))
        refusal(tmp_path / f"plain{suffix}")
    assert not mark.exists()
    torch.load(tmp_path / "vit.pth", weights_only=False)
    assert mark.exists()  # it would have


def test_a_whole_pickled_network_is_refused(network, tmp_path):
    torch.save(network(), tmp_path / "vit.pt")
    assert "model.state_dict()" in refusal(tmp_path / "vit.pt")


def test_compressed_entries_are_refused_before_they_are_unpacked(written, tmp_path, monkeypatch):
    """torch stores plainly, and would unpack a pickle of any size before it looks at it."""
    good = written("timm")
    for name, replaced in (("deflated.pth", {}), ("bomb.pth", {"data.pkl": bytes(1 << 26)})):
        with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.namelist():
                target.writestr(entry, replaced.get(entry.rpartition("/")[2], source.read(entry)))
    monkeypatch.setattr(torch, "load", lambda *given, **options: pytest.fail("read"))
    assert "compressed" in refusal(tmp_path / "deflated.pth")
    assert "compressed" in refusal(tmp_path / "bomb.pth")


def nested():
    found = {}
    found["model"] = found
    return found


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.ones(3), "no state dict; found Tensor"),
        ([torch.ones(3)], "no state dict; found list"),
        ({}, "no state dict; found nothing"),
        ({"epoch": 3}, "no state dict; found epoch"),
        ({"model": {}, "state_dict": {}}, "no state dict; found model, state_dict"),
        (nested(), "no state dict"),
        ({"w": torch.ones(3), "epoch": 3}, "found also epoch"),
        ({3: torch.ones(3)}, "found also 3"),
        ({"w": torch.ones(3).to_sparse()}, "found also w"),
        ({"w": torch.ones(3, device="meta")}, "found also w"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_is_no_state_dict(content, found, tmp_path):
    torch.save(content, tmp_path / "vit.pth")
    assert found in refusal(tmp_path / "vit.pth")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "vit"', "[" * 100_000, "\x00", "{'a': 1}"])
def test_a_damaged_config(text, written):
    path = written("hf") / "config.json"
    path.write_text(text)
    assert str(path) in refusal(path.parent)


@pytest.mark.parametrize("part", ["../vit.safetensors", "/etc/passwd", "..", ".", "", "missing.safetensors", 3, None])
def test_an_index_that_points_elsewhere(part, written):
    path = written("hf")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path.parent / "vit.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, part)}))
    refusal(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index(text, written):
    path = written("hf")
    (path / "model.safetensors").unlink()
    (path / INDEX).write_text(text)
    refusal(path)


def test_an_index_and_its_files_must_agree(written):
    path = written("hf")
    names = dict.fromkeys(load_file(path / "model.safetensors"), "part.safetensors")
    (path / "model.safetensors").rename(path / "part.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": names}))
    load_weights(path)
    (path / INDEX).write_text(json.dumps({"weight_map": {**names, "odd": "part.safetensors"}}))
    assert "differ in odd" in refusal(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {}, "format": "timm"}', '{"model": 3}', "3"])
def test_a_damaged_description(text, tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file({"head.weight": torch.ones(2, 2)}, path, {"vit_foundry": text})
    assert "description is damaged" in refusal(path)
