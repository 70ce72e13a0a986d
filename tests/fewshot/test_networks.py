"""The networks that are probed: found by WEIGHTS, named in a report."""

from pathlib import Path

import pytest
import torch

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.weights.export import export
from pretrain.weights.load import FileSource, choose
from pretrain.weights.networks import Network, name_networks, open_networks
from pretrain.weights.read import FORMATS


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


@pytest.fixture
def trained(tmp_path, tiny, drawn, run_folder):
    """trained(name, *steps, averaged=False): the folder of a run with a checkpoint at each of the steps."""

    def make(name, *steps, averaged=False):
        for step in steps:
            run_folder(tmp_path / name, drawn(tiny(), step), step, drawn(tiny(), step + 1) if averaged else None)
        return tmp_path / name

    return make


def test_checkpoints_at_multiples_of_every_and_the_newest_are_steps_of_their_runs(trained):
    first, second = trained("a", 100, 150, 200, 1000, 1010), trained("b", 200)
    assert ids(first, every=100) == ["a step 100", "a step 200", "a step 1000", "a step 1010"]
    assert ids(first / "checkpoints", every=505) == ["a"]
    assert ids(first, second, every=200) == ["a step 200", "a step 1000", "a step 1010", "b"]
    assert {one.run for one in open_networks([first], None, every=150)} == {"a"}


def test_each_step_may_be_raw_and_averaged(trained):
    run = trained("a", 2, 4, averaged=True)
    assert ids(run, every=2, averaged=(False, True)) == [
        "a step 2", "a step 2 averaged", "a step 4", "a step 4 averaged",
    ]  # fmt: skip


def test_what_every_cannot_be_of_is_refused_with_what_would_be_right(trained, tmp_path, tiny, drawn, run_folder):
    run = trained("a", 120, 240)
    for every in (0, -5):
        with pytest.raises(InputError, match=rf"--every {every}: a number of steps, 1 or more"):
            open_networks([run], None, every=every)
    none = r"no checkpoint after a multiple of 100 steps; there are those of 120, 240 steps. .*checkpoint\.keep_every"
    with pytest.raises(InputError, match=none):
        open_networks([run], None, every=100)
    with pytest.raises(InputError, match=r"step_00000120 is one checkpoint; the run folder"):
        open_networks([run / "checkpoints" / "step_00000120"], None, every=120)
    (tmp_path / "w.npz").write_bytes(b"PK")
    for single in (tmp_path / "w.npz", "https://example.org/w.npz"):
        with pytest.raises(InputError, match=r"w\.npz is one set of weights; a run folder"):
            open_networks([single], None, every=120)
    with pytest.raises(InputError, match="the same weights twice"):
        open_networks([run, run], None, every=120)


def test_damaged_checkpoints_among_them_are_all_named(trained, capsys):
    run = trained("a", 100, 200, 250, 300, 350)
    for step in (100, 250, 300, 350):
        (weights,) = (run / "checkpoints" / f"step_{step:08}").glob("weight*")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    with pytest.raises(
        InputError, match=r"--every 100: .*step_00000100.*step_00000300.*move its folder away"
    ) as caught:
        open_networks([run], None, every=100)
    assert "00000250" not in str(caught.value)
    assert ids(run, every=200) == ["a"]
    assert "passed over: " in capsys.readouterr().out


def called(*names, averaged=()):
    """What files and URLs are called beside one another, where those at `averaged` are averages."""
    spec = ViTSpec(patch_size=2, layers=1, width=8, mlp=8, heads=1, image_size=8, num_classes=2)
    networks = []
    for at, name in enumerate(names):
        local = Path(f"/copies/{at}" if "://" in name else name)
        networks.append(Network("", name, FileSource(local, name, spec, "", {}, True), at in averaged, spec))
    return [one.id for one in name_networks(networks)]


@pytest.mark.parametrize(
    "names",
    [
        ["https://a.org/x/w.npz", "https://b.org/x/w.npz"],
        ["https://a.org/get?file=v.npz", "https://a.org/get?file=w.npz"],
        ["https://a.org/get?file=x/w.npz", "https://a.org/get?file=y/w.npz"],
        ["s3://a/w.npz", "gs://a/w.npz", "https://a/w.npz", "http://a/w.npz"],
        ["https://a.org/x/w.npz", "/a.org/x/w.npz", "/x/w.npz"],
        ["/a/w", "/b/a/w", "/w"],
    ],
)
def test_files_and_urls_are_told_apart_by_whatever_differs(names):
    found = called(*names)
    assert len(set(found)) == len(names)
    assert all(name.endswith(id) for id, name in zip(found, names, strict=True))


def test_an_average_is_told_from_a_file_of_its_name():
    assert called("/a/w", "/a/w", averaged=[1]) == ["w", "w averaged"]
    assert len(set(called("/a/w", "/a/w", "/a/w averaged", averaged=[1]))) == 3


def test_a_file_a_run_and_a_step_of_one_name_are_told_apart(trained, tmp_path):
    run = trained("a.safetensors", 7, 8)  # of a folder too
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "a.safetensors"
    export(choose(run), FORMATS["safetensors"], file)
    assert ids(run, file) == [f"{tmp_path.name}/a.safetensors", "files/a.safetensors"]
    named = run / "checkpoints" / "step_00000007"
    assert len(set(ids(run, named, trained("a.safetensors step 7", 1)))) == 3
