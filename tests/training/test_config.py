"""Configs are closed: what is wrong is refused with the key, what was found and what would be right."""

import json
import re
from math import inf, nan
from pathlib import Path

import pytest
import torch

from finetune.config import FinetuneConfig
from pretrain.configfile import CONFIG_FOLDER, differences, read_config
from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages
from pretrain.model.spec import spec_from_arch
from pretrain.record.folder import RunFolder
from pretrain.training.config import RunConfig

PRETRAIN = sorted(
    str(path.relative_to(CONFIG_FOLDER))
    for path in CONFIG_FOLDER.rglob("*.json")
    if not {"finetune", "fewshot", "evaluate", "quickstart"} & {*path.relative_to(CONFIG_FOLDER).parts}
    and path.stem not in ("example", "schema")
)
FINETUNE = sorted(str(path.relative_to(CONFIG_FOLDER)) for path in (CONFIG_FOLDER / "finetune").rglob("*.json"))
VTAB = [name for name in FINETUNE if "/vtab/" in name]
SMALL = {
    "name": "small",
    "model": {"arch": "vit_ti_16"},
    "train": {"global_batch": 8, "steps": 4},
    "optimizer": {"lr": 0.1},
}
CPU = {"device": "cpu"}


def zero(stage: int, **said: object) -> dict:
    """A change of SMALL: a `deepspeed` section of this ZeRO stage; what it does not say at its top belongs to ZeRO."""
    top = {key: said.pop(key) for key in ("bf16", "fp16", "data_types") if key in said}
    return {"deepspeed": {**top, "zero_optimization": {"stage": stage, **said}}}


def fewshot(**said: object) -> dict:
    """A change of SMALL: a `fewshot` section."""
    return {"fewshot": {"every": 2, "support": "s", "query": "q", **said}}


def write(folder: Path, tree: object, name: str = "small.json") -> Path:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_there_is_a_recipe_for_every_size():
    assert {"h14.json", "l16.json", "l32.json", "b16.json", "b32.json", "imagenet21k/b16.json"} <= set(PRETRAIN)
    assert {f"finetune/{name}.json" for name in ("imagenet384", "imagenet512", "imagenet518", "cifar10")} <= set(
        FINETUNE
    )


@pytest.mark.parametrize("name", PRETRAIN)
def test_shipped_recipes_hold(name):
    config = read_config(RunConfig, name)
    assert config.train.global_batch == (1024 if name == "imagenet1k/s16_90ep.json" else 4096)
    assert config.schedule.warmup_steps == 10_000
    assert config.data.train is None
    assert config.optimizer.betas == (0.9, 0.999)
    assert (config.data.crop, config.data.crop_area, config.data.crop_aspect) == (
        "tensorflow",
        (0.05, 1.0),
        (0.75, 1.33),
    )


@pytest.mark.parametrize(
    ("name", "epochs", "lr", "weight_decay", "dropout", "decay"),
    [
        ("b16.json", 7, 8e-4, 0.1, 0.0, "linear"),
        ("l32.json", 7, 6e-4, 0.1, 0.0, "linear"),
        ("l16.json", 14, 4e-4, 0.1, 0.0, "linear"),
        ("h14.json", 14, 3e-4, 0.1, 0.0, "linear"),
        ("imagenet21k/l16.json", 90, 1e-3, 0.03, 0.1, "linear"),
        ("imagenet1k/b32.json", 300, 3e-3, 0.3, 0.1, "cosine"),
        ("imagenet1k/s16_90ep.json", 90, 1e-3, 0.1, 0.0, "cosine"),  # not the paper's: Beyer et al. 2022
    ],
)
def test_recipes_are_table_3(name, epochs, lr, weight_decay, dropout, decay):
    config = read_config(RunConfig, name)
    assert config.train.epochs == epochs
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (lr, weight_decay)
    assert (config.model.dropout, config.schedule.decay) == (dropout, decay)


