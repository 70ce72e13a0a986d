"""What is made of predictions, against scikit-learn's figures and against sums by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, log_loss, precision_score, recall_score, top_k_accuracy_score

from finetune.evaluation.prediction import image_losses
from finetune.evaluation.scores import Predictions, calibration, calibration_error, score

CLASSES = 12


def predictions(logits, labels, kind="softmax", readable=None):
    """Predictions of logits [n, CLASSES]; labels [n, L] for the losses."""
    logits = torch.from_numpy(logits)
    best = logits.topk(5, dim=1)
    probabilities = logits.softmax(dim=1).gather(1, best.indices) if kind == "softmax" else best.values.sigmoid()
    several = labels.shape[1] > 1
    return Predictions(
        np.arange(len(logits)),
        tuple(f"key {number}" for number in range(len(logits))),
        best.indices.numpy(),
        probabilities.numpy(),
        image_losses(logits, torch.from_numpy(labels), kind, several).numpy(),
        np.ones(len(logits), bool) if readable is None else readable,
    )


@pytest.fixture(scope="module")
def drawn():
    """Logits [500, 12], fp32, and labels [500, 1] that they are better than chance at; class 11 has no image."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, CLASSES - 1, (500, 1))
    logits = draws.normal(0, 1, (500, CLASSES)) + 2 * np.eye(CLASSES)[labels[:, 0]]
    return logits.astype(np.float32), labels


def test_accuracies_and_loss_are_scikit_learns(drawn):
    logits, labels = drawn
    found = score(predictions(logits, labels), labels, bins=15)
    truth, every = labels[:, 0], np.arange(CLASSES)
    assert found.top1 == top_k_accuracy_score(truth, logits, k=1, labels=every)
    assert found.top5 == top_k_accuracy_score(truth, logits, k=5, labels=every)
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    assert found.loss == pytest.approx(log_loss(truth, probabilities, labels=every), rel=1e-6)
    assert found.confidence == pytest.approx(probabilities.max(axis=1).mean(), rel=1e-6)
    assert (found.images, found.unlabelled, found.unreadable) == (500, 0, 0)


def test_confusions_and_the_rows_of_classes_are_scikit_learns(drawn):
    logits, labels = drawn
    found = score(predictions(logits, labels), labels, bins=15)
    truth, said, every = labels[:, 0], logits.argmax(axis=1), np.arange(CLASSES)
    expected = confusion_matrix(truth, said, labels=every)
    matrix = found.confusions.matrix()
    assert np.array_equal(matrix, expected)
    options = {"labels": every, "average": None, "zero_division": np.nan}
    recall, precision = recall_score(truth, said, **options), precision_score(truth, said, **options)
    for row in found.classes:
        assert row.images == expected[row.label].sum()
        assert row.predicted == expected[:, row.label].sum()
        for value, other in ((row.top1, recall[row.label]), (row.precision, precision[row.label])):
            assert np.isnan(other) if value is None else value == other
    by_class = {row.label: row for row in found.classes}
    assert (by_class[11].images, by_class[11].top1) == (0, None)
    off = [(-expected[a, b], a, b) for a in every for b in every if a != b and expected[a, b]]
    assert found.confusions.commonest(7) == [(a, b, -count) for count, a, b in sorted(off)[:7]]


def test_many_classes_are_counted_in_blocks_of_consecutive_ones(drawn):
    logits, labels = drawn
    confusions = score(predictions(logits, labels), labels, bins=15).confusions
    whole = confusions.matrix()
    assert np.array_equal(confusions.matrix(4), whole.reshape(4, 3, 4, 3).sum(axis=(1, 3)))
    assert np.array_equal(confusions.matrix(50), whole)
    assert confusions.matrix(5).sum() == 500


