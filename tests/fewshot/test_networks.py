"""The networks that are probed: found by WEIGHTS, named in a report."""

import pytest
import torch

from pretrain.errors import InputError
from pretrain.weights.networks import open_networks


@pytest.fixture
def network(tmp_path, tiny, drawn, run_folder):
    """network(image_size=None, **fields): that of a checkpoint."""

    def make(image_size=None, **fields):
        path = run_folder(tmp_path / "run", drawn(tiny(**fields)))
        (found,) = open_networks([path], image_size)
        return found

    return make


def test_another_size_is_the_one_that_it_runs_at(network):
    opened = network(image_size=16)
    assert (opened.spec.image_size, opened.trained_size) == (16, 8)


def test_dropout_and_drop_path_are_off(network):
    spec = network(dropout=0.5, drop_path=0.5).spec
    assert (spec.dropout, spec.drop_path) == (0, 0)


def ids(*paths, **choice):
    return [one.id for one in open_networks(paths, None, **choice)]


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
    raw, mean = open_networks([path], None, averaged=(False, True))
    assert (raw.id, mean.id) == ("run", "run averaged")
    for network, seed in ((raw, 0), (mean, 1)):
        model = network.source.read(network.averaged).model()
        assert torch.equal(model.head.weight, drawn(tiny(), seed).head.weight)
    without = run_folder(tmp_path / "without", drawn(tiny()))
    with pytest.raises(InputError, match=r"without.*keeps no averaged weights"):
        open_networks([path, without], None, averaged=(False, True))


def test_the_same_weights_twice_are_refused(tmp_path, tiny, drawn, run_folder):
    path = run_folder(tmp_path / "run", drawn(tiny()))
    with pytest.raises(InputError, match="the same weights twice"):
        open_networks([path, tmp_path / "run" / ".." / "run"], None)
    with pytest.raises(InputError, match=r"the same weights twice, .*step_00000003"):
        open_networks([path, path / "checkpoints" / "step_00000003"], None)


def test_a_size_below_a_patch_is_refused(network):
    with pytest.raises(InputError, match="image_size"):
        network(image_size=1)
