"""Where a run's, a task's and an evaluation's weights come from: one checkpoint for all ranks, of the network meant."""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from finetune.head import load_transferred
from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.record.folder import RunFolder
from pretrain.training.origin import Init, beginning, check_origin
from pretrain.weights.export import export
from pretrain.weights.fill import load_same
from pretrain.weights.load import choose, load_weights
from pretrain.weights.networks import open_networks
from pretrain.weights.read import FORMATS

SPEC = ViTSpec(patch_size=2, layers=1, width=16, mlp=32, heads=2, image_size=8, channels=1, num_classes=10)


def drawn(seed, **changes):
    model = VisionTransformer(replace(SPEC, **changes))
    initialize(model, seed)
    return model


def one_of_two(rank, meeting, runs, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    filled = []
    chosen = choose(runs[rank])
    for fill in (load_same, load_transferred):
        model = drawn(9)
        fill(model, chosen.read())
        filled.append((chosen.sha256, model.state_dict()))
    (network,) = open_networks([runs[rank]], None)
    torch.save([filled, str(network.source.path), network.source.sha256], f"{out}{rank}")
    dist.destroy_process_group()


def test_ranks_that_see_different_checkpoints_take_rank_0s(run_folder, tmp_path, spread):
    seen = run_folder(tmp_path / "run", drawn(0), step=3)
    run_folder(tmp_path / "ahead", drawn(0), step=3)
    ahead = run_folder(tmp_path / "ahead", drawn(1), step=5)
    out = tmp_path / "rank"
    spread(one_of_two, str(tmp_path / "meeting"), [str(seen), str(ahead)], str(out))
    (filled, source, sha256), other = (torch.load(f"{out}{rank}", weights_only=False) for rank in (0, 1))
    assert (source, sha256) == tuple(other[1:]) == (str(seen / "checkpoints/step_00000003"), sha256)
    for (told, mine), (told_there, theirs) in zip(filled, other[0], strict=True):
        assert told == told_there
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def choose_one_of_two(rank, meeting, files, found):
    dist.init_process_group("gloo", init_method=f"file://{meeting}{found}", rank=rank, world_size=2)
    with pytest.raises(InputError, match=found) if found else nullcontext():
        choose(files[rank])
    dist.destroy_process_group()


def test_a_node_with_another_file_at_the_same_place_is_found(run_folder, tmp_path, spread):
    files = []
    for seed, name in ((0, "here"), (0, "copy"), (1, "stale")):
        files.append(str(tmp_path / f"{name}.safetensors"))
        export(choose(run_folder(tmp_path / name, drawn(seed))), FORMATS["safetensors"], tmp_path / files[-1])
    shutil.copy(files[0], files[1])  # a card's path is in the file
    spread(choose_one_of_two, str(tmp_path / "meeting"), files[:2], "")
    spread(choose_one_of_two, str(tmp_path / "meeting"), files[::2], "the content on rank 1 is")
    spread(choose_one_of_two, str(tmp_path / "meeting"), [files[0], f"{files[0]}.gone"], "gone")


@pytest.mark.parametrize(
    ("change", "found"),
    [({"heads": 4}, "heads is 4, the config's 2"), ({"gelu": "tanh"}, "gelu is 'tanh', the config's 'exact'")],
)
def test_weights_that_fit_but_are_of_another_network_are_refused(change, found, run_folder, tmp_path):
    path = run_folder(tmp_path / "run", drawn(0, **change))
    with pytest.raises(InputError, match=f"step_00000003: of another network: {found}"):
        load_same(drawn(1), load_weights(path))


def test_dropout_drop_path_and_a_size_of_as_many_patches_are_the_same_network(run_folder, tmp_path):
    path = run_folder(tmp_path / "run", drawn(0, layers=2, dropout=0.1, drop_path=0.1, image_size=9))
    model = drawn(1, layers=2)
    load_same(model, load_weights(path))
    assert torch.equal(model.patch_embedding.weight, drawn(0).patch_embedding.weight)


@pytest.fixture
def rotten(run_folder, tmp_path):
    """A run folder whose newest checkpoint, of step 5, has its size but not its content; and that checkpoint."""
    run_folder(tmp_path / "run", drawn(0), step=3)
    newest = run_folder(tmp_path / "run", drawn(1), step=5) / "checkpoints/step_00000005"
    file = newest / "weights.00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    return tmp_path / "run", newest


def test_a_runs_newest_checkpoint_is_passed_over_where_it_is_damaged(rotten, capsys):
    (network,) = open_networks([rotten[0]], None)
    assert (network.source.step, network.source.path.name) == (3, "step_00000003")
    assert f"weights {rotten[0]}: passed over: checkpoint {rotten[1]}: damaged: weights" in capsys.readouterr().out
    model = drawn(9)
    load_same(model, choose(rotten[0]).read())
    assert torch.equal(model.head.weight, drawn(0).head.weight)


def test_a_checkpoint_that_is_named_is_that_one_or_none(rotten, tmp_path):
    for path in (rotten[1], tmp_path / "run/checkpoints/step_00000009"):
        path.mkdir(exist_ok=True)
        for read in (choose, lambda path: open_networks([path], None)):
            with pytest.raises(InputError, match=f"checkpoint {path}: (damaged|no state)"):
                read(path)


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_file_that_names_a_checkpoint_stands_for_it(name, run_folder, tmp_path):
    for step in (3, 5, 9):
        run_folder(tmp_path / "run", drawn(step), step=step)
    pointer = tmp_path / "run/checkpoints" / name
    pointer.write_text("step_00000005\n")
    (network,) = open_networks([pointer], None)
    assert network.source.path == choose(pointer).path == tmp_path / "run/checkpoints/step_00000005"
    assert torch.equal(load_weights(pointer).tensors["head.weight"], drawn(5).head.weight)
    for text, found in (("step_00000004", "not there any more"), ("../run", "the name of a checkpoint"), ("", "names")):
        pointer.write_text(text)
        with pytest.raises(InputError, match=f"{pointer}: .*{found}"):
            choose(pointer)


def test_a_run_that_does_not_record_what_it_began_from_takes_any_weights_and_says_so(run_folder, tmp_path, capsys):
    folder = RunFolder(run_folder(tmp_path / "old", drawn(0, representation_size=8)))
    saved = choose(folder.path).saved
    check_origin(saved, Init(tmp_path / "whatever"))
    assert f"{saved.path} does not record what its run began from" in capsys.readouterr().out
    chosen, network = beginning(folder, None, needed=True)
    assert (chosen, network.representation_size) == (None, 8)
