"""What is learned from and scored."""

import numpy as np
import pytest

from fewshot.config import ProtocolSection
from fewshot.report.report import describe_task
from fewshot.task import open_task
from pretrain.datasets.dataset import Dataset, png
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.shards.scan import index_shards
from pretrain.shards.write import write_shards
from pretrain.storage.retry import TIMEOUTS

IMAGES = np.zeros((12, 8, 8), np.uint8)
OTHERS = IMAGES + 1
FOUR = np.arange(12) % 4
PROTOCOL = ProtocolSection(shots=(1, 2), seeds=(0, 1))


def test_only_the_drawn_images_are_needed(digit_shards):
    task = open_task(*digit_shards, PROTOCOL)
    drawn = {int(id) for draw in task.draws for id in draw.ids}
    assert task.support_ids.tolist() == sorted(drawn)
    assert (task.classes, len(task.draws), len(task.query_labels)) == (10, 4, 150)


def test_draws_are_of_the_index_labels(digit_shards):
    task = open_task(*digit_shards, PROTOCOL)
    for draw in task.draws:
        assert np.array_equal(task.support.labels(draw.ids)[:, 0], draw.labels)


@pytest.mark.parametrize("missing", ["support", "query"])
def test_an_index_that_is_not_set_is_named(digit_shards, missing):
    paths = dict(zip(("support", "query"), digit_shards, strict=True)) | {missing: None}
    with pytest.raises(InputError, match=rf"data\.{missing}: null; set it to an INDEX.*data\.{missing}=PATH"):
        open_task(paths["support"], paths["query"], PROTOCOL)


def test_a_query_label_that_the_support_lacks_is_refused(shards):
    support, query = shards("three", IMAGES, FOUR % 3), shards("four", IMAGES, FOUR)
    with pytest.raises(InputError, match=r"data\.query: 3 of 12 images have labels above 2"):
        open_task(support, query, PROTOCOL)


def test_a_query_set_may_lack_classes(shards):
    task = open_task(shards("four", IMAGES, FOUR), shards("three", IMAGES, FOUR % 3), PROTOCOL)
    assert task.classes == 4


def test_classes_of_other_names_are_refused(shards):
    support = shards("named", IMAGES, FOUR, ["ant", "bee", "cat", "dog"])
    query = shards("shifted", IMAGES, FOUR, ["ant", "cat", "cow", "dog"])
    with pytest.raises(InputError, match=r"data\.query: class 1 is 'cat' here and 'bee' in data\.support"):
        open_task(support, query, PROTOCOL)


def test_a_class_more_on_one_side_is_refused(shards):
    support = shards("four", IMAGES, FOUR, ["ant", "bee", "cat", "dog"])
    query = shards("three", IMAGES, FOUR % 3, ["ant", "bee", "cat"])
    with pytest.raises(InputError, match="class 3 is absent here and 'dog'"):
        open_task(support, query, PROTOCOL)


def test_too_few_images_name_the_index_and_the_classes(shards):
    support = shards("few", IMAGES, FOUR)
    with pytest.raises(InputError, match=r"data\.support .*few.*: 5 shots.*class 0 has 3"):
        open_task(support, shards("other", OTHERS, FOUR), ProtocolSection(shots=(1, 5), seeds=(0,)))


def with_lists(folder, starts, tone=0):
    """Four images of one tone whose label lists begin at `starts`."""
    labels = np.arange(starts[-1], dtype=np.int32) % 2
    data = Dataset("lists", "all", labels, np.array(starts), None, "x", lambda row: ("png", png(IMAGES[row] + tone)))
    return str(write_shards(data, folder)[0])


@pytest.mark.parametrize(
    ("starts", "what"), [([0, 2, 4, 6, 8], "images with several labels"), ([0] * 5, "no image with a label")]
)
def test_lists_of_several_labels_or_of_none_are_refused(starts, what, tmp_path, digit_shards):
    with pytest.raises(InputError, match=rf"data\.query: .* has {what}; few-shot needs one"):
        open_task(digit_shards[0], with_lists(tmp_path, starts), PROTOCOL)


