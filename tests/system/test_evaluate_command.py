"""launch/evaluate.py from the outside: statuses, messages, reports."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset

from finetune.evaluation.config import DataSection, EvaluateConfig
from finetune.evaluation.evaluate import images_of, kind_of
from finetune.evaluation.sets import check_network, open_sets
from pretrain.datasets.dataset import array_dataset
from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages, to_float
from pretrain.index.index import Index
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.ranks.collectives import World
from pretrain.shards.scan import index_shards
from pretrain.shards.write import write_shards as build_shards
from pretrain.stream.loader import LoaderOptions, evaluation_batches
from pretrain.weights.export import export
from pretrain.weights.load import choose
from pretrain.weights.networks import open_networks
from pretrain.weights.read import FORMATS

COMMAND = "launch/evaluate.py"
CONFIG = {"name": "small", "data": {"workers": 1}, "evaluate": {"batch": 16}}
STRANGE = '<script>alert("x")</script>|$\\frac{$`*b*\x1b[31m\n'


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(CONFIG))
    return path


def drawn(seed=0, **fields):
    """A small network for the digits whose classification layer is no longer zeros."""
    sizes = {"patch_size": 4, "layers": 1, "width": 16, "mlp": 32, "heads": 2, "image_size": 8, "channels": 1}
    model = VisionTransformer(ViTSpec(**{**sizes, "num_classes": 10, **fields})).eval()
    initialize(model, seed)
    if model.spec.num_classes:
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_folder):
    """Run folders: `a`, which keeps an average, and `b`."""
    folder = tmp_path_factory.mktemp("runs")
    run_folder(folder / "a", drawn(0), average=drawn(1))
    run_folder(folder / "b", drawn(2))
    return folder


def report_in(out):
    return json.loads((out / "evaluation" / "report.json").read_text(), parse_constant=pytest.fail)


def lines_in(out, row):
    return [json.loads(line) for line in (out / "evaluation" / row["predictions"]).read_text().splitlines()]


def test_one_two_and_three_ranks_write_the_same_bytes(config, runs, digits, tmp_path, run):
    words = ("--config", config, "--init", runs / "a", f"data.eval={digits / 'test'}")
    files = {}
    for ranks in (1, 2, 3):
        done = run(COMMAND, *words, "--out", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == 1
        folder = tmp_path / str(ranks) / "evaluation"
        files[ranks] = {path.name: path.read_bytes() for path in folder.iterdir()}
        report = json.loads(files[ranks].pop("report.json"))
        assert report["run"].pop("ranks") == ranks
        files[ranks]["report"] = {key: value for key, value in report.items() if key != "seconds"}
    names = {"report.md", "report.html", "confusion.png", "reliability.png", "predictions_a.jsonl"}
    assert set(files[1]) == {"report", *names}
    assert files[1] == files[2] == files[3]

    # As a network by hand says, of batches of 16 by id.
    index = Index.open(digits / "test")
    batches = evaluation_batches(index, EvalImages(8, 1), LoaderOptions(workers=1), batch=16)
    with torch.no_grad():
        logits = torch.cat([drawn(0)(to_float(batch.images, torch.float32)) for batch in batches])[: index.samples]
    best = logits.softmax(dim=1).topk(5, dim=1)
    for number, line in enumerate(lines_in(tmp_path / "3", {"predictions": "predictions_a.jsonl"})):
        assert (line["id"], line["labels"]) == (number, index.labels([number])[0].tolist())
        assert line["classes"] == best.indices[number].tolist()
        assert line["probabilities"] == pytest.approx(best.values[number].tolist(), rel=1e-5)
    top1 = (best.indices[:, 0].numpy() == index.labels(np.arange(index.samples))[:, 0]).mean()
    assert report_in(tmp_path / "1")["results"][0]["top1"] == top1


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores_are_those_that_the_run_has_logged(loss, config, digits, tiny_config, tmp_path, run):
    sections = {
        "data": {"eval": str(digits / "test"), "eval_crop": "whole"},
        "train": {"steps": 12, "loss": loss},
        "optimizer": {"averaging": {"decay": 0.5}},
    }
    path, out = tiny_config(tmp_path / "tiny.json", **sections), tmp_path / "run"
    assert run("launch/pretrain.py", "--config", path, "--out", out).returncode == 0
    logged = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    words = ("--config", config, "--init", out, "--weights", "both", f"data.eval={digits / 'test'}")
    done = run(COMMAND, *words, "--out", tmp_path / "out", "evaluate.batch=24")
    assert done.returncode == 0, done.stderr
    raw, averaged = report_in(tmp_path / "out")["results"]
    for row, prefix in ((raw, ""), (averaged, "averaged/")):
        assert (row["top1"], row["top5"]) == (logged[f"{prefix}eval/top1"], logged[f"{prefix}eval/top5"])
        assert row["loss"] == pytest.approx(logged[f"{prefix}eval/loss"], rel=1e-5)
    one, _ = report_in(tmp_path / "out")["weights"]
    assert one["probabilities"] == loss
    assert one["preprocessing"].startswith("the whole image")
    assert raw["loss"] != averaged["loss"]


@pytest.fixture(scope="module")
def real(digits, tmp_path_factory):
    """The test digits under lists of labels: none, their own, or their own and the next class."""
    shards = tmp_path_factory.mktemp("real")
    index = Index.open(digits / "test")
    with webdataset.TarWriter(str(shards / "shard-000.tar")) as tar:
        for sample in webdataset.WebDataset(str(next((digits / "test").glob("*.tar"))), shardshuffle=False):
            label, number = int(sample["cls"]), int(sample["__key__"])
            lists = ([], [label], [label, (label + 1) % 10])[number % 3]
            tar.write({"__key__": sample["__key__"], "png": sample["png"], "json": lists})
    index_shards([shards], workers=1)
    assert Index.open(shards).samples == index.samples
    return shards


def test_real_labels_are_scored_beside_the_others(config, runs, digits, real, tmp_path, run):
    words = ("--config", config, "--init", runs / "a", f"data.eval={digits / 'test'}", f"data.real={real}")
    done = run(COMMAND, *words, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    plain, lists = report_in(tmp_path)["results"]
    assert (plain["set"], lists["set"]) == ("eval", "real")
    assert lists["predictions"] == "predictions_a_real.jsonl"
    lines = lines_in(tmp_path, lists)
    right = [line["classes"][0] in line["labels"] for line in lines if line["labels"]]
    assert (lists["top1"], lists["images"]) == (sum(right) / len(right), len(right))
    assert lists["unlabelled"] == sum(not line["labels"] for line in lines) > 100
    keys = [{line["key"]: line["classes"] for line in lines_in(tmp_path, row)} for row in (plain, lists)]
    assert keys[0] == keys[1]
    assert f"{100 * lists['top1']:.2f}" in done.stdout
    assert "ReaL on" in done.stdout
    told = f"data.real: {lists['unlabelled']} of 355 images have no label and are not scored\n"
    assert told in done.stdout
    # Alone, under any key, lists are scored by the same rule.
    alone = run(COMMAND, *words[:4], f"data.eval={real}", "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    [row] = report_in(tmp_path / "alone")["results"]
    assert {**row, "set": "real", "predictions": lists["predictions"]} == lists


def test_other_networks_sizes_and_indices_stand_side_by_side_and_reports_are_kept(config, runs, digits, tmp_path, run):
    both = ("--init", runs / "a", "--init", runs / "b", f"data.eval={digits / 'train'}")
    words = ("--config", config, *both, "model.image_size=16", "--out", tmp_path)
    assert run(COMMAND, *words).returncode == 0
    report = report_in(tmp_path)
    assert [(one["id"], one["image_size"], one["trained_image_size"]) for one in report["weights"]] == [
        ("a", 16, 8),
        ("b", 16, 8),
    ]
    other = run(COMMAND, *words[:4], *words[6:])
    assert f"kept as {tmp_path / 'evaluation-1'}" in other.stdout
    kept = json.loads((tmp_path / "evaluation-1" / "report.json").read_text())
    assert kept["results"] == report["results"]
    assert report_in(tmp_path)["results"] == report["results"][:1]


def test_names_and_keys_from_outside_are_shown_as_they_are(config, encoded, runs, run_folder, tmp_path, run):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    names = [STRANGE, *(f"_{number}_" for number in range(9))]
    build_shards(array_dataset("strange", "all", pixels, np.arange(40) % 10, names), tmp_path / "set")
    done = run(COMMAND, "--config", config, "--init", runs / "a", f"data.eval={tmp_path / 'set'}", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page, text = ((tmp_path / "evaluation" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;|$\\frac{$`*b*\\x1b[31m\\n" in page
    assert '| \\<script\\>alert("x")\\</script\\>\\|\\$\\\\frac{\\$\\`\\*b\\*\\\\x1b\\[31m\\\\n | 4 |' in text
    assert report_in(tmp_path)["class_names"] == names

    keys = ['a"b', "ü/✓", "x,y;z", "<b>"]
    (tmp_path / "keys").mkdir()
    with webdataset.TarWriter(str(tmp_path / "keys" / "shard-000.tar")) as tar:
        for number, key in enumerate(keys):
            tar.write({"__key__": key, "png": encoded(pixels[number]), "cls": number})
    index_shards([tmp_path / "keys"], workers=1)
    words = ("--config", config, "--init", runs / "a", f"data.eval={tmp_path / 'keys'}", "--out", tmp_path / "second")
    done = run(COMMAND, *words)
    assert done.returncode == 0, done.stderr
    [row] = report_in(tmp_path / "second")["results"]
    assert [line["key"] for line in lines_in(tmp_path / "second", row)] == keys
    assert "a: has 10 outputs, data.eval 4 classes; a prediction of any other output is wrong\n" in done.stdout


def test_an_image_that_does_not_decode_is_told_and_a_miss(config, runs, write_shards, encoded, tmp_path, run):
    images = {number: encoded(np.full((8, 8), number, np.uint8)) for number in range(30)}
    images[7] = images[7][:40]
    made = write_shards("set", [30], suffixes=("png",), replace=images)
    words = ("--config", config, "--init", runs / "a", f"data.eval={made.folder}", "--out", tmp_path / "out")
    done = run(COMMAND, *words, ranks=2)
    assert done.returncode == 0, done.stderr
    [row] = report_in(tmp_path / "out")["results"]
    lines = lines_in(tmp_path / "out", row)
    assert lines[7] == {"id": 7, "key": "sample/000007", "labels": [0], "unreadable": True}
    right = sum("classes" in line and line["classes"][0] in line["labels"] for line in lines)
    assert (row["top1"], row["unreadable"], row["images"]) == (right / 30, 1, 30)
    assert "data.eval: images that do not decode and count as misses: 1\n" in done.stdout


@pytest.fixture(scope="module")
def faults(runs, run_folder, tmp_path_factory):
    """Weights that cannot be evaluated, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("faults")
    headless, zeros, diverged = drawn(num_classes=0), drawn(), drawn()
    torch.nn.init.zeros_(zeros.head.weight)
    torch.nn.init.constant_(diverged.blocks[0].norm1.weight, float("nan"))
    run_folder(folder / "headless", headless)
    run_folder(folder / "zeros", zeros)
    run_folder(folder / "diverged", diverged)
    run_folder(folder / "few", drawn(num_classes=7))
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "RUNS/a"], "data.eval: null; set it to an INDEX"),
        (["data.eval=DIGITS/test"], "required: --init"),
        (["--init", "RUNS/b", "--weights", "both", "data.eval=DIGITS/test"], "keeps no averaged weights"),
        (["--init", "FAULTS/zeros", "data.eval=DIGITS/test"], "the classification layer is all zeros"),
        (["--init", "FAULTS/diverged", "data.eval=DIGITS/test"], "diverged on data.eval: logits are not finite"),
        (
            ["--init", "RUNS/a", "--init", "FAULTS/few", "data.eval=DIGITS/test"],
            "data.eval: has labels up to 9, and the network of FAULTS/few has 7 outputs",
        ),
    ],
)
def test_a_fault_is_status_2_and_one_message(words, message, config, runs, faults, digits, tmp_path, run):
    def placed(text):
        for name, path in (("RUNS", runs), ("DIGITS", digits), ("FAULTS", faults)):
            text = text.replace(name, str(path))
        return text

    done = run(COMMAND, "--config", config, "--out", tmp_path / "out", *map(placed, words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert placed(message) in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


ALONE = World(0, 1, 0, torch.device("cpu"))


def test_a_network_without_a_classification_layer_is_refused(faults, digits):
    [network] = open_networks([faults / "headless"], None)
    with pytest.raises(InputError, match=r"headless: the network has no classification layer.*launch/fewshot\.py"):
        check_network(network, open_sets(DataSection(eval=str(digits / "test")), ALONE))


def test_sets_that_do_not_go_together_are_refused(digits, write_shards, tmp_path):
    test = str(digits / "test")
    with pytest.raises(InputError, match=r"data\.real: its images have one label each"):
        open_sets(DataSection(eval=test, real=test), ALONE)
    with pytest.raises(InputError, match=r"data\.eval: .*holds the samples of .* again"):
        open_sets(DataSection(eval=(test, test)), ALONE)
    pixels = np.zeros((4, 8, 8), np.uint8)
    for name, classes in (("ab", ["a", "b"]), ("ba", ["b", "a"])):
        lists = replace(array_dataset(name, "all", pixels, [0, 1, 0, 1], classes), starts=np.arange(5))
        build_shards(lists, tmp_path / name)
    with pytest.raises(InputError, match=r"data\.real: class 0 is 'b' here and 'a' in data\.eval"):
        open_sets(DataSection(eval=str(tmp_path / "ab"), real=str(tmp_path / "ba")), ALONE)
    empty = write_shards("empty", [5], labels=lambda number: [])
    with pytest.raises(InputError, match=r"data\.eval: none of the 5 images has a label"):
        open_sets(DataSection(eval=str(empty.folder)), ALONE)


def test_an_export_is_evaluated_as_its_run(runs, run_folder, tmp_path):
    """It tells the loss and the crop, without which probabilities and images would be others."""
    recorded = {"train": {"loss": "sigmoid"}, "data": {"eval_crop": "whole", "workers": 3}}
    path = run_folder(tmp_path / "run", drawn(channels=3), config=recorded)
    export(choose(path), FORMATS["safetensors"], tmp_path / "vit.safetensors")
    for weights in (path, tmp_path / "vit.safetensors"):
        [network] = open_networks([weights], None)
        config = EvaluateConfig(name="a")
        assert (kind_of(network, config), images_of(network, config).whole) == ("sigmoid", True)
        said = EvaluateConfig(name="a", data={"eval_crop": "centre"}, evaluate={"probabilities": "softmax"})
        assert (kind_of(network, said), images_of(network, said).whole) == ("softmax", False)
    [other] = open_networks([runs / "a"], None)
    assert (kind_of(other, config), images_of(other, config).whole) == ("softmax", False)


def test_a_shard_that_was_cut_ends_all_ranks_with_one_message(config, runs, write_shards, tmp_path, run):
    made = write_shards("set", [30, 30])
    data = made.shard(1).read_bytes()
    made.shard(1).write_bytes(data[: len(data) // 2 // 512 * 512] + bytes(len(data) - len(data) // 2 // 512 * 512))
    words = ("--config", config, "--init", runs / "a", f"data.eval={made.folder}", "--out", tmp_path / "out")
    done = run(COMMAND, *words, ranks=2)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    assert str(made.shard(1)) in done.stderr
