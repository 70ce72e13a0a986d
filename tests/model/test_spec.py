import pytest

from pretrain.errors import InputError
from pretrain.model.spec import ARCHITECTURES, ViTSpec, spec_from_arch


def test_architectures_are_those_of_the_papers():
    sizes = {
        name: (spec.patch_size, spec.layers, spec.width, spec.mlp, spec.heads)
        for name, spec in ((name, spec_from_arch(name)) for name in ARCHITECTURES)
    }
    assert sizes == {
        "vit_ti_16": (16, 12, 192, 768, 3),
        "vit_s_16": (16, 12, 384, 1536, 6),
        "vit_b_16": (16, 12, 768, 3072, 12),
        "vit_b_32": (32, 12, 768, 3072, 12),
        "vit_l_16": (16, 24, 1024, 4096, 16),
        "vit_l_32": (32, 24, 1024, 4096, 16),
        "vit_h_14": (14, 32, 1280, 5120, 16),
    }


@pytest.mark.parametrize(
    ("arch", "size", "grid"),
    [
        ("vit_b_16", 224, 14),
        ("vit_b_16", 384, 24),
        ("vit_l_16", 512, 32),
        ("vit_b_32", 384, 12),
        ("vit_h_14", 224, 16),
        ("vit_h_14", 518, 37),
        ("vit_h_14", 384, 27),
    ],
)
def test_grid_is_floored_and_tokens_count_the_class_token(arch, size, grid):
    spec = spec_from_arch(arch, image_size=size)
    assert (spec.grid, spec.tokens) == (grid, grid**2 + 1)
    assert spec_from_arch(arch, image_size=size, pool="mean").tokens == grid**2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("width", 190),
        ("heads", 2.0),
        ("patch_size", "16"),
        ("channels", True),
        ("image_size", 15),
        ("num_classes", -1),
        ("representation_size", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("dropout", None),
        ("drop_path", 1.0),
        ("drop_path", "0.1"),
        ("gelu", "relu"),
        ("pool", "max"),
        ("positions", None),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(InputError, match=rf"^model\.{field}:"):
        spec_from_arch("vit_ti_16", **{field: value})


def test_drop_path_has_no_meaning_for_one_block():
    with pytest.raises(InputError, match=r"^model\.drop_path: found 0\.1, but it rises from 0"):
        spec_from_arch("vit_ti_16", layers=1, drop_path=0.1)


def test_sincos_positions_refuse_a_width_they_cannot_fill():
    sizes = {"patch_size": 8, "layers": 1, "mlp": 8, "heads": 2, "image_size": 16}
    for width in (4, 10):
        with pytest.raises(InputError, match=r"^model\.width:.*sincos2d"):
            ViTSpec(width=width, positions="sincos2d", **sizes)
    assert ViTSpec(width=8, positions="sincos2d", **sizes).width == 8


def test_an_unknown_architecture_or_field_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match=r"vit_b16.*did you mean 'vit_b_16'"):
        spec_from_arch("vit_b16")
    with pytest.raises(InputError, match=r"model\.num_clases.*did you mean 'num_classes'"):
        spec_from_arch("vit_b_16", num_clases=10)


def test_the_nearest_architecture_is_named_with_what_differs():
    assert spec_from_arch("vit_b_16", image_size=64).near() == "vit_b_16"
    assert spec_from_arch("vit_b_16", patch_size=32).near() == "vit_b_32"
    assert (
        spec_from_arch("vit_s_16", layers=6, patch_size=8).near()
        == "vit_s_16 with patch_size 8 (not 16), layers 6 (not 12)"
    )
    assert ViTSpec(patch_size=5, layers=4, width=64, mlp=256, heads=4, image_size=20).near() == ""


def test_a_recorded_network_of_an_earlier_version_is_as_it_was_then_and_of_a_later_one_is_refused():
    sizes = ARCHITECTURES["vit_ti_16"]
    assert ViTSpec.recorded(sizes) == spec_from_arch("vit_ti_16")
    with pytest.raises(InputError, match=r"model\.registers, model\.rope: recorded by a later version"):
        ViTSpec.recorded({**sizes, "rope": True, "registers": 4})