def test_the_90_epoch_recipe_is_the_plain_vit_of_beyer_et_al():
    config = read_config(RunConfig, "imagenet1k/s16_90ep.json")
    spec = config.model.spec()
    assert (spec.layers, spec.width, spec.heads, spec.patch_size) == (12, 384, 6, 16)
    assert (spec.pool, spec.positions, spec.representation_size) == ("mean", "sincos2d", 384)
    assert (config.model.head_bias, config.train.loss, config.train.label_smoothing) == (0, "softmax", 0)
    assert (config.data.randaugment, config.data.mixup, config.data.flip) == ((2, 10), 0.2, True)
    assert config.optimizer.clip_norm == 1
    assert config.train.micro_batch % 2 == 0, "mixup mixes neighbouring pairs"


def test_sizes_beside_arch_replace_its_own(tmp_path):
    path = write(tmp_path, SMALL)
    config = read_config(RunConfig, path, ["model.patch_size=32"])
    assert config.model.spec() == spec_from_arch("vit_ti_16", patch_size=32)
    assert config.model.spec().near() == "vit_ti_16 with patch_size 32 (not 16)"
    record = write(tmp_path, config.model_dump(mode="json"), "config.json")
    assert json.loads(record.read_text())["model"]["arch"] is None, "what is written down says the sizes alone"
    assert read_config(RunConfig, record) == config
    plain = read_config(RunConfig, path)
    assert read_config(RunConfig, path, ["model.patch_size=16"]) == plain, "which trains the same function"
    assert (plain.model.arch, plain.model.patch_size) == ("vit_ti_16", None)


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_configs_take_the_checkpoints_network(name):
    task = read_config(FinetuneConfig, name)
    assert (task.optimizer.name, task.optimizer.weight_decay, task.train.global_batch) == ("sgd", 0.0, 512)
    spec = spec_from_arch("vit_h_14", representation_size=1280, num_classes=18291)
    model = task.of(spec).model.spec()
    assert (model.layers, model.width, model.patch_size) == (32, 1280, 14)
    assert model.representation_size is None
    assert model.image_size == task.model.image_size
    assert (task.data.crop, task.data.crop_aspect) in (("tensorflow", (0.75, 1.33)), ("tensorflow", (1.0, 1.0)))


@pytest.mark.parametrize(
    ("name", "classes", "steps", "warmup", "sweep"),
    [
        ("imagenet384", 1000, 20_000, 500, (0.003, 0.01, 0.03, 0.06)),
        ("cifar10", 10, 10_000, 500, (0.001, 0.003, 0.01, 0.03)),
        ("cifar100", 100, 10_000, 500, (0.001, 0.003, 0.01, 0.03)),
        ("pets", 37, 500, 100, (0.001, 0.003, 0.01, 0.03)),
        ("flowers", 102, 500, 100, (0.001, 0.003, 0.01, 0.03)),
        ("vtab", 1000, 2500, 500, (0.01,)),
    ],
)
def test_fine_tuning_is_table_4(name, classes, steps, warmup, sweep):
    task = read_config(FinetuneConfig, f"finetune/{name}.json")
    assert (task.model.image_size, task.model.num_classes) == (384, classes)
    assert (task.train.steps, task.schedule.warmup_steps, task.schedule.decay) == (steps, warmup, "cosine")
    assert task.optimizer.lr in sweep
    assert (task.optimizer.momentum, task.optimizer.clip_norm) == (0.9, 1.0)


