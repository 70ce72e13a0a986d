"""Whose features are probed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewshot.subject import Pixels, frozen, headline, open_entries, subjects, untrained, width
from pretrain.errors import InputError
from pretrain.model.positions import resize_positions

ALL = ("tanh", "pre_tanh", "cls", "mean", "pixels", "untrained")


@pytest.fixture
def entry(tmp_path, tiny, drawn, run_folder):
    """entry(image_size=None, **fields): a network's checkpoint, opened."""

    def make(image_size=None, **fields):
        path = run_folder(tmp_path / "run", drawn(tiny(**fields)))
        (found,) = open_entries([path], image_size)
        return found

    return make


def features_of(found):
    images = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    with torch.no_grad():
        outputs = {one.build: one.build().eval()(images, features=True) for one in found}
    return {name: outputs[one.build][layer] for one in found for name, layer in one.features.items()}


def test_a_representation_head_adds_its_layers(entry):
    found = subjects(entry(representation_size=48), ALL, 0)
    assert [list(one.features) for one in found] == [
        ["tanh", "pre_tanh", "cls", "mean"],
        ["untrained"],
        ["pixels"],
    ]
    assert found[1].features == {"untrained": "tanh"}


def test_layers_that_the_network_has_not_are_left_out(entry):
    found = subjects(entry(), ALL, 0)
    assert [list(one.features) for one in found] == [["cls", "mean"], ["untrained"], ["pixels"]]
    assert found[1].features == {"untrained": "cls"}


def test_nothing_left_to_probe_is_refused(entry):
    with pytest.raises(InputError, match=r"fewshot\.features: tanh pre_tanh.*no representation head"):
        subjects(entry(), ("tanh", "pre_tanh"), 0)


def test_only_what_is_asked_for_is_computed(entry):
    (found,) = subjects(entry(representation_size=48), ("cls",), 0)
    assert found.features == {"cls": "cls"}


@pytest.mark.parametrize(
    ("features", "leading"),
    [(ALL, "tanh"), (("mean", "cls", "pixels"), "mean"), (("pixels", "cls", "tanh"), "cls"), (("untrained",), None)],
)
def test_the_first_feature_that_is_no_baseline_leads(features, leading):
    assert headline(features) == leading


def test_widths_are_those_of_the_features(entry):
    opened = entry(representation_size=48)
    for name, values in features_of(subjects(opened, ALL, 0)).items():
        assert values.shape[1] == width(opened.spec, name)


def test_a_frozen_network_is_the_checkpoints(entry, tiny, drawn):
    model = drawn(tiny(representation_size=48))
    loaded = frozen(entry(representation_size=48))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_size_resizes_the_positions(entry, tiny, drawn):
    opened = entry(image_size=16)
    assert (opened.spec.image_size, opened.trained_size) == (16, 8)
    positions = drawn(tiny()).position_embedding.detach()
    expected = resize_positions(positions, (8, 8), class_slot=True)
    assert torch.equal(frozen(opened).position_embedding, expected)


def test_dropout_is_off(entry):
    assert entry(dropout=0.5).spec.dropout == 0


def test_the_untrained_network_follows_its_seed(tiny):
    first, again, other = (untrained(tiny(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embedding.weight"], other["patch_embedding.weight"])


def test_subjects_differ_in_identity(entry):
    opened = entry(representation_size=48)
    changed = replace(opened, sha256="other")
    trained, twin, pixels = subjects(opened, ALL, 0)
    trained_2, twin_2, pixels_2 = subjects(changed, ALL, 1)
    assert trained.identity != trained_2.identity
    assert twin.identity != twin_2.identity
    assert pixels.identity == pixels_2.identity


def test_small_images_are_their_own_features():
    images = torch.arange(2 * 3 * 28 * 28.0).reshape(2, 3, 28, 28)
    assert torch.equal(Pixels()(images)["pixels"], images.reshape(2, -1))


def test_large_images_are_averaged_down():
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 224, 224)))
    expected = images.reshape(2, 3, 32, 7, 32, 7).mean(dim=(3, 5)).reshape(2, -1)
    assert torch.allclose(Pixels()(images)["pixels"], expected, rtol=0, atol=1e-12)


def ids(*paths, **choice):
    return [one.id for one in open_entries(paths, None, **choice)]


def test_runs_of_one_name_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path, tiny, drawn, run_folder):
    paths = [run_folder(tmp_path / name / "run", drawn(tiny(), seed)) for seed, name in enumerate("ab")]
    other = run_folder(tmp_path / "third", drawn(tiny(), 2))
    assert ids(other) == ["third"]
    assert ids(*paths) == ["a/run", "b/run"]
    assert ids(*paths, other) == ["a/run", "b/run", f"{tmp_path.name}/third"]


def test_a_checkpoint_is_called_by_its_run_and_its_step(tmp_path, tiny, drawn, run_folder):
    for name, step in (("a", 200), ("a", 400), ("b", 200)):
        run_folder(tmp_path / name, drawn(tiny(), step), step)
    steps = {(name, step): tmp_path / name / "checkpoints" / f"step_{step:08}" for name in "ab" for step in (200, 400)}
    assert ids(steps["a", 200], steps["b", 200]) == ["a step 200", "b step 200"]
    assert ids(tmp_path / "a", steps["a", 200]) == ["a step 400", "a step 200"]
    assert ids(tmp_path / "a", tmp_path / "b") == ["a", "b"]


def test_weights_and_their_average_stand_side_by_side(tmp_path, tiny, drawn, run_folder):
    path = run_folder(tmp_path / "run", drawn(tiny()), 3, drawn(tiny(), 1))
    raw, mean = open_entries([path], None, averaged=(False, True))
    assert (raw.id, mean.id) == ("run", "run averaged")
    assert torch.equal(frozen(raw).head.weight, drawn(tiny()).head.weight)
    assert torch.equal(frozen(mean).head.weight, drawn(tiny(), 1).head.weight)
    without = run_folder(tmp_path / "without", drawn(tiny()))
    with pytest.raises(InputError, match=r"without.*keeps no averaged weights"):
        open_entries([path, without], None, averaged=(False, True))


def test_the_same_weights_twice_are_refused(tmp_path, tiny, drawn, run_folder):
    path = run_folder(tmp_path / "run", drawn(tiny()))
    with pytest.raises(InputError, match="the same weights twice"):
        open_entries([path, tmp_path / "run" / ".." / "run"], None)
    with pytest.raises(InputError, match=r"the same weights twice, .*step_00000003"):
        open_entries([path, path / "checkpoints" / "step_00000003"], None)


def test_a_size_below_a_patch_is_refused(entry):
    with pytest.raises(InputError, match="image_size"):
        entry(image_size=1)


def test_weights_that_change_under_way_are_refused(entry):
    with pytest.raises(InputError, match="changed while"):
        frozen(replace(entry(), sha256="other"))
