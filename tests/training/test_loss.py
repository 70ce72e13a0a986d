"""The losses, against torch's own and against their definition under masks, cuts, mixing and smoothing."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import InputError
from pretrain.training.loss import choose_loss, multi_hot, sigmoid_loss, softmax_loss

torch.manual_seed(0)
LOGITS = torch.randn(6, 5)
LABELS = torch.tensor([[0], [4], [2], [2], [1], [3]])
ALL = torch.ones(6, dtype=torch.bool)


def test_softmax_is_torchs_cross_entropy():
    assert torch.equal(
        softmax_loss(LOGITS, LABELS, ALL), F.cross_entropy(LOGITS, LABELS[:, 0], reduction="none").sum() / 6
    )


def test_sigmoid_sums_over_classes_and_takes_label_lists():
    labels = torch.tensor([[0, 3], [4, -1], [-1, -1]])
    targets = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).float()
    assert torch.equal(multi_hot(labels, 5), targets)
    ones = torch.ones(3, dtype=torch.bool)
    expected = -(targets * F.logsigmoid(LOGITS[:3]) + (1 - targets) * F.logsigmoid(-LOGITS[:3])).sum() / 3
    assert sigmoid_loss(LOGITS[:3], labels, ones).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_an_unreadable_image_adds_nothing_and_the_batch_stays_the_divisor(loss):
    valid = torch.tensor([True, True, False, True, True, True])
    kept = loss(LOGITS[valid], LABELS[valid], ALL[valid]) * 5
    assert loss(LOGITS, LABELS, valid).item() == pytest.approx(kept.item() / 6, rel=1e-6)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_however_the_batch_is_cut_the_sum_is_the_same(loss):
    valid = torch.tensor([True, False, False, True, True, True])
    parts = [loss(LOGITS[i : i + 2], LABELS[i : i + 2], valid[i : i + 2]) for i in (0, 2, 4)]
    assert (sum(parts) / 3).item() == pytest.approx(loss(LOGITS, LABELS, valid).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_padding_rows_have_no_label_and_no_loss(loss):
    labels = torch.where(ALL[:, None] & (torch.arange(6)[:, None] < 4), LABELS, -1)
    valid = torch.arange(6) < 4
    assert torch.isfinite(loss(LOGITS, labels, valid))


def one_hot(labels):
    return F.one_hot(labels[:, 0], 5).float()


def by_targets(loss, logits, targets):
    """Each row's loss against explicit soft targets [b, k], by torch."""
    if loss is softmax_loss:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothed_softmax_is_torchs(smoothing):
    expected = F.cross_entropy(LOGITS, LABELS[:, 0], label_smoothing=smoothing)
    assert softmax_loss(LOGITS, LABELS, ALL, smoothing=smoothing).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_mixed_and_smoothed_losses_are_those_of_the_mixed_and_smoothed_targets(loss, smoothing):
    weight = torch.tensor([0.9, 0.5, 1.0, 0.7, 0.6, 0.8])
    valid = torch.tensor([True, True, True, False, True, True])
    targets = one_hot(LABELS) * (1 - smoothing) + smoothing / 5
    partners = targets[[1, 0, 3, 2, 5, 4]]
    targets = weight[:, None] * targets + (1 - weight[:, None]) * partners

    ours, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
    value = loss(ours, LABELS, valid, weight, smoothing=smoothing)
    expected = (by_targets(loss, theirs, targets) * valid).sum() / 6
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    expected.backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)
    assert (ours.grad[3] == 0).all()
    assert (ours.grad[valid] != 0).all()


def test_label_lists_are_mixed_and_smoothed_as_multi_hot_targets():
    labels = torch.tensor([[0, 3], [4, -1], [-1, -1], [1, 2]])
    weight = torch.tensor([0.9, 0.5, 0.6, 0.7])
    targets = multi_hot(labels, 5) * 0.8 + 0.2 / 5
    targets = weight[:, None] * targets + (1 - weight[:, None]) * targets[[1, 0, 3, 2]]
    expected = by_targets(sigmoid_loss, LOGITS[:4], targets).mean()
    value = sigmoid_loss(LOGITS[:4], labels, ALL[:4], weight, smoothing=0.2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_a_weight_of_one_and_no_smoothing_change_nothing(loss):
    assert torch.equal(loss(LOGITS, LABELS, ALL, torch.ones(6), smoothing=0.0), loss(LOGITS, LABELS, ALL))


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_a_mixed_batch_may_be_cut_between_pairs(loss):
    weight = torch.tensor([0.9, 0.5, 1.0, 0.7, 0.6, 0.8])
    parts = [loss(LOGITS[i : i + 2], LABELS[i : i + 2], ALL[i : i + 2], weight[i : i + 2]) for i in (0, 2, 4)]
    assert (sum(parts) / 3).item() == pytest.approx(loss(LOGITS, LABELS, ALL, weight).item(), rel=1e-6)


@pytest.mark.parametrize(("name", "loss"), [("softmax", softmax_loss), ("sigmoid", sigmoid_loss)])
def test_the_loss_is_chosen_by_name_with_its_smoothing(name, loss):
    chosen = choose_loss(name, one_label=True, smoothing=0.1)
    assert torch.equal(chosen(LOGITS, LABELS, ALL), loss(LOGITS, LABELS, ALL, smoothing=0.1))
    assert not torch.equal(chosen(LOGITS, LABELS, ALL), choose_loss(name, one_label=True)(LOGITS, LABELS, ALL))


def test_softmax_over_label_lists_is_refused():
    with pytest.raises(InputError, match=r"train\.loss: softmax"):
        choose_loss("softmax", one_label=False)
    choose_loss("sigmoid", one_label=False)
