"""Looking into a network: attention, its distances and rollout, filters and positions, each against plain NumPy."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from finetune.inside.attention import attend, attention_scores, mean_distance, patch_distances, watched
from finetune.inside.embeddings import position_similarity, principal_components
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

SIZES = {"patch_size": 4, "layers": 3, "width": 24, "mlp": 32, "heads": 3, "image_size": 18, "channels": 3}


def network(**fields):
    """Weights large enough that attention is far from uniform."""
    model = VisionTransformer(ViTSpec(**{**SIZES, "num_classes": 5, **fields})).eval()
    initialize(model, 0)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight *= 6
    return model


def images(model, count=4):
    spec, generator = model.spec, torch.Generator().manual_seed(1)
    return torch.empty(count, spec.channels, spec.image_size, spec.image_size).normal_(generator=generator)


def attention_of(model, inputs):
    """The attention of every block, float64 [layers, b, heads, n, n]."""
    found = []
    with watched(model, lambda scores: found.append(scores.double().softmax(-1))), torch.no_grad():
        model(inputs, features=True)
    return torch.stack(found).numpy()


KINDS = pytest.mark.parametrize(
    "fields", [{}, {"pool": "mean", "positions": "sincos2d"}, {"channels": 1}], ids=["class token", "mean", "grey"]
)


@KINDS
def test_the_attention_is_what_the_blocks_compute_with(fields):
    model, values, mixed, scores = network(**fields).double(), [], [], []
    with torch.no_grad():
        unwatched = model(images(model), features=True)["mean"]
    for block in model.blocks:
        block.attention.qkv.register_forward_hook(lambda module, inputs, qkv: values.append(qkv[..., 48:]))
        block.attention.out.register_forward_hook(lambda module, inputs, out: mixed.append(inputs[0]))
    with torch.no_grad(), watched(model, scores.append):
        assert torch.equal(model(images(model), features=True)["mean"], unwatched)
    for score, value, result in zip(scores, values, mixed, strict=True):
        attention = score.softmax(-1)
        assert attention.amax() > 0.3  # far from uniform
        ours = attention @ value.unflatten(2, (3, 8)).transpose(1, 2)
        torch.testing.assert_close(ours.transpose(1, 2).flatten(2), result, rtol=1e-12, atol=1e-12)


def test_nothing_is_watched_any_more_once_closed():
    model, found = network(), []
    with pytest.raises(RuntimeError), watched(model, found.append):
        raise RuntimeError
    model(images(model), features=True)
    assert not found


def test_scores_of_one_head_by_hand():
    qkv = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 0.0, 0.0], [0.5, -1.0, 1.0, 0.0, 9.0, 9.0]]])
    expected = torch.tensor([[[[11.0, 1.0], [-2.5, 0.5]]]]) / 2**0.5
    torch.testing.assert_close(attention_scores(qkv, 1), expected)


@KINDS
def test_distances_are_those_of_a_loop_over_patches(fields):
    model = network(**fields)
    inputs = images(model, 2)
    first = int(model.spec.pool == "cls")
    attention, found = attention_of(model, inputs), attend(model, inputs).distances
    assert found.shape == (2, 3, 3)
    grid = model.spec.grid
    assert grid == 4  # two pixels of 18 belong to no patch
    for layer, image, head in np.ndindex(3, 2, 3):
        rows = attention[layer, image, head]
        total = 0.0
        for query in range(grid**2):
            weights = [rows[query + first, key + first] for key in range(grid**2)]
            steps = [np.hypot(query // grid - key // grid, query % grid - key % grid) for key in range(grid**2)]
            total += 4 * sum(w * s for w, s in zip(weights, steps, strict=True)) / sum(weights)
        assert found[image, layer, head].item() == pytest.approx(total / grid**2, rel=1e-5)


def test_attention_to_one_patch_only_has_the_distance_to_it():
    attention = torch.zeros(1, 1, 9, 9)
    attention[..., 8] = 1  # all look at the last patch of 3 × 3
    expected = np.mean([np.hypot(2 - row, 2 - column) for row in range(3) for column in range(3)]) * 16
    assert mean_distance(attention, patch_distances(3, 16)).item() == pytest.approx(expected, rel=1e-6)


def test_a_head_that_looks_at_the_class_token_alone_has_a_distance():
    model, scores = network(), []
    attention = model.blocks[0].attention
    with torch.no_grad():
        model.class_token[..., 0] = 100.0  # after the norm about 4.8 there, the patches' largest about 3
        attention.qkv.weight[:48] = 0
        attention.qkv.weight[24:48:8, 0] = 1  # of every head's keys the first element is that of the token
        attention.qkv.bias[:24:8] = 3000.0
        with watched(model, scores.append):
            model(images(model), features=True)
    assert (scores[0].softmax(-1)[..., 1:] == 0).all()  # nothing is left to normalise
    distances = attend(model, images(model)).distances[:, 0]
    assert distances.isfinite().all()
    assert (distances > 0).all()


@KINDS
def test_rollout_is_that_of_a_loop_over_layers(fields):
    model = network(**fields)
    inputs = images(model, 2)
    attention, found = attention_of(model, inputs), attend(model, inputs).rollout
    tokens = attention.shape[-1]
    for image in range(2):
        rollout = np.eye(tokens)
        for layer in range(3):
            mixed = attention[layer, image].mean(axis=0) + np.eye(tokens)
            rollout = mixed / mixed.sum(axis=1, keepdims=True) @ rollout
        np.testing.assert_allclose(rollout.sum(axis=1), 1, rtol=1e-12)
        seen = rollout[0, 1:] if model.spec.pool == "cls" else rollout.mean(axis=0)
        np.testing.assert_allclose(found[image].numpy(), seen, rtol=1e-4, atol=1e-7)


def test_components_are_those_of_scikit_learn():
    weight = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = principal_components(weight, 5)
    theirs = PCA(5, svd_solver="full").fit(weight.flatten(1).double().numpy())
    ours = found.filters.flatten(1).numpy()
    signs = np.sign((ours * theirs.components_).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, signs * theirs.components_, atol=1e-12)
    np.testing.assert_allclose(found.explained, theirs.explained_variance_ratio_, rtol=1e-12)
    assert (ours.max(axis=1) == np.abs(ours).max(axis=1)).all()  # the sign is fixed
    assert found.filters.shape == (5, 3, 2, 2)


@pytest.mark.parametrize(("shape", "count"), [((64, 1, 5, 5), 25), ((4, 3, 8, 8), 3), ((64, 3, 4, 4), 28)])
def test_there_are_as_many_components_as_the_filters_have(shape, count):
    found = principal_components(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert len(found.filters) == len(found.explained) == count
    assert float(found.explained.sum()) == pytest.approx(1) if count < 28 else float(found.explained.sum()) < 1


@KINDS
def test_similarity_of_positions(fields):
    model = network(**fields)
    similarity = position_similarity(model.spec, model.state_dict())
    assert similarity.shape == (4, 4, 4, 4)
    square = similarity.reshape(16, 16)
    torch.testing.assert_close(square.diagonal(), torch.ones(16, dtype=torch.float64))
    torch.testing.assert_close(square, square.T)
    if model.spec.positions == "learned":
        learned = model.position_embedding[0, 1:].double().detach().numpy()
        one, other = learned[4 * 1 + 2], learned[4 * 3 + 0]
        expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert similarity[1, 2, 3, 0].item() == pytest.approx(expected, rel=1e-9)
    else:  # patches of a row share half of their waves, so the nearer the more alike
        assert similarity[0, 0, 0, 1] > similarity[0, 0, 0, 2] > similarity[0, 0, 2, 2]
