"""Google's `.npz` in both dialects: a NumPy network written from the table, and timm's, give what ours gives."""

import zipfile

import numpy as np
import pytest
import torch

from pretrain.errors import InputError
from pretrain.model.spec import ARCHITECTURES, ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.weights.export import export
from pretrain.weights.load import choose, find, load_weights
from pretrain.weights.read import FORMATS

SIZES = {"layers": 3, "width": 16, "heads": 4, "mlp": 24, "patch_size": 4}
GRID = 3
SIDE = GRID * SIZES["patch_size"]
VIT_JAX = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3", "Transformer/posembed_input/pos_embedding")
BIG_VISION = ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0", "pos_embedding")


def google(
    dialect, *, cls=True, positions=True, representation=None, classes=5, channels=3, sizes=SIZES, grid=GRID, scale=0.3
):
    """Random arrays in the names of a dialect, as the table has them."""
    attention, norm2, mlp, position = dialect
    width, heads, patch = sizes["width"], sizes["heads"], sizes["patch_size"]
    draw = np.random.default_rng(0)
    arrays = {}

    def add(name, *shape):
        arrays[name] = draw.standard_normal(shape, np.float32) * np.float32(scale)

    def dense(name, inputs, outputs):
        add(f"{name}/kernel", *inputs, *outputs)
        add(f"{name}/bias", *outputs)

    def norm(name):
        add(f"{name}/scale", width)
        add(f"{name}/bias", width)

    dense("embedding", (patch, patch, channels), (width,))
    if cls:
        add("cls", 1, 1, width)
    if positions:
        add(position, 1, grid**2 + (cls and dialect is VIT_JAX), width)
    for number in range(sizes["layers"]):
        block = f"Transformer/encoderblock_{number}"
        norm(f"{block}/LayerNorm_0")
        for one in ("query", "key", "value"):
            dense(f"{block}/{attention}/{one}", (width,), (heads, width // heads))
        dense(f"{block}/{attention}/out", (heads, width // heads), (width,))
        norm(f"{block}/{norm2}")
        dense(f"{block}/{mlp}/Dense_0", (width,), (sizes["mlp"],))
        dense(f"{block}/{mlp}/Dense_1", (sizes["mlp"],), (width,))
    norm("Transformer/encoder_norm")
    if representation:
        dense("pre_logits", (width,), (representation,))
    if classes:
        dense("head", (representation or width,), (classes,))
    return arrays


def forward(arrays, images, dialect):
    """Logits [b, k] of images [b, h, w, c], in fp64 and with nothing of ours."""
    attention, norm2, mlp, position = dialect
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def dense(name, x):
        return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    b, size, _, channels = images.shape
    patch, *_, width = arrays["embedding/kernel"].shape
    grid = size // patch
    patches = images[:, : grid * patch, : grid * patch].reshape(b, grid, patch, grid, patch, channels)
    x = np.einsum("bypxqc,pqcd->byxd", patches, arrays["embedding/kernel"]) + arrays["embedding/bias"]
    x = x.reshape(b, grid**2, width)
    positions = arrays.get(position, sines(grid, width)) if dialect is BIG_VISION else 0
    x = x + positions
    if "cls" in arrays:
        x = np.concatenate([np.tile(arrays["cls"], (b, 1, 1)), x], axis=1)
    if dialect is VIT_JAX:
        x = x + arrays[position]
    blocks = 1 + max(int(name.split("/")[1].split("_")[1]) for name in arrays if "/encoderblock_" in name)
    for number in range(blocks):
        block = f"Transformer/encoderblock_{number}"
        y = norm(f"{block}/LayerNorm_0", x)
        q, k, v = (
            np.einsum("bnd,dhe->bhne", y, arrays[f"{block}/{attention}/{one}/kernel"])
            + arrays[f"{block}/{attention}/{one}/bias"][None, :, None]
            for one in ("query", "key", "value")
        )
        weights = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bhne,hed->bnd", weights @ v, arrays[f"{block}/{attention}/out/kernel"])
        x = x + out + arrays[f"{block}/{attention}/out/bias"]
        y = dense(f"{block}/{mlp}/Dense_0", norm(f"{block}/{norm2}", x))
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(f"{block}/{mlp}/Dense_1", y)
    x = norm("Transformer/encoder_norm", x)
    x = x[:, 0] if "cls" in arrays else x.mean(1)
    if "pre_logits/kernel" in arrays:
        x = np.tanh(dense("pre_logits", x))
    return dense("head", x) if "head/kernel" in arrays else x


def sines(grid, width):
    y, x = np.mgrid[:grid, :grid]
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def pictures(size=SIDE, channels=3):
    return np.random.default_rng(1).uniform(-1, 1, (2, size, size, channels))


def saved(path, arrays, prefix=""):
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})
    return path


def logits(path, images):
    with torch.no_grad():
        return load_weights(path).model()(torch.from_numpy(images).float().permute(0, 3, 1, 2)).numpy()


def stacked(arrays):
    """The arrays of a scanned network: those of all blocks in one, layers first."""
    apart = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    first = "Transformer/encoderblock_0/"
    for name in [name for name in arrays if name.startswith(first)]:
        rest = name.removeprefix(first)
        blocks = [arrays[f"Transformer/encoderblock_{number}/{rest}"] for number in range(SIZES["layers"])]
        apart[f"Transformer/encoderblock/{rest}"] = np.stack(blocks)
    return apart


@pytest.mark.parametrize(
    ("dialect", "options"),
    [
        (VIT_JAX, {}),
        (VIT_JAX, {"representation": 6}),
        (VIT_JAX, {"cls": False, "channels": 1}),
        (VIT_JAX, {"classes": 0}),
        (BIG_VISION, {}),
        (BIG_VISION, {"cls": False, "representation": 6}),
    ],
)
def test_a_numpy_network_of_the_table_gives_our_logits(dialect, options, tmp_path):
    arrays, images = google(dialect, **options), pictures(channels=options.get("channels", 3))
    found = logits(saved(tmp_path / "vit.npz", arrays), images)
    np.testing.assert_allclose(found, forward(arrays, images, dialect), atol=1e-5)
    spec = load_weights(tmp_path / "vit.npz").spec
    assert spec == ViTSpec(
        **SIZES, image_size=SIDE, channels=options.get("channels", 3), num_classes=options.get("classes", 5),
        gelu="tanh",
        pool="cls" if options.get("cls", True) else "mean", representation_size=options.get("representation"),
    )  # fmt: skip


@pytest.mark.parametrize("prefix", ["params/", "params/img/", "opt/target/", "opt/target/img/", "img/"])
@pytest.mark.parametrize("dialect", [VIT_JAX, BIG_VISION])
def test_the_network_is_found_under_a_prefix(prefix, dialect, tmp_path):
    arrays = google(dialect)
    found = logits(saved(tmp_path / "vit.npz", arrays, prefix), pictures())
    np.testing.assert_array_equal(found, logits(saved(tmp_path / "plain.npz", arrays), pictures()))


@pytest.mark.parametrize(
    ("prefix", "beside", "left_out"),
    [
        ("params/", ["opt/0/mu/cls", "opt/0/count", "chrono/accum_train_time"], "2 under opt, 1 under chrono"),
        ("opt/target/", ["opt/state/step", "extra/time"], "1 under opt/state, 1 under extra"),
        ("params/img/", ["params/txt/head/kernel", "params/t", "params/b", "opt/count"],
         "1 under opt, 1 under params/txt, 1 under params/t, 1 under params/b"),
    ],
)  # fmt: skip
def test_what_the_authors_loaders_leave_out_is_left_out_and_told(prefix, beside, left_out, tmp_path, capsys):
    arrays = {prefix + name: array for name, array in google(BIG_VISION).items()}
    np.savez(tmp_path / "vit.npz", **arrays, **{name: np.arange(3) for name in beside})
    source = choose(tmp_path / "vit.npz")
    assert source.read().spec.num_classes == 5
    assert f"tensors left out, as they are no part of the network: {left_out}\n" in capsys.readouterr().out
    np.savez(tmp_path / "odd.npz", **arrays, **{name: np.arange(3) for name in [*beside, "surplus", "opts/x"]})
    with pytest.raises(InputError, match=f"beside the network under {prefix}, left over: surplus, opts/x"):
        load_weights(tmp_path / "odd.npz")


@pytest.mark.parametrize("dialect", [VIT_JAX, BIG_VISION])
def test_scanned_blocks_are_read(dialect, tmp_path):
    arrays = google(dialect)
    found = logits(saved(tmp_path / "scan.npz", stacked(arrays), "params/"), pictures())
    np.testing.assert_array_equal(found, logits(saved(tmp_path / "loop.npz", arrays), pictures()))


def test_scanned_blocks_that_differ_in_number_are_refused(tmp_path):
    arrays = stacked(google(BIG_VISION))
    name = "Transformer/encoderblock/LayerNorm_1/bias"
    with pytest.raises(InputError, match=rf"the layers, differ: .*{name} \[2, 16\]"):
        load_weights(saved(tmp_path / "scan.npz", arrays | {name: arrays[name][:2]}))
    many = {key: np.zeros((10_001, 1), np.float32) if key.endswith("scale") else array for key, array in arrays.items()}
    many = {key: array for key, array in many.items() if "encoderblock/" not in key or key.endswith("scale")}
    with pytest.raises(InputError, match="stacks of 10,001 blocks"):
        load_weights(saved(tmp_path / "many.npz", many))
    both = arrays | {"Transformer/encoderblock_1/LayerNorm_1/bias": arrays[name][1]}
    with pytest.raises(InputError, match="both stacked and apart: Transformer/encoderblock_1/LayerNorm_1/bias"):
        load_weights(saved(tmp_path / "both.npz", both))


@pytest.mark.parametrize("name", ["Transformer/pos_embedding", "Transformer/posembed_input/pos_embedding"])
def test_files_between_the_dialects_are_read(name, tmp_path):
    """Modules numbered by class, but positions as they were: the class token has one."""
    old = google(VIT_JAX)
    numbers = dict(zip(VIT_JAX, (*BIG_VISION[:3], name), strict=True))
    new = {"/".join(numbers.get(part, part) for part in key.split("/")): array for key, array in old.items()}
    new[name] = new.pop(VIT_JAX[3])
    assert any("MultiHeadDotProductAttention_0" in key for key in new)
    found = logits(saved(tmp_path / "between.npz", new), pictures())
    np.testing.assert_array_equal(found, logits(saved(tmp_path / "old.npz", old), pictures()))


def test_one_tensor_by_two_names_is_refused(tmp_path):
    arrays = google(VIT_JAX)
    arrays["pos_embedding"] = arrays[VIT_JAX[3]]
    with pytest.raises(InputError, match=f"{VIT_JAX[3]} and pos_embedding are the same tensor"):
        load_weights(saved(tmp_path / "vit.npz", arrays))


def test_no_positions_and_no_class_token_are_fixed_positions(tmp_path, capsys):
    arrays = google(BIG_VISION, cls=False, positions=False)
    source = find(saved(tmp_path / "vit.npz", arrays))
    assert "fixed sine-cosine ones and images of 224 pixels" in capsys.readouterr().out
    assert (source.spec.positions, source.spec.image_size) == ("sincos2d", 224)
    images = pictures()
    with torch.no_grad():
        model = source.read().model(SIDE)
        found = model(torch.from_numpy(images).float().permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, forward(arrays, images, BIG_VISION), atol=1e-5)


def test_bfloat16_is_two_bytes_without_a_type(tmp_path):
    arrays = google(BIG_VISION)
    halves = {name: array.view(np.uint32) >> 16 for name, array in arrays.items()}
    np.savez(tmp_path / "bf16.npz", **{name: half.astype(np.uint16).view("V2") for name, half in halves.items()})
    rounded = {name: (half << 16).astype(np.uint32).view(np.float32) for name, half in halves.items()}
    found = logits(tmp_path / "bf16.npz", pictures())
    np.testing.assert_array_equal(found, logits(saved(tmp_path / "fp32.npz", rounded), pictures()))
    np.testing.assert_allclose(found, forward(rounded, pictures(), BIG_VISION), atol=1e-5)


@pytest.mark.parametrize("kind", ["<f2", ">f4"])
def test_other_floats_and_orders_are_read(kind, tmp_path):
    arrays = {name: np.asfortranarray(array.astype(kind)) for name, array in google(VIT_JAX).items()}
    found = logits(saved(tmp_path / "vit.npz", arrays), pictures())
    np.testing.assert_allclose(found, forward(arrays, pictures(), VIT_JAX), atol=1e-5)


def timms(path, spec, **arguments):
    """timm's network, which reads the file by itself."""
    import timm

    model = timm.models.VisionTransformer(
        img_size=spec.image_size, patch_size=spec.patch_size, embed_dim=spec.width, depth=spec.layers,
        num_heads=spec.heads, mlp_ratio=spec.mlp / spec.width, num_classes=spec.num_classes, act_layer="gelu_tanh",
        class_token=spec.pool == "cls", global_pool="token" if spec.pool == "cls" else "avg", fc_norm=False,
        **arguments,
    )  # fmt: skip
    model.load_pretrained(str(path))
    return model.eval()


@pytest.mark.parametrize(
    ("dialect", "options", "arguments"),
    [
        (VIT_JAX, {}, {}),
        (VIT_JAX, {"cls": False}, {}),
        (BIG_VISION, {}, {"no_embed_class": True}),
        (BIG_VISION, {"cls": False}, {}),
    ],
)
def test_timm_reads_the_same_network(dialect, options, arguments, tmp_path):
    arrays, images = google(dialect, **options), pictures()
    path = saved(tmp_path / "vit.npz", arrays, "params/" if dialect is BIG_VISION else "")
    with torch.no_grad():
        theirs = timms(path, load_weights(path).spec, **arguments)(torch.from_numpy(images).float().permute(0, 3, 1, 2))
    np.testing.assert_allclose(logits(path, images), theirs, atol=1e-5)


def ours(run_folder, folder, **fields):
    """A small network whose every tensor is random, and its checkpoint."""
    sizes = {**SIZES, "patch_size": 2, "image_size": 6, "num_classes": 5, "gelu": "tanh"}
    model = VisionTransformer(ViTSpec(**{**sizes, **fields}))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval(), run_folder(folder / "run", model)


@pytest.mark.parametrize(("name", "dialect"), [("npz", VIT_JAX), ("big_vision", BIG_VISION)])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"representation_size": 6},
        {"pool": "mean"},
        {"pool": "mean", "positions": "sincos2d"},
        {"positions": "sincos2d", "num_classes": 0},
        {"channels": 1, "image_size": 7},
    ],
)
def test_what_is_written_is_read_by_the_numpy_network_and_comes_back_the_same(
    name, dialect, fields, run_folder, tmp_path
):
    model, run = ours(run_folder, tmp_path, **fields)
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    export(choose(run), FORMATS[name], one)
    images = pictures(model.spec.image_size, model.spec.channels)
    with np.load(one) as file:
        arrays = {key.removeprefix("params/"): array for key, array in file.items()}
    with torch.no_grad():
        expected = model(torch.from_numpy(images).float().permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(forward(arrays, images, dialect), expected, atol=1e-5)
    np.testing.assert_allclose(logits(one, images), expected, atol=1e-5)
    read = load_weights(one)
    assert (read.step, read.spec.image_size) == (3, model.spec.image_size)
    export(choose(one), FORMATS[name], other)
    assert members(one) == members(other)


def members(path):
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def test_a_zero_of_the_class_token_keeps_its_sign(run_folder, tmp_path):
    model, _ = ours(run_folder, tmp_path)
    model.class_token.data[..., :3] = -0.0
    model.position_embedding.data[:, 0, :2] = torch.tensor([-0.0, 0.0])
    run = run_folder(tmp_path / "signed", model)
    export(choose(run), FORMATS["big_vision"], tmp_path / "one.npz")
    export(choose(tmp_path / "one.npz"), FORMATS["big_vision"], tmp_path / "other.npz")
    assert members(tmp_path / "one.npz") == members(tmp_path / "other.npz")
    with np.load(tmp_path / "one.npz") as file:
        assert np.signbit(file["params/cls"][0, 0, :2]).all()
        added = (model.class_token + model.position_embedding[:, :1]).detach().numpy()
        np.testing.assert_array_equal(file["params/cls"], added)


@pytest.mark.parametrize("name", ["npz", "big_vision"])
def test_two_exports_of_the_same_weights_hold_the_same_bytes(name, run_folder, tmp_path):
    _, run = ours(run_folder, tmp_path)
    for out in ("one.npz", "other.npz"):
        export(choose(run), FORMATS[name], tmp_path / out)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


@pytest.mark.parametrize("name", ["npz", "big_vision"])
@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("gelu", "exact", r"gelu: the authors' code computes GELU's tanh form.*; --drop gelu, or another"),
        ("norm_eps", 1e-5, "norm_eps: the authors' norms have epsilon 1e-6, these 1e-05"),
        ("qkv_bias", False, "qkv_bias: the authors' queries, keys and values have biases"),
    ],
)
def test_what_the_authors_code_does_not_compute_is_refused(name, field, value, found, run_folder, tmp_path):
    _, run = ours(run_folder, tmp_path, **{field: value})
    with pytest.raises(InputError, match=f"--format {name} cannot hold these weights: {found}"):
        export(choose(run), FORMATS[name], tmp_path / "vit.npz")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MAPHead_0/probe", "attention pooling"),
        ("gn_root/scale", "convolutions before it"),
        ("mask_token", "a mask token"),
    ],
)
def test_other_kinds_of_network_are_refused(name, kind, tmp_path):
    arrays = google(BIG_VISION, cls=False) | {name: np.zeros((1, 1, 16), np.float32)}
    with pytest.raises(InputError, match=f"of another kind, with {kind}.*: {name}"):
        load_weights(saved(tmp_path / "vit.npz", arrays))