def test_images_without_a_label_are_neither_learned_from_nor_scored(tmp_path, digit_shards):
    labels = np.repeat([0, 1], 30).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.arange(90) % 3 != 1)])
    gaps = []
    for images in (IMAGES, OTHERS):
        data = Dataset("gaps", "all", labels, starts, None, "x", lambda row, image=images[0]: ("png", png(image)))
        gaps.append(str(write_shards(data, tmp_path / str(len(gaps)))[0]))
    task = open_task(*gaps, ProtocolSection(shots=(30,), seeds=(0, 1)))
    without = np.flatnonzero(task.support.labels(np.arange(90))[:, 0] < 0)
    assert len(without) == 30
    assert not set(without) & set(task.support_ids)
    assert (task.query.labels(task.query_ids)[:, 0] >= 0).all()
    assert (len(task.support_ids), len(task.query_ids), len(task.query_labels)) == (60, 60, 60)
    assert np.array_equal(task.query_labels, task.query.labels(task.query_ids)[:, 0])
    for draw in task.draws:
        assert np.array_equal(task.support.labels(draw.ids)[:, 0], draw.labels)
    images = describe_task(task, 0)
    assert [(images[split]["images"], images[split]["unlabelled"]) for split in ("support", "query")] == [(60, 30)] * 2
    with pytest.raises(InputError, match=r"31 shots need 31 images .* class 0 has 30"):
        open_task(*gaps, ProtocolSection(shots=(31,), seeds=(0,)))


def test_lists_of_one_label_each_are_single_labels(tmp_path):
    lists = [with_lists(tmp_path / str(tone), [0, 1, 2, 3, 4], tone) for tone in (0, 1)]
    task = open_task(*lists, PROTOCOL)
    assert (task.classes, sorted(task.query_labels.tolist())) == (2, [0, 0, 1, 1])


def test_an_index_named_twice_is_refused(digit_shards):
    support, query = digit_shards
    for paths in (((support, support), query), (support, (query, query))):
        with pytest.raises(InputError, match=r"data\.(support|query): .* holds the samples of .* again; index each"):
            open_task(*paths, PROTOCOL)


def test_images_that_are_learned_from_are_not_scored(digit_shards, shards, tmp_path):
    support, query = digit_shards
    learned = Index.open(support)
    some = tmp_path / "some.vfi"
    index_shards([next(learned.shards.urls())], some, workers=1)
    for scored in (support, (query, support), str(some), (query, str(some))):
        with pytest.raises(InputError, match=r"data\.query: .* holds the samples of .* would be scored; other images"):
            open_task(support, scored, PROTOCOL)


def test_names_are_compared_beside_indices_without(shards):
    named = shards("named", IMAGES, FOUR, ["ant", "bee", "cat", "dog"])
    unnamed = shards("unnamed", OTHERS, FOUR)
    shifted = shards("shifted", IMAGES + 2, FOUR, ["ant", "cat", "bee", "dog"])
    with pytest.raises(InputError, match=r"data\.query: class 1 is 'cat' here and 'bee' in data\.support"):
        open_task((unnamed, named), shifted, PROTOCOL)
    note = f"{unnamed}: without names of its classes, taken to number them as {named} does"
    assert open_task(named, unnamed, PROTOCOL).note == note
    assert open_task((named, unnamed), shards("also", IMAGES + 3, FOUR), PROTOCOL).note.startswith(f"{unnamed}, ")
    assert open_task(unnamed, shards("neither", IMAGES + 4, FOUR), PROTOCOL).note == ""
    more = shards("more", IMAGES + 5, np.arange(12) % 6)
    with pytest.raises(InputError, match=r"more.*: has labels up to 5, and .*named.* names 4 classes"):
        open_task((named, more), unnamed, PROTOCOL)


def test_colour_that_a_grey_network_drops_is_told(tmp_path, digit_shards):
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = Dataset("colour", "all", FOUR.astype(np.int32), None, None, "x", lambda row: ("png", png(colour)))
    task = open_task(digit_shards[0], str(write_shards(data, tmp_path)[0]), PROTOCOL)
    (note,) = task.colour_notes(1, TIMEOUTS)
    assert "takes grey images, and 12 of 12 images looked at in data.query are in colour" in note
    (note,) = task.colour_notes(3, TIMEOUTS, "fewshot")
    assert "takes RGB images, and none of 16 images looked at in fewshot.support is in colour" in note
