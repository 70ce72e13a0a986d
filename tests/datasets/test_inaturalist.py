"""iNaturalist's sets of 2017 to 2019: splits and classes stand in lists, and folders mean nothing."""

import json
import re

import pytest

from pretrain.datasets.sources import open_source
from pretrain.errors import InputError
from tests.datasets.pictures import labelled, tree


def write_inaturalist(root, year=2018, images="train_val2018"):
    """Numbers of images and categories are in no order; each super category holds several categories."""
    files = {
        7: (f"{images}/Aves/9/a.jpg", 9),
        3: (f"{images}/Aves/2/b.jpg", 2),
        5: (f"{images}/Fungi/4/c.jpg", 4),
        8: (f"{images}/Fungi/2/d.jpg", 2),
    }
    tree(root, *(file for file, _ in files.values()), f"test{year}/e.jpg")
    categories = [{"id": 9, "name": "wren"}, {"id": 2, "name": "cap"}, {"id": 4, "name": "amanita"}]
    for split, chosen in (("train", (7, 3, 5)), ("val", (8,))):
        content = {
            "images": [{"id": number, "file_name": files[number][0]} for number in chosen],
            "annotations": [{"image_id": number, "category_id": files[number][1]} for number in chosen],
            "categories": categories,
        }
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return {split: root / f"{split}{year}.json" for split in ("train", "val")}


@pytest.mark.parametrize(("year", "images"), [(2017, "train_val_images"), (2018, "train_val2018")])
def test_inaturalists_splits_and_classes_are_those_of_its_lists(tmp_path, year, images):
    lists = write_inaturalist(tmp_path, year, images)
    train, val = open_source(str(tmp_path)), open_source(str(tmp_path), "val")
    assert (train.split, train.classes, val.classes) == ("train", ("cap", "amanita", "wren"), train.classes)
    assert labelled(train, tmp_path) == {
        f"{images}/Aves/9/a.jpg": "wren",
        f"{images}/Aves/2/b.jpg": "cap",
        f"{images}/Fungi/4/c.jpg": "amanita",
    }
    assert labelled(val, tmp_path) == {f"{images}/Fungi/2/d.jpg": "cap"}
    content = json.loads(lists["val"].read_text())
    for change, told in (
        ({"annotations": [{"image_id": 8, "category_id": 1}]}, "not iNaturalist's (KeyError: 1)"),
        ({"annotations": 2 * content["annotations"]}, f"has {images}/Fungi/2/d.jpg twice"),
        ({"categories": None}, "not iNaturalist's (TypeError: "),
    ):
        lists["val"].write_text(json.dumps({**content, **change}))
        with pytest.raises(InputError, match=re.escape(f"{lists['val']}: {told}")):
            open_source(str(tmp_path), "val")


def test_inaturalists_images_without_its_lists_are_not_guessed(tmp_path):
    for listing in write_inaturalist(tmp_path).values():
        listing.unlink()
    with pytest.raises(InputError, match=r"holds iNaturalist's images, .* unpack train20….json and val20….json there"):
        open_source(str(tmp_path))
