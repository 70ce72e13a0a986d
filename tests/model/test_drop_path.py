"""Stochastic depth is timm's: per sample and branch, kept branches scaled up, the rate rising linearly with depth."""

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters


def test_the_share_rises_linearly_from_0_at_the_first_block_to_its_value_at_the_last(tiny):
    assert tiny(layers=5, drop_path=0.4).drop_paths == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert tiny(layers=5).drop_paths == [0] * 5


def test_it_is_the_formula_written_out(tiny, drawn, images):
    spec = tiny(layers=4, drop_path=0.6)
    model, batch = drawn(spec).train(), images(spec, 8)
    torch.manual_seed(5)
    found = model(batch)
    torch.manual_seed(5)
    x = model.embed(batch)
    for number, block in enumerate(model.blocks):
        keep = 1 - 0.6 * number / 3
        kept = torch.empty(16).bernoulli_(keep) if number else torch.ones(16)
        for mask, branch in zip(
            kept.view(2, 8, 1, 1),
            (lambda x, block=block: block.attention(block.norm1(x)), lambda x, block=block: block.mlp(block.norm2(x))),
            strict=True,
        ):
            x = x + branch(x) / keep * mask
    torch.testing.assert_close(found, model.head(model.norm(x)[:, 0]), rtol=1e-5, atol=1e-5)


def test_each_branch_of_each_sample_is_dropped_with_the_blocks_share(tiny, drawn, images):
    """Four outputs of a block are told apart, by which of its two branches the sample has taken."""
    spec, count = tiny(layers=3, drop_path=0.5), 3000
    model, found = drawn(spec).train(), {}

    def note(block, inputs, output):
        x, block = inputs[0], block.eval()
        with torch.no_grad():
            for first in (0, 1):
                for second in (0, 1):
                    kept = torch.tensor([first, second]) / (1 - block.drop_path)
                    tokens = output.shape[1]  # the last block's: the class token
                    same = torch.isclose(block.encode(x, kept)[:, :tokens], output, atol=1e-4).flatten(1).all(dim=1)
                    found[block][first, second] += int(same.sum())
        block.train()

    for block in model.blocks:
        found[block] = Counter()
        block.register_forward_hook(note)
    torch.manual_seed(0)
    model(images(spec, 1).expand(count, -1, -1, -1))
    for block, share in zip(model.blocks, (0.0, 0.25, 0.5), strict=True):
        assert sum(found[block].values()) == count
        for first in (0, 1):
            for second in (0, 1):
                odds = (1 - share if first else share) * (1 - share if second else share)
                allowed = 4 * (odds * (1 - odds) / count) ** 0.5
                assert abs(found[block][first, second] / count - odds) <= allowed, (share, first, second)


def test_it_is_active_in_training_only(tiny, drawn, images):
    spec = tiny(drop_path=0.5)
    model, batch = drawn(spec), images(spec, 16)
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), drawn(tiny()).eval()(batch))


def gradients(model, batch):
    torch.manual_seed(3)
    logits = model.train()(batch)
    logits.square().sum().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("checkpointing", ["full", "selective", 2])
def test_what_is_computed_again_takes_the_same_masks(tiny, drawn, images, checkpointing):
    spec = tiny(layers=3, drop_path=0.7)
    plain, again = (gradients(drawn(spec, checkpointing=way), images(spec, 8)) for way in ("none", checkpointing))
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_of_every_rate_share_a_graph_and_draw_the_same_masks(tiny, drawn, images, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    spec = tiny(layers=5, drop_path=0.5)
    plain = gradients(drawn(spec), images(spec, 8))
    compiled = gradients(drawn(spec, checkpointing=checkpointing, compiled=True), images(spec, 8))
    for found, truth in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 3, "the first block's, which drops nothing, the last's, the others'"
