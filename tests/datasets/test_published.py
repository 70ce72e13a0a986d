"""Published sets as their archives unpack: every image has its class, checked by name."""

import re

import numpy as np
import pytest

from pretrain.datasets.published import open_imagenet, read_flowers, read_pets
from pretrain.datasets.sources import open_source
from pretrain.errors import InputError
from tests.datasets.pictures import labelled, picture, tree

DOG, CAT, FISH = "n02084071", "n02121808", "n02512053"


def splits(root, *names):
    return [open_source(str(root), name) for name in names]


# ImageNet


def test_imagenet_classes_are_its_sorted_wnids(tmp_path):
    for name in (
        "train/n02/x.JPEG",
        "train/n00000001/a.JPEG",
        "train/n00000003/b.JPEG",
        "val/n00000003/c.JPEG",
    ):
        picture(tmp_path / name)
    train, val = open_source(f"imagenet:{tmp_path}"), open_source(f"imagenet:{tmp_path}", "val")
    assert train.classes == val.classes == ("n00000001", "n00000003")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [1])
    assert (train.name, train.split) == ("imagenet", "train")
    with pytest.raises(InputError, match="no split 'test'; it has train, val"):
        open_imagenet(tmp_path, "test")


def test_kaggles_flat_validation_folder_takes_its_labels_from_the_solution(tmp_path):
    tree = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for name in ("train/n00000001/a.JPEG", "train/n00000003/b.JPEG", "val/v_1.JPEG", "val/v_2.JPEG"):
        picture(tree / name)
    with pytest.raises(InputError, match=r"no <wnid> folders.*LOC_val_solution\.csv"):
        open_imagenet(tmp_path, "val")
    solution = tmp_path / "LOC_val_solution.csv"
    solution.write_text("ImageId,PredictionString\nv_1,n00000003 1 2 3 4\nv_2,n00000001 1 2 3 4 n00000001 5 6 7 8\n")
    assert open_imagenet(tmp_path, "val").labels.tolist() == [1, 0]
    solution.write_text("ImageId,PredictionString\nv_1,n00000003 1 2 3 4\nv_2,n00000009 1 2 3 4\n")
    with pytest.raises(InputError, match=r"v_2\.JPEG has class n00000009"):
        open_imagenet(tmp_path, "val")
    head = b"ImageId,PredictionString\n"
    for content in (b"Id,Label\nv_1,n00000003\n", head + b"v_1,\n", head + b"v_1\n"):
        solution.write_bytes(content)
        with pytest.raises(InputError, match=r"LOC_val_solution\.csv: not Kaggle's: a column ImageId"):
            open_imagenet(tmp_path, "val")


def test_imagenets_archives_have_to_be_unpacked_first(tmp_path):
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(InputError, match="unpack the archives first"):
        open_imagenet(tmp_path)


def as_extracted(root):
    """Two archives unpacked side by side; the validation images are flat."""
    return tree(
        root,
        f"ILSVRC2012_img_train/{CAT}/{CAT}_1.JPEG",
        f"ILSVRC2012_img_train/{DOG}/{DOG}_7.JPEG",
        f"ILSVRC2012_img_train/{FISH}/{FISH}_2.JPEG",
        "ILSVRC2012_img_val/ILSVRC2012_val_00000001.JPEG",
        "ILSVRC2012_img_val/ILSVRC2012_val_00000002.JPEG",
    )