def test_vtab_is_one_recipe_for_19_tasks_but_for_what_would_change_their_labels():
    tasks = {Path(name).stem: read_config(FinetuneConfig, name) for name in VTAB}
    assert {name: task.model.num_classes for name, task in tasks.items()} == {
        "caltech101": 102, "cifar100": 100, "dtd": 47, "flowers": 102, "pets": 37, "svhn": 10, "sun397": 397,
        "camelyon": 2, "eurosat": 10, "resisc45": 45, "retinopathy": 5,
        "clevr_count": 8, "clevr_distance": 6, "dmlab": 6, "kitti_distance": 4,
        "dsprites_location": 16, "dsprites_orientation": 16, "smallnorb_azimuth": 18, "smallnorb_elevation": 9,
    }  # fmt: skip
    base = read_config(FinetuneConfig, "finetune/vtab.json")
    assert base.sweep is None, "the paper sweeps none of them"
    told = {key for task in tasks.values() for key, *_ in differences(base.model_dump(), task.model_dump())}
    assert told == {"name", "model.num_classes", "data.crop_area", "data.crop_aspect", "data.flip"}
    assert {name for name, task in tasks.items() if not task.data.flip} == {
        "svhn", "dsprites_location", "dsprites_orientation", "smallnorb_azimuth", "smallnorb_elevation",
    }  # fmt: skip


@pytest.mark.parametrize("size", [(40, 40), (33, 64), (75, 31)])
def test_a_vtab_task_of_places_is_trained_on_whole_images_as_it_is_evaluated(size):
    task = read_config(FinetuneConfig, "finetune/vtab/dsprites_location.json")
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    expected = EvalImages(24, 3, whole=True)(image, 0, 0)
    for sample in range(3):
        assert torch.equal(task.data.train_images(24, 3, seed=0)(image, 0, sample), expected)


@pytest.mark.parametrize(("name", "size"), [("imagenet512", 512), ("imagenet518", 518)])
def test_table_2_is_fine_tuned_with_an_average_and_dropout(name, size):
    task = read_config(FinetuneConfig, f"finetune/{name}.json")
    assert (task.model.image_size, task.model.dropout, task.train.steps) == (size, 0.1, 20_000)
    averaging = task.optimizer.averaging
    assert averaging is not None
    assert (averaging.decay, averaging.start_step, averaging.debias) == (0.9999, 0, True)


def test_only_cifars_small_images_and_vtab_are_evaluated_whole():
    whole = {name for name in FINETUNE if read_config(FinetuneConfig, name).data.eval_crop == "whole"}
    assert whole == {"finetune/cifar10.json", "finetune/cifar100.json", "finetune/vtab.json", *VTAB}


def test_a_file_elsewhere_extends_a_shipped_one_by_its_name(tmp_path):
    path = write(tmp_path, {"extends": "quickstart/pretrain.json", "name": "mine"})
    found = read_config(RunConfig, path)
    assert (found.name, found.data.train) == ("mine", "data/quickstart/mnist/train")


def test_a_file_that_extends_another_is_laid_over_it(tmp_path):
    write(tmp_path, SMALL, "base.json")
    path = write(tmp_path, {"extends": "base.json", "model": {"num_classes": 7}, "train": {"epochs": 2}})
    config = read_config(RunConfig, path, ["optimizer.lr=0.5", "name=other", 'data.train=["a","b"]'])
    assert config.model.num_classes == 7
    assert config.model.arch == "vit_ti_16"
    assert (config.train.steps, config.train.epochs) == (None, 2), "a length said anew clears the other way to say it"
    assert (config.optimizer.lr, config.name, config.data.train) == (0.5, "other", ("a", "b"))
    assert read_config(RunConfig, path, ["train.steps=9"]).train.epochs is None


