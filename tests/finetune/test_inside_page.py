"""What a look into a network leaves: figures, one page that needs no other file, and the numbers."""

import hashlib
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.inside import page
from finetune.inside.attention import attend
from finetune.inside.examples import find_examples
from finetune.inside.view import look_inside
from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.weights.load import load_weights
from tests.page.parsed import ParsedPage

NAME = '5$ & <b>6$\x1b]0;x\x07\u202e"quoted".png'
SHOWN = '5$ & <b>6$\\x1b]0;x\\x07\\u202e"quoted".png'


def network(**fields):
    sizes = {"patch_size": 4, "layers": 2, "width": 16, "mlp": 16, "heads": 2, "image_size": 14, "channels": 3}
    model = VisionTransformer(ViTSpec(**{**sizes, "num_classes": 3, **fields})).eval()
    initialize(model, 0)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory, run_folder):
    return load_weights(run_folder(tmp_path_factory.mktemp("runs") / "rgb", network()))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """20 images of three formats, some in a folder below, one under a hostile name."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    names = [NAME, *(f"{number:02d}.{kind}" for number, kind in enumerate(["png", "jpg", "bmp"] * 5))]
    names += [f"below/{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def view(weights, photos):
    return look_inside(weights, find_examples([photos], 128))


@pytest.fixture(scope="module")
def written(view, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    page.write(view, folder)
    return folder


def numbers(folder):
    return json.loads((folder / "inside.json").read_text(), parse_constant=pytest.fail)


def test_the_files_have_fixed_names_and_the_page_needs_no_other(written):
    assert sorted(path.name for path in written.iterdir()) == [
        "attention_distance.png", "filters.png", "index.html", "inside.json", "positions.png", "rollout.png",
    ]  # fmt: skip
    html = (written / "index.html").read_text()
    assert not re.search(r"https?:|url\(|@import|<script", html)
    for name in ("attention_distance", "filters", "positions", "rollout"):
        with Image.open(written / f"{name}.png") as image:
            assert len(set(image.convert("L").tobytes())) > 50, name  # something is drawn


def test_every_figure_is_told_in_words(written):
    parsed = ParsedPage((written / "index.html").read_text())
    embeddings, distance, rollout = [attributes["alt"] for attributes, _ in parsed.images()]
    assert embeddings.startswith("The first 15 principal components of the 16 filters of 4 × 4 px, 100.0 %")
    assert "3 × 3 learned position embeddings" in embeddings
    assert "over 20 images" in distance
    assert "12.png" in rollout
    assert len(list(parsed.images(dark=True))) == 3


def test_hostile_names_show_as_they_are(written):
    html = (written / "index.html").read_text()
    alts = [attributes["alt"] for attributes, _ in ParsedPage(html).images()]
    assert SHOWN in alts[2]
    assert not set("\x1b\x07\u202e") & set(html)


def test_the_numbers_are_of_these_images_and_weights(written, weights, photos):
    found = numbers(written)
    assert found["weights"] == {
        "source": str(weights.source),
        "sha256": weights.sha256,
        "step": 3,
        "averaged": False,
    }
    used = found["images"]["used"]
    assert found["images"]["found"] == len(used) == 20
    paths = [photos / one["name"] for one in used]
    assert [one["sha256"] for one in used] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    inputs = torch.stack([weights.preprocess(Image.open(path)) for path in paths])
    expected = attend(weights.model(), inputs).distances.mean(dim=0)
    torch.testing.assert_close(torch.tensor(found["attention_distance"]["layers"]), expected, rtol=1e-3, atol=1e-3)
    assert sum(found["filters"]["explained_variance"]) == pytest.approx(1)  # 15 of 15


def test_without_images_there_is_no_attention_and_the_page_says_so(weights, written, tmp_path):
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page.write(look_inside(weights, None), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "filters.png", "index.html", "inside.json", "positions.png",
    ]  # fmt: skip
    assert "No images were given" in (tmp_path / "index.html").read_text()
    assert numbers(tmp_path)["attention_distance"] is None


def test_pictures_show_what_the_patches_cover_in_proportion_to_the_rollout(view, weights):
    attention = view.attention
    shown = [one for one in attention.seen if one.pixels is not None]
    assert len(shown) == 16
    one = shown[0]
    image, masked = page.masked_image(one, torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 2]), 4)
    assert image.shape == masked.shape == (3, 12, 12)  # two of 14 pixels belong to no patch
    with Image.open(one.name) as picture:
        scaled = (weights.preprocess(picture) + 1) / 2
    assert (image - scaled[:, :12, :12]).abs().max() < 0.02  # JPEGs differ by a level between decoders
    torch.testing.assert_close(masked[:, -1, -1], image[:, -1, -1])
    torch.testing.assert_close(masked[:, 0, 0], image[:, 0, 0] / 2)
    assert (masked[:, 0, -1] == 0).all()


@pytest.mark.parametrize("fields", [{"channels": 1}, {"pool": "mean", "positions": "sincos2d"}])
def test_other_networks(fields, run_folder, photos, tmp_path):
    weights = load_weights(run_folder(tmp_path / "run", network(**fields)))
    view = look_inside(weights, find_examples([photos], 3))
    (tmp_path / "out").mkdir()
    page.write(view, tmp_path / "out")
    found = numbers(tmp_path / "out")
    assert found["positions"]["kind"] == weights.spec.positions
    assert len(found["images"]["used"]) == 3
    assert ("mean of the tokens" in (tmp_path / "out" / "index.html").read_text()) == ("pool" in fields)


def test_a_single_patch_has_no_neighbours_and_attends_at_no_distance(run_folder, photos, tmp_path):
    weights = load_weights(run_folder(tmp_path / "run", network(image_size=5)))
    found = look_inside(weights, find_examples([photos / "00.png"], 3)).figures()
    assert found["positions"]["neighbour_similarity"] is None
    assert found["attention_distance"]["layers"] == [[0, 0], [0, 0]]


def test_many_images_are_taken_evenly_and_the_same_each_time(photos, digits):
    taken = [example.name for example in find_examples([photos], 5).taken]
    assert taken == [example.name for example in find_examples([photos], 5).taken]
    assert len(set(taken)) == 5
    given = find_examples([photos / "01.jpg", photos / "00.png"], 128)
    assert [example.caption for example in given.taken] == ["01.jpg", "00.png"]  # in their order
    both = find_examples([digits / "test", digits / "train" / "index.vfi"], 128)
    assert (len(both.taken), both.found) == (128, 355 + 1442)
    one = both.taken[-1]
    assert one.name.startswith(f"{digits / 'train' / 'index.vfi'} id ")
    assert one.decoded(one.read(), 1).size == (8, 8)


def test_what_is_no_image_is_refused_by_name(weights, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe.png")
    for source, words in [
        ("gone.png", "no such file or folder"),
        ("empty", "no images in this folder"),
        ("bad.png", "not an image of a format that is read"),
        ("pipe.png", "no regular file"),
    ]:
        with pytest.raises(InputError, match=rf"{source}.*{words}"):
            look_inside(weights, find_examples([tmp_path / source], 128))


def test_weights_that_are_not_finite_are_refused(run_folder, tmp_path):
    model = network()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.fc1\.bias holds NaN or infinity"):
        look_inside(load_weights(run_folder(tmp_path / "run", model)), None)
