"""Fitted probes in a file, and what they say of images when they are applied."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fewshot.apply import apply_probes, open_query, report_applied, table, write_applied
from fewshot.cache import FOLDER, FeatureCache
from fewshot.config import FewshotConfig, ProtocolSection
from fewshot.probes.table import PROBES
from fewshot.saved import FILE, fitted_probes, read_probes, write_probes
from fewshot.score import score_networks
from fewshot.task import open_task
from pretrain.datasets.dataset import Dataset, png
from pretrain.errors import InputError
from pretrain.shards.write import write_shards
from pretrain.weights.networks import open_networks

CPU = torch.device("cpu")
LINEAR = [probe.name for probe in PROBES.values() if probe.linear]


@pytest.fixture(scope="module")
def evaluated(digit_shards, tiny, drawn, run_folder, alone, tmp_path_factory):
    """(config, run folder, scores, folder of a report with its probes) of a small network on digits."""
    out = tmp_path_factory.mktemp("evaluated")
    run = run_folder(out / "run", drawn(tiny(representation_size=24)))
    protocol = ProtocolSection(shots=(1, 2), seeds=(0, 3), features=("pixels", "tanh", "cls"), oracle=False)
    data = {"support": digit_shards[0], "query": digit_shards[1], "workers": 1}
    config = FewshotConfig.model_validate({"name": "c", "data": data, "fewshot": protocol})
    task = open_task(*digit_shards, protocol)
    features = [FeatureCache(config, task.splits, out / FOLDER, alone).features(*open_networks([run], None))]
    scores = score_networks(features, task, protocol, CPU)
    (out / "report").mkdir()
    write_probes(out / "report", fitted_probes(features, task.draws, scores), task.support.classes)
    return config, run, scores, out


def apply(evaluated, alone, out, paths=None, run=None, image_size=None, dtype=torch.float32):
    config, own, _, folder = evaluated
    saved = read_probes(folder)
    query = open_query(paths or config.data.query, saved)
    networks = open_networks([run or own], image_size, dtype=dtype)
    features, applied = apply_probes(saved, query, networks, config, out, alone)
    report = report_applied(saved, query, features, applied, {})
    write_applied(report, query, applied, out)
    return query, applied, report


def test_the_file_holds_every_linear_probe_of_the_leading_feature(evaluated):
    config, _, scores, out = evaluated
    found = read_probes(out / "report" / FILE)
    task = open_task(config.data.support, config.data.query, config.fewshot)
    drawn = {(draw.shots, draw.seed): draw.sha256 for draw in task.draws}
    expected = [row for row in scores.results if row.features == "tanh" and row.probe in LINEAR]
    assert [(one.probe, one.shots, one.seed, one.l2) for one in found.probes] == [
        (row.probe, row.shots, row.seed, row.l2) for row in expected
    ]
    for one in found.probes:
        assert one.linear.weight.shape == (24, 10)
        assert one.support_sha256 == drawn[one.shots, one.seed]
        assert (one.origin.feature, one.origin.dtype, one.origin.network["image_size"]) == ("tanh", "float32", 8)
        assert "to [-1, 1]" in one.origin.preprocessing
    assert found.names == task.support.classes
    with safe_open(str(out / "report" / FILE), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float64}  # noqa: SIM118


def test_the_same_probes_are_the_same_bytes(evaluated, tmp_path):
    found = read_probes(evaluated[-1])
    write_probes(tmp_path, found.probes, found.names)
    assert (tmp_path / FILE).read_bytes() == found.path.read_bytes()


def test_without_probes_no_file_of_an_earlier_report_stays(tmp_path, evaluated):
    write_probes(tmp_path, read_probes(evaluated[-1]).probes, None)
    write_probes(tmp_path, [], None)
    assert list(tmp_path.iterdir()) == []


def test_applied_probes_score_what_the_report_says(evaluated, alone, tmp_path, capsys):
    _, _, scores, _ = evaluated
    query, applied, report = apply(evaluated, alone, tmp_path)
    expected = {
        (row.probe, row.shots, row.seed, row.l2): (row.accuracy, scores.predicted[row].tolist())
        for row in scores.results
        if row.features == "tanh" and row.probe in LINEAR
    }
    assert {
        (one.probe.probe, one.probe.shots, one.probe.seed, one.probe.l2): (one.accuracy, one.predicted.tolist())
        for one in applied
    } == expected
    assert json.loads((tmp_path / "applied" / "report.json").read_text())["results"] == report["results"]
    with np.load(tmp_path / "applied" / "predictions.npz") as file:
        assert file["ids"].tolist() == list(range(150))
        assert np.array_equal(file["labels"], query.labels)
        assert np.array_equal(file["predicted"], np.stack([one.predicted for one in applied]))
        assert file["scores"].shape == (len(applied), 150)
    assert f"{100 * applied[0].accuracy:.2f}" in table(report)
    capsys.readouterr()
    apply(evaluated, alone, tmp_path)
    assert "already in" in capsys.readouterr().out


def test_images_without_a_label_are_predicted_too(evaluated, alone, digits, tmp_path):
    images = (digits[2][:20].reshape(-1, 8, 8) * 15).astype(np.uint8)
    every_second = np.concatenate([[0], np.cumsum(np.arange(20) % 2)])
    for name, labels, starts in (("some", digits[3][1:20:2], every_second), ("none", digits[3][:0], np.zeros(21, int))):
        data = Dataset(name, "all", labels.astype(np.int32), starts, None, "x", lambda row: ("png", png(images[row])))
        path, _ = write_shards(data, tmp_path / name)
        query, applied, report = apply(evaluated, alone, tmp_path / f"{name} out", str(path))
        assert {len(one.predicted) for one in applied} == {20}
        assert report["query"]["labelled"] == len(labels) == (query.labels >= 0).sum()
        for one in applied:
            right = (one.predicted == query.labels)[query.labels >= 0]
            assert one.accuracy == (right.mean() if len(labels) else None)
        assert "probe" in table(report)


def test_other_weights_another_size_or_type_are_refused(evaluated, alone, tiny, drawn, run_folder, tmp_path):
    other = run_folder(tmp_path / "other", drawn(tiny(representation_size=24), 1))
    for changes, message in (
        ({"run": other}, r"these weights have sha256 \w+…, and the probes of .* were fitted to features of \w+…;"),
        ({"image_size": 16}, r"network\.image_size 8, and here it is 16; model\.image_size=8 would be right"),
        ({"dtype": torch.bfloat16}, r"dtype float32, and here it is bfloat16; fewshot\.dtype=float32 would be right"),
    ):
        with pytest.raises(InputError, match=message):
            apply(evaluated, alone, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_images_of_other_classes_are_refused(evaluated, shards):
    saved = read_probes(evaluated[-1])
    more = shards("more", np.zeros((24, 8, 8), np.uint8), np.arange(24) % 12)
    with pytest.raises(InputError, match="4 of 24 images have labels above 9, the highest of the probes"):
        open_query(more, saved)
    with pytest.raises(InputError, match=r"data\.query: null"):
        open_query(None, saved)


def test_labels_without_names_beside_named_ones_are_told(evaluated, alone, tmp_path, shards, capsys):
    named = shards("named", np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10, [f"class {n}" for n in range(10)])
    _, _, report = apply(evaluated, alone, tmp_path, named)
    assert (read_probes(evaluated[-1]).names is None) == ("without names of classes" in table(report))


def test_a_damaged_file_is_refused(evaluated, tmp_path):
    data = (evaluated[-1] / "report" / FILE).read_bytes()
    path = tmp_path / FILE
    for place in (len(data) // 2, data.index(b"sgd"), 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(InputError, match=r"probes .*probes\.safetensors: .*"):
            read_probes(path)
    path.write_bytes(data[:-8])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_probes(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="holds no probes"):
        read_probes(path)


def test_no_file_of_probes_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no probes\.safetensors, also not in report/"):
        read_probes(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_probes(tmp_path / "absent")


def test_which_probes_are_saved_is_configured(evaluated, alone):
    config, run, _, out = evaluated
    protocol = config.fewshot.model_copy(update={"save_probes": ("sgd",), "probes": ("ridge", "sgd"), "shots": (1,)})
    task = open_task(config.data.support, config.data.query, protocol)
    features = [FeatureCache(config, task.splits, out / FOLDER, alone).features(*open_networks([run], None))]
    scores = score_networks(features, task, protocol, CPU)
    assert {(row.probe, row.features) for row in scores.fitted} == {("sgd", "tanh")}
    with pytest.raises(ValueError, match="found 'knn10'; those that can be saved"):
        ProtocolSection(save_probes=("knn10",))