def test_a_runs_own_config_is_a_config_again(tmp_path):
    config = read_config(RunConfig, write(tmp_path, SMALL))
    written = config.model_dump(mode="json")
    for further in ({}, {"network": {"layers": 12}, "origin": {"seed": 0}}):  # without them by earlier versions
        RunFolder(tmp_path).write_config({**written, **further})
        assert read_config(RunConfig, tmp_path / "config.json") == config
    earlier = {**config.model_dump(mode="json"), "data": {**config.data.model_dump(mode="json"), "decoder": "host"}}
    assert read_config(RunConfig, write(tmp_path, earlier, "earlier.json")) == config
    earlier["data"]["decoder"] = "device"
    with pytest.raises(InputError, match=r"data\.decoder: unknown key"):
        read_config(RunConfig, write(tmp_path, earlier, "earlier.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": {}}, ("modle", "unknown key", "did you mean model?")),
        ({"train": {"global_batch": 8, "step": 4}}, ("train.step", "did you mean train.steps?")),
        ({"versions": 3}, ("versions: unknown key",)),  # as a run's record has it, but not as it has it
        ({"network": {}, "origin": {"seed": 1}}, ("network: unknown key", "origin: unknown key")),
        ({"versions": {}, "git_commit": None, "command": "x"}, ("git_commit: unknown key", "command: unknown key")),
        ({"lr": 3}, ("lr", "did you mean optimizer.lr?")),
        ({"train": {"global_batch": "8", "steps": 4}}, ("train.global_batch", '"8"', "integer")),
        ({"train": {"global_batch": 8, "steps": 4.5}}, ("train.steps", "4.5", "integer")),
        ({"train": {"global_batch": 0, "steps": 4}}, ("train.global_batch", "0", "greater than 0")),
        ({"train": {"global_batch": 8}}, ("train", "exactly one of steps and epochs")),
        ({"train": {"global_batch": 8, "steps": 1, "epochs": 1}}, ("exactly one of steps and epochs",)),
        ({"model": {"arch": "vit_h_15"}}, ("model.arch", "did you mean vit_h_14?")),
        (
            {"model": {"arch": "vit_h_14", "patch_size": 14, "layers": 3, "width": 64, "mlp": 256, "heads": 4}},
            ("model: arch 'vit_h_14' has no effect where patch_size, layers", "set to null the sizes"),
        ),
        ({"model": {"width": 8}}, ("model", "patch_size, layers, mlp, heads")),
        ({"model": {"arch": "vit_b_16", "image_size": 8}}, ("model.image_size",)),
        ({"train": {"global_batch": 8, "steps": 4, "loss": "mse"}}, ("train.loss", '"mse"', "softmax")),
        ({"deepspeed": {"optimizer": {}}}, ("deepspeed", "optimizer follows from optimizer.*")),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, ("zero_optimization.stage: found 4", "equal to 3")),
        ({"deepspeed": {"zero_optimisation": {"stage": 3}}}, ("zero_optimisation: unknown", "mean deepspeed.zero_opt")),
        ({"deepspeed": {"sequence_parallel_size": 2}}, ("sequence_parallel_size: unknown key", "known here: zero_opt")),
        (zero(1, reduce_buckets=5), ("zero_optimization.reduce_buckets: unknown", "reduce_bucket_size?")),
        (zero(3, zero_quantized_weights=True), ("quantized_weights: found true; not offered: what is comm",)),
        ({"deepspeed": {"zero_optimization": 1}}, ("zero_optimization: found 1; input should be an object, as in {",)),
        ({"deepspeed": {"bf16": {"enabled": "False"}}}, ('bf16.enabled: found "False"', "true or false", '"auto"')),
        ({"deepspeed": {"bf16": {"enabled": True}}}, ("bf16", "zero_optimization.stage to 1, 2 or 3")),
        ({"deepspeed": {"fp16": {"enabled": True}}}, ("fp16 keeps its fp32 weights in ZeRO's partitions",)),
        ({"deepspeed": {"fp16": {"enabled": "auto"}}}, ('fp16.enabled: found "auto"', "true or false")),
        (zero(2, bf16={"enabled": True}, fp16={"enabled": True}), ("bf16 and fp16 are both enabled",)),
        (zero(1, bf16={"enabled": True, "check_grad_overflow": False}), ("bf16.check_grad_overflow must be true",)),
        (zero(1, bf16={"enabled": True, "bf16_optimizer_states": True}), ("bf16_optimizer_states", "kept in fp32")),
        (zero(1, data_types={"grad_accum_dtype": "bf16"}), ("data_types.grad_accum_dtype", 'found "bf16"', '"fp32"')),
        (zero(0, offload_optimizer=CPU), ("offload_optimizer", "stage to 1, 2 or 3", "found 0")),
        (zero(2, offload_param=CPU), ("offload_param", "zero_optimization.stage to 3, found 2")),
        (zero(3, offload_param=CPU), ("offload_param goes with the optimizer", "offload_optimizer")),
        (zero(3, offload_optimizer={"device": "nvme"}), ('device: found "nvme"; input should be "cpu" or "none"',)),
        (zero(3, offload_optimizer={"device": "disk"}), ('offload_optimizer.device: found "disk"',)),
        (zero(3, offload_optimizer="cpu"), ('offload_optimizer: found "cpu"; input should be an object or null',)),
        (zero(3, offload_optimizer={**CPU, "ratio": 0.5}), ("ratio: unknown key; known here: device, pin_memory",)),
        (zero(2, cpu_offload=True), ("zero_optimization.cpu_offload: found true; not offered: set offload_optimizer",)),
        (zero(2, zenflow={"topk_ratio": 0.1}), ("zero_optimization.zenflow: found", "not offered")),
        (
            {"train": {"global_batch": 8, "steps": 4, "activation_checkpointing": "ful"}},
            ("train.activation_checkpointing", '"ful"', '"none", "full" or "selective"', "integer"),
        ),
        (
            {"train": {"global_batch": 8, "steps": 4, "activation_checkpointing": 0}},
            ("train.activation_checkpointing", "found 0", "greater than 0"),
        ),
        ({"train": {"global_batch": 8, "steps": 4, "compile": 1}}, ("train.compile", "found 1", "true or false")),
        ({"optimizer": {"lr": 0.1, "betas": [2, 2]}}, ("optimizer.betas", "less than 1")),
        ({"data": {"crop_area": [1, 0.5]}}, ("data.crop_area", "low <= high")),
        ({"data": {"randaugment": [2, 31]}}, ("data.randaugment.1", "31", "less than or equal to 30")),
        ({"data": {"randaugment": [0, 10]}}, ("data.randaugment.0", "0", "greater than 0")),
        ({"data": {"mixup": -0.2}}, ("data.mixup", "-0.2", "greater than or equal to 0")),
        ({"train": {"global_batch": 8, "steps": 4, "label_smoothing": 1}}, ("label_smoothing", "1", "less than 1")),
        ({"name": None}, ("name", "null", "string")),
        ({"seed": -1}, ("seed: found -1", "greater than or equal to 0")),
        *(({"name": name}, (f"name: found {name!r}; a folder's name",)) for name in ("", ".", "..", "a/b", "a\0")),
        ({"model": {"arch": "vit_ti_16", "head_bias": nan}}, ("model.head_bias", "found NaN", "finite")),
        ({"model": {"arch": "vit_ti_16", "head_bias": -inf}}, ("model.head_bias", "found -Infinity", "finite")),
        ({"optimizer": {"lr": 0.1, "eps": inf}}, ("optimizer.eps", "found Infinity", "finite")),
        ({"optimizer": {"lr": 0.1, "weight_decay": inf}}, ("optimizer.weight_decay", "found Infinity", "finite")),
        ({"data": {"crop_area": [0.05, 1.5]}}, ("data.crop_area.1", "1.5", "less than or equal to 1")),
        ({"data": {"crop_aspect": [0.5, inf]}}, ("data.crop_aspect.1", "found Infinity", "finite")),
        (fewshot(shots=[0]), ("fewshot.shots: found [0]; shots are images of each class, 1 or more",)),
        (fewshot(shots=[]), ("fewshot.shots: found []; at least one",)),
        (fewshot(shots=[5, 5]), ("fewshot.shots: found [5, 5]; name each once",)),
        (fewshot(seeds=[-1]), ("fewshot.seeds: found [-1]; seeds are 0 or more",)),
        (fewshot(seeds=[]), ("fewshot.seeds: found []; at least one",)),
        (fewshot(l2=inf), ("fewshot.l2", "found Infinity", "finite")),
        (
            {"train": {"global_batch": 8, "steps": 4, "hang_minutes": 5}},
            ("data.patience_minutes is 5, train.hang_minutes is 5", "below train.hang_minutes would be right"),
        ),
        ({"data": {"patience_minutes": 12}}, ("data.patience_minutes is 12", "train.hang_minutes is 10")),
        (
            {"train": {"global_batch": 8, "steps": 4, "slow_minutes": 4.5}},
            ("data.patience_minutes is 5", "train.slow_minutes is 4.5"),
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, words, tmp_path):
    path = write(tmp_path, {**SMALL, **change})
    with pytest.raises(InputError) as refusal:
        read_config(RunConfig, path)
    for word in (str(path), *words):
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["train.steps=0"], "override train.steps: found 0;"),
        (["trian.steps=5"], "override trian: unknown key;"),
        (["optimizer.lr.x=1"], 'override optimizer.lr: found {"x": 1};'),
        (['fewshot={"every":1,"support":"a"}'], "override fewshot.query: missing;"),
        (["seed=1", "data.patience_minutes=12"], "config {path} with seed=1 data.patience_minutes=12: data.patience"),
        (["train.steps=null"], "config {path} with train.steps=null: train: set exactly one"),
        (["seed=1"], "config {path}: train.loss: found"),
    ],
)
def test_an_override_at_fault_is_told_apart_from_the_file(overrides, start, tmp_path):
    loss = {"loss": "mse"} if overrides == ["seed=1"] else {}
    path = write(tmp_path, {**SMALL, "train": {**SMALL["train"], **loss}})
    with pytest.raises(InputError) as refusal:
        read_config(RunConfig, path, overrides)
    assert str(refusal.value).startswith(start.replace("{path}", str(path)))