def write_devkit(root, numbers=(3, 1)):
    """Its own numbers are not the order of the wnids; inner synsets have numbers, too."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    synsets = np.array([[(1, CAT, 0)], [(2, FISH, 0)], [(3, DOG, 0)], [(4, "n00001740", 3)]], dtype=fields)
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in numbers))
    return data


@pytest.mark.parametrize("source", ["imagenet:{}", "{}"])
def test_a_flat_validation_folder_takes_its_labels_from_the_devkit(tmp_path, source):
    if source == "{}":
        tree(tmp_path, f"train/{CAT}/1.JPEG", f"train/{DOG}/1.JPEG", f"train/{FISH}/1.JPEG")
        tree(tmp_path, "val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG")
    else:
        as_extracted(tmp_path)
    source = source.format(tmp_path)
    assert open_source(source).labels.tolist() == [0, 1, 2]  # of the default split, train
    with pytest.raises(InputError, match=r"val: no <wnid> folders, .* 2 images .* unpack ILSVRC2012_devkit_t12"):
        open_source(source, "val")
    data = write_devkit(tmp_path)
    train, val = open_source(source), open_source(source, "val")
    assert train.classes == val.classes == (DOG, CAT, FISH)
    assert {file[-13:]: name for file, name in labelled(val, tmp_path).items()} == {
        "00000001.JPEG": DOG,
        "00000002.JPEG": CAT,
    }
    (data / "meta.mat").unlink()
    with pytest.raises(InputError, match=r"numbers whose wnids stand in .*meta\.mat, which is not there"):
        open_source(source, "val")


def test_a_devkit_of_other_numbers_is_refused(tmp_path):
    as_extracted(tmp_path)
    write_devkit(tmp_path, (3, 9))
    with pytest.raises(
        InputError, match=r"ground_truth\.txt: found '9'; the number of a synset of .*meta\.mat a line would be right"
    ):
        open_imagenet(tmp_path, "val")


def test_kaggles_imagenet_is_known_by_its_tree_and_tolerates_a_byte_order_mark(tmp_path):
    clsloc = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    tree(clsloc, f"train/{CAT}/1.JPEG", f"train/{DOG}/1.JPEG", "val/v_1.JPEG", "val/v_2.JPEG", "test/t_1.JPEG")
    tree(tmp_path, f"ILSVRC/Annotations/CLS-LOC/train/{CAT}/1.xml", "LOC_synset_mapping.txt")
    solution = f"ImageId,PredictionString\nv_1,{CAT} 1 2 3 4\nv_2,{DOG} 1 2 3 4\n"
    (tmp_path / "LOC_val_solution.csv").write_text(solution, encoding="utf-8-sig")
    for source in (str(tmp_path), f"imagenet:{tmp_path}", str(tmp_path / "ILSVRC")):
        train, val = open_source(source), open_source(source, "val")
        assert train.classes == val.classes == (DOG, CAT)
        assert labelled(val, clsloc) == {"val/v_1.JPEG": CAT, "val/v_2.JPEG": DOG}
    (tmp_path / "LOC_val_solution.csv").write_text(solution, encoding="utf-16")
    with pytest.raises(InputError, match=r"LOC_val_solution\.csv: not UTF-8"):
        open_imagenet(tmp_path, "val")
    (tmp_path / "LOC_val_solution.csv").write_text(f"{solution}v_2,{CAT} 1 2 3 4\n")
    with pytest.raises(InputError, match=f"gives v_2 both {DOG} and {CAT}"):
        open_imagenet(tmp_path, "val")


def test_a_validation_folder_alone_numbers_no_classes(tmp_path):
    tree(tmp_path, "val/v_1.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\nv_1,{CAT} 1 2 3 4\n")
    with pytest.raises(InputError, match="train: no <wnid> folders with images, by which the classes are numbered"):
        open_imagenet(tmp_path, "val")


def test_archives_of_the_classes_have_to_be_unpacked(tmp_path):
    tree(tmp_path, f"train/{CAT}.tar", f"train/{DOG}/1.JPEG")
    with pytest.raises(InputError, match=rf"train/{CAT}\.tar: not unpacked; its images belong into .*train/{CAT}/"):
        open_imagenet(tmp_path)


# Tiny-ImageNet


@pytest.fixture
def tiny(tmp_path):
    """As published: sorted folders, wnids.txt in no order, boxes beside the images."""
    for wnid in (CAT, DOG, FISH):
        tree(tmp_path, f"train/{wnid}/images/{wnid}_0.JPEG", f"train/{wnid}/{wnid}_boxes.txt")
    tree(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG", "words.txt")
    (tmp_path / "wnids.txt").write_text(f"{CAT}\n{DOG}\n{FISH}\n")
    (tmp_path / "val" / "val_annotations.txt").write_text(
        f"val_0.JPEG\t{FISH}\t0\t32\t44\t62\nval_1.JPEG\t{CAT}\t52\t55\t57\t59\n"
    )
    return tmp_path


def test_tiny_imagenet_has_its_own_labels(tiny, capsys):
    train, val = splits(tiny, None, "val")
    assert train.classes == val.classes == (DOG, CAT, FISH)
    assert (train.split, labelled(train, tiny)) == (
        "train",
        {f"train/{wnid}/images/{wnid}_0.JPEG": wnid for wnid in (DOG, CAT, FISH)},
    )
    assert labelled(val, tiny) == {"val/images/val_0.JPEG": FISH, "val/images/val_1.JPEG": CAT}
    assert capsys.readouterr().err.count("note:") == 1  # of three lists of boxes
    with pytest.raises(InputError, match="no split 'test'; it has train, val"):
        open_source(str(tiny), "test")


def test_tiny_imagenets_validation_images_alone_are_numbered_by_its_list_of_classes(tiny):
    train = open_source(str(tiny))
    (tiny / "train").rename(tiny.parent / "elsewhere")
    val = open_source(str(tiny), "val")
    assert (val.classes, labelled(val, tiny)["val/images/val_1.JPEG"]) == (train.classes, CAT)
    (tiny / "wnids.txt").unlink()
    with pytest.raises(InputError, match=r"has neither train/<wnid>/ nor wnids\.txt"):
        open_source(str(tiny), "val")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "does not have val_0.JPEG"),
        ("val_0.JPEG\n", "found 'val_0.JPEG'; a file and its wnid a line would be right"),
        ("val_0.JPEG n00000009\n", "val_0.JPEG has class n00000009, which train/ does not"),
    ],
)
def test_a_list_that_does_not_fit_the_images_is_refused(tiny, line, told):
    listing = tiny / "val" / "val_annotations.txt"
    listing.write_text(f"{line}val_1.JPEG\t{CAT}\t52\t55\t57\t59\n")
    with pytest.raises(InputError, match=re.escape(f"{listing}: {told}")):
        open_source(str(tiny), "val")


def test_a_tiny_imagenet_whose_validation_images_were_sorted_is_an_image_folder(tiny):
    (tiny / "val" / FISH / "images").mkdir(parents=True)
    (tiny / "val" / CAT).mkdir()
    (tiny / "val" / "images" / "val_0.JPEG").rename(tiny / "val" / FISH / "images" / "val_0.JPEG")
    (tiny / "val" / "images" / "val_1.JPEG").rename(tiny / "val" / CAT / "val_1.JPEG")
    train, val = splits(tiny, "train", "val")
    assert train.classes == val.classes == (DOG, CAT, FISH)
    assert labelled(val, tiny) == {f"val/{FISH}/images/val_0.JPEG": FISH, f"val/{CAT}/val_1.JPEG": CAT}


# Oxford Flowers-102 and Oxford-IIIT Pets


def test_flowers_are_read_as_published(tmp_path):
    from scipy.io import savemat

    for number in (1, 2, 3):
        picture(tmp_path / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(tmp_path / "setid.mat", {"trnid": [[3, 1]], "valid": [[2]], "tstid": [[1, 2]]})
    savemat(tmp_path / "imagelabels.mat", {"labels": [[102, 7, 1]]})
    train, val = read_flowers(tmp_path, "train"), read_flowers(tmp_path, "val")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 101], [6])
    assert train.read(1) == ("jpg", (tmp_path / "jpg" / "image_00001.jpg").read_bytes())


def test_pets_are_read_as_published(tmp_path):
    for name in ("Abyssinian_2", "great_dane_10"):
        picture(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "test.txt").write_text("#Image CLASS-ID\ngreat_dane_10 2 2 5\nAbyssinian_2 1 1 1\n")
    data = read_pets(tmp_path, "test")
    assert (data.labels.tolist(), data.classes) == ([1, 0], ("Abyssinian", "great dane"))
    assert data.read(0)[0] == "jpg"


def test_pets_are_known_by_their_folders(tmp_path):
    tree(tmp_path, *(f"images/{name}.jpg" for name in ("Abyssinian_1", "Abyssinian_2", "pug_7", "pug_8")))
    tree(tmp_path, "annotations/trimaps/pug_7.png", "annotations/list.txt")
    (tmp_path / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\npug_7 2 2 1\n", encoding="utf-8-sig")
    (tmp_path / "annotations" / "test.txt").write_text("pug_8 2 2 1\n")
    trainval, test = splits(tmp_path, None, "test")
    assert trainval.split == "trainval"
    assert trainval.classes == test.classes == ("Abyssinian", "pug")
    assert labelled(trainval, tmp_path) == {"images/Abyssinian_1.jpg": "Abyssinian", "images/pug_7.jpg": "pug"}
    assert labelled(test, tmp_path) == {"images/pug_8.jpg": "pug"}
    (tmp_path / "annotations" / "test.txt").write_text("pug_8\n")
    with pytest.raises(InputError, match=r"test\.txt: found 'pug_8'; a name and the number of its class a line"):
        open_source(str(tmp_path), "test")
    (tmp_path / "annotations" / "test.txt").write_text("pug_8 1 2 1\n")
    with pytest.raises(InputError, match=r"test\.txt: class 1 is both 'Abyssinian' and 'pug'"):
        open_source(str(tmp_path))


def test_flowers_are_known_by_their_lists(tmp_path):
    from scipy.io import savemat

    tree(tmp_path, "jpg/image_00001.jpg", "jpg/image_00002.jpg", "jpg/image_00003.jpg")
    savemat(tmp_path / "setid.mat", {"trnid": [[3, 1]], "valid": [[2]], "tstid": [[1, 2]]})
    savemat(tmp_path / "imagelabels.mat", {"labels": [[77, 1, 73]]})
    assert [data.labels.tolist() for data in splits(tmp_path, None, "val")] == [[72, 76], [0]]
    (tmp_path / "imagelabels.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut off")
    with pytest.raises(InputError, match=r"imagelabels\.mat: no MATLAB file with an array 'labels'"):
        open_source(str(tmp_path))


# Places365 and SUN397


def test_places_in_folders_by_letter_are_classes_without_the_letter(tmp_path):
    tree(tmp_path, "a/abbey/1.jpg", "a/apartment_building/outdoor/1.jpg", "b/bakery/shop/1.jpg", "b/bar/1.jpg")
    with pytest.raises(
        InputError, match=r"a list of classes .*/ClassName\.txt \(/a/abbey, one a line\) what they hold"
    ):
        open_source(str(tmp_path))
    listing = "/a/abbey\n/a/apartment_building/outdoor\n/b/bakery/shop\n"
    (tmp_path / "ClassName.txt").write_text(listing)
    with pytest.raises(InputError, match=r"ClassName\.txt: does not have bar, which "):
        open_source(str(tmp_path))
    (tmp_path / "ClassName.txt").write_text(f"{listing}/b/bar\n\n")
    assert labelled(open_source(str(tmp_path)), tmp_path) == {
        "a/abbey/1.jpg": "abbey",
        "a/apartment_building/outdoor/1.jpg": "apartment_building/outdoor",
        "b/bakery/shop/1.jpg": "bakery/shop",
        "b/bar/1.jpg": "bar",
    }


def test_folders_called_by_a_letter_that_hold_images_are_classes(tmp_path):
    tree(tmp_path, "A/1.jpg", "B/1.jpg", "B/Bs/2.jpg")
    assert labelled(open_source(str(tmp_path)), tmp_path) == {"A/1.jpg": "A", "B/1.jpg": "B", "B/Bs/2.jpg": "B"}


def test_places365_as_torchvision_lays_it_out(tmp_path):
    tree(tmp_path, "data_256_standard/a/abbey/00000001.jpg", "data_256_standard/b/bakery/shop/00000001.jpg")
    tree(tmp_path, "val_256/Places365_val_00000001.jpg", "val_256/Places365_val_00000002.jpg")
    (tmp_path / "categories_places365.txt").write_text("/a/abbey 0\n/b/bakery/shop 1\n/z/zen_garden 2\n")
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000001.jpg 1\nPlaces365_val_00000002.jpg 0\n")
    train, val = splits(tmp_path, None, "val")
    assert train.classes == val.classes == ("abbey", "bakery/shop", "zen_garden")
    assert labelled(train, tmp_path / "data_256_standard") == {
        "a/abbey/00000001.jpg": "abbey",
        "b/bakery/shop/00000001.jpg": "bakery/shop",
    }
    assert labelled(val, tmp_path / "val_256") == {
        "Places365_val_00000001.jpg": "bakery/shop",
        "Places365_val_00000002.jpg": "abbey",
    }
    for row, told in (
        (
            "Places365_val_00000001.jpg 7",
            "gives Places365_val_00000001.jpg the number 7; categories_places365.txt has 0 … 2",
        ),
        ("Places365_val_00000001.jpg -1", "found 'Places365_val_00000001.jpg -1'; a name and a number from 0 a line"),
        ("Places365_val_00000001.jpg", "found 'Places365_val_00000001.jpg'; a name and a number from 0 a line"),
    ):
        (tmp_path / "places365_val.txt").write_text(f"{row}\nPlaces365_val_00000002.jpg 0\n")
        with pytest.raises(InputError, match=re.escape(f"places365_val.txt: {told}")):
            open_source(str(tmp_path), "val")
    tree(tmp_path, "data_256_standard/c/cave/1.jpg")
    with pytest.raises(InputError, match=r"categories_places365\.txt: does not have cave"):
        open_source(str(tmp_path))


def test_places365_in_two_sizes_is_taken_by_the_folders_names(tmp_path):
    for size in ("256", "large"):
        tree(tmp_path, f"data_{size}_standard/a/abbey/{size}.jpg", f"val_{size}/Places365_val_00000001.jpg")
    (tmp_path / "categories_places365.txt").write_text("/a/abbey 0\n")
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000001.jpg 0\n")
    for split, kind in ((None, "data_256_standard"), ("train", "data_256_standard"), ("val", "val_256")):
        with pytest.raises(InputError, match=f"would both be the split .*: --split {kind}$"):
            open_source(str(tmp_path), split)
    for split, name in (
        ("data_256_standard", "a/abbey/256.jpg"),
        ("data_large_standard", "a/abbey/large.jpg"),
        ("val_large", "Places365_val_00000001.jpg"),
    ):
        data = open_source(str(tmp_path), split)
        assert (data.split, labelled(data, tmp_path / split)) == (split, {name: "abbey"})
    (tmp_path / "val_256").rename(tmp_path / "elsewhere")
    assert open_source(str(tmp_path), "val").split == "val"


# CIFAR


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar_is_known_by_torchvisions_folder(tmp_path, monkeypatch, inner):
    import torchvision

    tree(tmp_path, "cifar-10-batches-py/batches.meta", "cifar-10-batches-py/data_batch_1")

    class Fake:
        classes = ("airplane", "frog")

        def __init__(self, root, train, download):
            assert (root, download) == (str(tmp_path), False)
            self.data = np.zeros((2, 32, 32, 3), np.uint8)
            self.targets = [1, 0] if train else [0, 0]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    train, test = splits(tmp_path / inner, None, "test")
    assert (train.labels.tolist(), test.labels.tolist(), train.classes) == ([1, 0], [0, 0], ("airplane", "frog"))