def test_the_calibration_error_is_the_sum_by_hand(drawn):
    logits, labels = drawn
    found = score(predictions(logits, labels), labels, bins=15)
    confidence = predictions(logits, labels).probabilities[:, 0].astype(np.float64)
    right = logits.argmax(axis=1) == labels[:, 0]
    error = 0.0
    for number in range(15):
        inside = [row for row in range(500) if number / 15 < confidence[row] <= (number + 1) / 15]
        if inside:
            gap = abs(sum(right[row] for row in inside) - sum(confidence[row] for row in inside)) / len(inside)
            error += len(inside) / 500 * gap
    assert found.ece == pytest.approx(error, rel=1e-12)
    assert 0.01 < error < 0.5
    assert [one.images for one in found.bins].count(0) < 10
    assert sum(one.images for one in found.bins) == 500


def test_bins_are_closed_above_and_the_first_one_holds_0():
    confidence, right = np.array([0.0, 0.25, 0.2500001, 0.5, 1.0]), np.array([True, False, True, False, True])
    bins = calibration(confidence, right, 4)
    assert [one.images for one in bins] == [2, 2, 0, 1]
    assert (bins[0].confidence, bins[0].accuracy) == (0.125, 0.5)
    assert (bins[2].confidence, bins[2].accuracy) == (None, None)
    assert calibration_error(bins) == pytest.approx((2 * 0.375 + 2 * abs(0.5 - 0.37500005) + 0) / 5)


def test_one_of_several_labels_is_right_and_images_without_one_are_left_out():
    """As a literal evaluator of ReaL counts: `is_correct = pred in labels`, over images with labels."""
    draws = np.random.default_rng(1)
    logits = draws.normal(0, 1, (200, CLASSES)).astype(np.float32)
    lists = [draws.choice(CLASSES, draws.integers(0, 4), replace=False).tolist() for _ in range(200)]
    labels = np.full((200, 3), -1)
    for row, of in enumerate(lists):
        labels[row, : len(of)] = of
    found = score(predictions(logits, labels), labels, bins=15)
    order = np.argsort(-logits, axis=1)
    correct = [order[row, 0] in of for row, of in enumerate(lists) if of]
    among = [bool(set(order[row, :5]) & set(of)) for row, of in enumerate(lists) if of]
    assert (found.top1, found.top5) == (sum(correct) / len(correct), sum(among) / len(among))
    assert (found.images, found.unlabelled) == (len(correct), 200 - len(correct))
    assert 20 < found.unlabelled < 100
    assert found.loss is None  # softmax has none for several labels
    assert sum(one.images for one in found.bins) == len(correct)
    of_three = next(row for row in found.classes if row.label == 3)
    rows = [row for row, of in enumerate(lists) if 3 in of]
    assert (of_three.images, of_three.top1) == (len(rows), np.mean([order[row, 0] in lists[row] for row in rows]))
    single = [row for row, of in enumerate(lists) if len(of) == 1]
    assert found.confusions.counts.sum() == len(single)


def test_an_image_that_does_not_decode_is_a_miss_and_in_nothing_else(drawn):
    _, labels = drawn
    readable = np.ones(500, bool)
    perfect = np.eye(CLASSES, dtype=np.float32)[labels[:, 0]] * 20
    readable[[3, 77]] = False
    found = score(predictions(perfect, labels, readable=readable), labels, bins=15)
    assert (found.top1, found.top5, found.unreadable) == (498 / 500, 498 / 500, 2)
    assert sum(one.images for one in found.bins) == 498
    assert found.confusions.counts.sum() == 498
    assert {row.precision for row in found.classes} == {1.0}


def test_losses_are_those_of_training_image_by_image():
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    single = torch.tensor([[1], [2], [3], [4], [5], [11]])
    expected = F.cross_entropy(logits, single[:, 0], reduction="none")
    assert torch.equal(image_losses(logits, single, "softmax", several=False), expected)
    lists = torch.tensor([[1, 3], [2, -1], [0, 11], [4, -1], [5, 6], [-1, -1]])
    targets = torch.zeros(6, CLASSES)
    for row, of in enumerate(lists.tolist()):
        targets[row, [label for label in of if label >= 0]] = 1
    by_hand = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).sum(dim=1)
    assert torch.allclose(image_losses(logits, lists, "sigmoid", several=True), by_hand)
    assert image_losses(logits, lists, "softmax", several=True).isnan().all()