def test_a_config_may_hold_comments_and_name_its_schema(tmp_path):
    lines = json.dumps({"$schema": "schema.json", **SMALL, "data": {"train": "http://host//x"}}, indent=1).split("\n")
    text = "\n  // one // and another\n".join(lines)
    assert read_config(RunConfig, write(tmp_path, text)).data.train == "http://host//x"
    with pytest.raises(InputError, match=r"no JSON at line 3, column 1"):
        read_config(RunConfig, write(tmp_path, "// a\n{\n/ b\n}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("line 1", "no JSON")),
        ("[]", ("expected a JSON object",)),
        ('{"name": "a", "name": "b"}', ("'name'", "twice")),
        ('{"extends": "gone.json"}', ("gone.json",)),
        ('{"extends": "small.json"}', ("extends itself",)),
        ('{"extends": "%s"}' % ("x" * 300), ("/xxx", "File name too long; a shorter name would be right")),
        ('{"extends": "a\\u0000"}', ("a\\x00': not a path",)),
        ('{"seed": %s}' % ("9" * 5000), ("cannot be read", "4300 digits")),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, words, tmp_path):
    with pytest.raises(InputError) as refusal:
        read_config(RunConfig, write(tmp_path, text))
    for word in words:
        assert word in str(refusal.value)


def test_a_config_that_is_not_there_names_the_nearest():
    with pytest.raises(InputError, match=r"h_14\.json: no such file.*did you mean h14\.json\?"):
        read_config(RunConfig, "h_14.json")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.randaugment=2,10", "'data.randaugment=[2,10]'"),
        ("data.randaugment=[2", "override data.randaugment: [2 is no JSON; 'data.randaugment=[2,10]' would be right"),
        ("data.train=[a,b]", """'data.train=["DIR","DIR2"]' would be right"""),  # as a shell leaves ["a","b"]
        ("data.crop_area=0.5", "'data.crop_area=[0.05,1.0]'"),
        ("data.crop_area=[0.5]", "'data.crop_area=[0.05,1.0]'"),
        ("optimizer.averaging=0.9999", """'optimizer.averaging={"decay":0.9999}'"""),
        ("train.guard=5", """'train.guard={"skips":3"""),
        ("deepspeed=zero", """'deepspeed={"zero_optimization":{"stage":1}}'"""),
        ("fewshot=a", """'fewshot={"every":1000,"support":"DIR","query":"DIR2"}'"""),
        ("optimizer.averaging=none", "input should be an object or null, as in"),
        ("checkpoint.every=none", 'found "none"; input should be a valid integer or null'),
        ("data.flip=no", 'found "no"; input should be true or false'),
        ("name=5", """'name="5"'"""),
        ("name=1.10", """found 1.10; input should be a valid string, as in 'name="1.10"'"""),
        ("name=1e3", """'name="1e3"'"""),
        ("name=null", """'name="null"'"""),
        ("data.train=2012", """'data.train="2012"'"""),
        ("data.train=[]", "data.train: found []; at least one is needed"),
        ("data.eval=[]", "data.eval: found []; at least one is needed"),
        ('fewshot={"every":1,"support":"a","query":[]}', "fewshot.query: found []; at least one is needed"),
        ("data.train=", 'data.train: found ""; string should have at least 1 character'),
        ('data.eval=["a",""]', 'data.eval.1: found ""; string should have at least 1 character'),
    ],
)
def test_an_override_of_the_wrong_form_is_told_what_to_type(override, words, tmp_path):
    with pytest.raises(InputError) as refusal:
        read_config(RunConfig, write(tmp_path, SMALL), [override])
    assert words in str(refusal.value)


