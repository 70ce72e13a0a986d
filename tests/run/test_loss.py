"""The losses, against torch's own and against their definition under masks and cuts."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import InputError
from pretrain.run.loss import choose_loss, multi_hot, sigmoid_loss, softmax_loss

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


def test_softmax_over_label_lists_is_refused():
    with pytest.raises(InputError, match=r"train\.loss: softmax"):
        choose_loss("softmax", multilabel=True)
    assert choose_loss("sigmoid", multilabel=True) is sigmoid_loss