@pytest.mark.parametrize("dialect", [VIT_JAX, BIG_VISION])
def test_every_name_that_is_missing_or_surplus_or_misshapen_is_listed(dialect, tmp_path):
    arrays = google(dialect)
    attention = f"Transformer/encoderblock_1/{dialect[0]}"
    for name in (f"{attention}/key/bias", "head/bias"):
        del arrays[name]
    arrays[f"{attention}/out/kernel"] = arrays[f"{attention}/out/kernel"].transpose(2, 0, 1)
    arrays["../../etc/passwd"] = arrays["Transformer/encoderblock_1/dropout"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as refused:
        load_weights(saved(tmp_path / "vit.npz", arrays))
    found = str(refused.value).replace("params/", "")
    assert f"missing: {attention}/key/bias, head/bias; " in found
    assert "left over: ../../etc/passwd, Transformer/encoderblock_1/dropout; " in found
    assert f"of another shape: {attention}/out/kernel [16, 4, 4], not [4, 4, 16]" in found


@pytest.mark.parametrize("dialect", [VIT_JAX, BIG_VISION])
def test_every_single_name_that_is_missing_is_named(dialect, tmp_path):
    arrays = google(dialect, representation=6, sizes={**SIZES, "layers": 1})
    for name in arrays:
        without = {other: array for other, array in arrays.items() if other != name}
        if dialect is BIG_VISION and name == "cls":
            continue  # is a network that averages its patches
        with pytest.raises(InputError, match=r"missing|left over|has no tensor|no block") as refused:
            load_weights(saved(tmp_path / "vit.npz", without))
        assert name.rpartition("/")[0] in str(refused.value)


@pytest.mark.parametrize("dialect", [VIT_JAX, BIG_VISION])
def test_every_single_shape_that_is_wrong_is_refused(dialect, tmp_path):
    arrays = google(dialect, representation=6, sizes={**SIZES, "layers": 1})
    for name, array in arrays.items():
        for wrong in (np.repeat(array, 2, axis=-1), array.ravel()[:1], array.ravel()[0]):
            with pytest.raises(InputError, match=r"vit\.npz"):
                load_weights(saved(tmp_path / "vit.npz", arrays | {name: wrong}))


@pytest.mark.parametrize(
    "kind", ["float64", "int64", "int32", "bool", "uint16", "complex64", "U3", "V4", "datetime64[s]"]
)
def test_other_types_are_refused_by_name(kind, tmp_path):
    arrays = google(VIT_JAX)
    arrays["head/bias"] = np.zeros(5, kind)
    with pytest.raises(InputError, match=r"vit\.npz: head/bias"):
        load_weights(saved(tmp_path / "vit.npz", arrays))


@pytest.mark.parametrize(
    ("arch", "architecture", "dialect", "options"),
    [
        ("vit_ti_16", "vit_tiny_patch16_224", VIT_JAX, {"grid": 14}),
        ("vit_s_16", "vit_small_patch16_224", BIG_VISION, {"grid": 14, "cls": False}),
        pytest.param("vit_b_32", "vit_base_patch32_224", BIG_VISION, {"grid": 7}, marks=pytest.mark.long),
        pytest.param("vit_b_16", "vit_base_patch16_224", BIG_VISION, {"grid": 14}, marks=pytest.mark.long),
        pytest.param("vit_l_16", "vit_large_patch16_224", VIT_JAX, {"grid": 15}, marks=pytest.mark.long),
        pytest.param(
            "vit_h_14", "vit_huge_patch14_224", BIG_VISION, {"grid": 16, "cls": False}, marks=pytest.mark.long
        ),
    ],
)
def test_a_named_network_is_timms(arch, architecture, dialect, options, tmp_path):
    """Through `create_model(checkpoint_path=…)`, as timm's users read files."""
    import timm

    arrays = google(dialect, sizes=ARCHITECTURES[arch], classes=10, scale=0.02, **options)
    path = saved(tmp_path / "vit.npz", arrays, "params/" if dialect is BIG_VISION else "")
    side = options["grid"] * ARCHITECTURES[arch]["patch_size"]
    averaged = {"class_token": False, "global_pool": "avg", "fc_norm": False} if "cls" in options else {}
    slots = {"no_embed_class": True} if dialect is BIG_VISION else {}
    model = timm.create_model(
        architecture,
        checkpoint_path=str(path),
        num_classes=10,
        weight_init="skip",
        img_size=side,
        act_layer="gelu_tanh",
        **averaged,
        **slots,
    )
    images = pictures(side)[:1]
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(images).float().permute(0, 3, 1, 2)).numpy()
    found = logits(path, images)
    assert np.abs(theirs).max() > 0.01
    np.testing.assert_allclose(found, theirs, atol=1e-5)
    if arch == "vit_ti_16":
        np.testing.assert_allclose(found, forward(arrays, images, dialect), atol=1e-5)


def test_random_damage_of_a_network_is_refused_or_does_no_harm(tmp_path):
    path = saved(tmp_path / "vit.npz", google(BIG_VISION, sizes={**SIZES, "layers": 1}, grid=1))
    expected, whole, draw = load_weights(path), path.read_bytes(), np.random.default_rng(0)
    directory = whole.index(b"PK\x01\x02")
    refused = 0
    for number in range(150):
        data = bytearray(whole)
        # Half of the damage to the directory and the headers in front of the first arrays, the rest anywhere.
        places = ((0, len(data)), (directory, len(data)), (0, 600))[number % 3]
        for place in draw.integers(*places, 2):
            data[place] ^= 1 << draw.integers(0, 8)
        path.write_bytes(data)
        try:
            found = load_weights(path)
        except InputError as error:
            refused += path.name in str(error)
        else:
            assert found.spec == expected.spec
            assert found.sha256 == expected.sha256
    assert refused > 75