def test_frozen_parameters_get_no_gradient_which_deepspeed_must_accept(tmp_path):
    strict = "deepspeed.zero_optimization.ignore_unused_parameters=false"
    assert read_config(RunConfig, write(tmp_path, SMALL), [strict])
    with pytest.raises(InputError, match=r"ignore_unused_parameters is false, but what train\.freeze freezes gets no"):
        read_config(RunConfig, write(tmp_path, SMALL), [strict, "train.freeze=body"])


def test_a_list_that_is_missing_in_a_file_is_shown_as_json(tmp_path):
    with pytest.raises(InputError, match=r'found "2,10"; .*, as in \[2,10\]$'):
        read_config(RunConfig, write(tmp_path, {**SMALL, "data": {"randaugment": "2,10"}}))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("train.drop_path", "did you mean model.drop_path?"),
        ("train.batch_size", "known here: global_batch, micro_batch"),
        ("train.lr", "did you mean optimizer.lr?"),
        ("lr", "did you mean optimizer.lr?"),
        ("data.every", "did you mean checkpoint.every or logging.every or fewshot.every?"),
        ("optimizer.averaging.decai", "did you mean optimizer.averaging.decay?"),
    ],
)
def test_only_a_name_that_is_near_is_offered(wrong, hint, tmp_path):
    with pytest.raises(InputError, match=re.escape(f"{wrong}: unknown key; {hint}")):
        read_config(RunConfig, write(tmp_path, SMALL), [f"{wrong}=1"])


def test_pythons_words_are_jsons(tmp_path):
    path = write(tmp_path, {**SMALL, "data": {"eval": "set"}})
    config = read_config(RunConfig, path, ["data.eval=None", "data.flip=False", "data.audit=True", "fewshot=NULL"])
    assert (config.data.eval, config.data.flip, config.data.audit, config.fewshot) == (None, False, True, None)
    assert read_config(RunConfig, path, ['data.eval="None"']).data.eval == "None"
    assert (
        read_config(RunConfig, path, ["train.activation_checkpointing=none"]).train.activation_checkpointing == "none"
    )


def test_a_whole_number_may_have_an_exponent(tmp_path):
    text = json.dumps(SMALL).replace('"steps": 4', '"steps": 1e4')
    config = read_config(RunConfig, write(tmp_path, text), ["data.read_ahead_mib=2.0e3", "optimizer.lr=1e-3"])
    assert (config.train.steps, config.data.read_ahead_mib, config.optimizer.lr) == (10_000, 2000, 1e-3)


def test_an_override_needs_a_key_and_a_value(tmp_path):
    with pytest.raises(InputError, match=r"expected key\.path=value"):
        read_config(RunConfig, write(tmp_path, SMALL), ["train.steps"])


def test_differences_name_dotted_keys():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == [("a.c", 2, 4), ("d", 3, None), ("e", None, 5)]
