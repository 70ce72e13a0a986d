"""What folders people have, and which of their sub-folders are splits, classes, or neither: nothing is guessed."""

import re

import pytest

from pretrain.datasets.sources import open_source
from pretrain.errors import InputError
from tests.datasets.pictures import labelled, tree


def classes(root, split=None):
    data = open_source(str(root), split)
    return data.split, data.classes, labelled(data, root)


def refused(root, split=None):
    with pytest.raises(InputError) as error:
        open_source(str(root), split)
    assert str(error.value).startswith(str(root))
    return str(error.value).removeprefix(str(root))


SPELLINGS = [
    ("train", "val", "test"),
    ("Train", "Val", "Test"),
    ("TRAIN", "VALID", "TEST"),
    ("training", "validation", "testing"),
    ("Training Set", "dev", "Test Set"),
    ("train_images", "val_images", "test_images"),
    ("trainset", "valset", "testset"),
    ("2021_train", "2021_valid", "2021_test"),
    ("train2017", "val2017", "test2017"),
    ("train-data", "evaluation", "test-data"),
]


@pytest.mark.parametrize("spelt", SPELLINGS, ids="-".join)
def test_splits_are_known_in_any_spelling(tmp_path, spelt):
    for folder in spelt:
        tree(tmp_path, f"{folder}/cat/{folder}1.jpg", f"{folder}/dog/{folder}2.jpg")
    for split, folder in zip(("train", "val", "test"), spelt, strict=True):
        expected = (split, ("cat", "dog"), {f"{folder}/cat/{folder}1.jpg": "cat", f"{folder}/dog/{folder}2.jpg": "dog"})
        assert classes(tmp_path, split) == classes(tmp_path, folder) == expected
    assert open_source(str(tmp_path)).split == "train"


def test_two_spellings_of_one_split_are_refused(tmp_path):
    tree(tmp_path, "val/cat/1.jpg", "validation/cat/2.jpg", "train/cat/3.jpg")
    assert refused(tmp_path) == (
        ": val/ and validation/ would both be the split val; keep one here, or take one of them by its folder's name: "
        "--split val"
    )
    assert refused(tmp_path, "evaluation") == refused(tmp_path)
    assert classes(tmp_path, "validation") == ("validation", ("cat",), {"validation/cat/2.jpg": "cat"})
    assert classes(tmp_path, "val") == ("val", ("cat",), {"val/cat/1.jpg": "cat"})
    assert classes(tmp_path, "train") == ("train", ("cat",), {"train/cat/3.jpg": "cat"})


def test_numbered_parts_of_a_split_are_taken_by_name(tmp_path):
    tree(tmp_path, "train_1/cat/1.jpg", "train_1/dog/2.jpg", "train_2/dog/3.jpg", "val/cat/4.jpg")
    assert refused(tmp_path).endswith("take one of them by its folder's name: --split train_1")
    assert classes(tmp_path, "train_2") == ("train_2", ("cat", "dog"), {"train_2/dog/3.jpg": "dog"})


def test_without_a_training_split_it_has_to_be_said_which(tmp_path):
    tree(tmp_path, "val/cat/1.jpg", "test/cat/2.jpg")
    assert refused(tmp_path) == ": has the splits test, val; say which: --split test"
    assert classes(tmp_path, "val")[2] == {"val/cat/1.jpg": "cat"}


def test_folders_without_images_are_neither_splits_nor_classes(tmp_path, capsys):
    tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg")
    tree(
        tmp_path,
        "annotations/train.json",
        "annotations/cat/1.xml",
        "train/.ipynb_checkpoints/cat.jpg",
        "train/empty/a.txt",
    )
    assert classes(tmp_path) == ("train", ("cat", "dog"), {"train/cat/1.jpg": "cat", "train/dog/2.jpg": "dog"})
    assert classes(tmp_path, "val") == ("val", ("cat", "dog"), {"val/cat/3.jpg": "cat", "val/dog/4.jpg": "dog"})
    assert "passed over folders without images: annotations" in capsys.readouterr().err


def test_what_tools_leave_behind_is_no_class(tmp_path):
    left = ("__MACOSX/cat/._1.jpg", "__MACOSX/x.jpg", ".ipynb_checkpoints/1.jpg", "@eaDir/1.jpg", "lost+found/1.jpg")
    tree(tmp_path, "cat/1.jpg", "dog/2.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/.hidden/3.jpg", *left)
    tree(tmp_path, "cat/._1.jpg", "cat/Thumbs.db", "cat/.DS_Store", "$RECYCLE.BIN/x.jpg", ".git/y.jpg")
    assert classes(tmp_path) == ("all", ("cat", "dog"), {"cat/1.jpg": "cat", "dog/2.jpg": "dog"})


@pytest.mark.parametrize("beside", ["annotations/masks/1.png", "cat/5.jpg", "masks/1.png"])
def test_splits_beside_other_folders_of_images_are_not_guessed(tmp_path, beside):
    tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg", beside)
    other = beside.partition("/")[0]
    assert refused(tmp_path) == (
        f": holds train/, val/, called like splits, and beside them {other}/, with images in each; --split train takes "
        "that split (then no other folder is a class), --split all takes each folder as a class"
    )
    assert classes(tmp_path, "val") == ("val", ("cat", "dog"), {"val/cat/3.jpg": "cat", "val/dog/4.jpg": "dog"})
    assert classes(tmp_path, "all")[:2] == ("all", tuple(sorted(("train", "val", other))))


def test_a_class_called_train_is_taken_as_one_if_that_is_said(tmp_path):
    tree(tmp_path, "train/1.jpg", "aquarium_fish/2.jpg")
    assert "called like splits, and beside them aquarium_fish/" in refused(tmp_path)
    assert classes(tmp_path, "all") == (
        "all", ("aquarium_fish", "train"), {"train/1.jpg": "train", "aquarium_fish/2.jpg": "aquarium_fish"},
    )  # fmt: skip
    tree(tmp_path / "better", "train/train/1.jpg", "train/aquarium_fish/2.jpg")
    assert classes(tmp_path / "better")[1] == ("aquarium_fish", "train")
    tree(tmp_path / "better", "test/train/3.jpg", "test/aquarium_fish/4.jpg")
    assert classes(tmp_path / "better", "test")[2] == {
        "test/train/3.jpg": "train", "test/aquarium_fish/4.jpg": "aquarium_fish",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        (("train/val/cat/3.jpg", "train/val/dog/4.jpg"), "train/val"),
        (("train/val/3.jpg",), "train/val"),
        (("train/valid/3.jpg", "test/valid/cat/4.jpg"), "test/valid"),
        (("test/seg_train/cat/3.jpg",), "test/seg_train"),
    ],
)
def test_a_split_in_a_split_is_no_class(tmp_path, inner, named):
    tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "test/cat/5.jpg", "test/dog/6.jpg", *inner)
    for split in (None, "test"):
        assert refused(tmp_path, split).startswith(f"/{named}: a folder called like a split, among class folders (cat,")
    assert refused(tmp_path / named.partition("/")[0])


def test_splits_in_an_archives_folder_are_no_classes(tmp_path):
    tree(tmp_path, "pets/pets/train/cat/1.jpg", "pets/pets/train/dog/2.jpg", "pets/pets/val/dog/3.jpg")
    assert refused(tmp_path / "pets").endswith(
        f"(train, val): if these are the classes or splits, give {tmp_path}/pets/pets"
    )
    assert classes(tmp_path / "pets" / "pets")[1] == ("cat", "dog")


def test_classes_whose_names_only_contain_a_splits_are_classes(tmp_path):
    tree(tmp_path, "bullet_train/1.jpg", "test_tube/2.jpg", "cat/3.jpg")
    assert classes(tmp_path)[1] == ("bullet_train", "cat", "test_tube")


def test_folders_that_all_contain_a_splits_name_are_not_guessed(tmp_path):
    tree(tmp_path, *(f"train.X{part}/n0{part}/{part}.jpg" for part in (1, 2)), "val.X/n01/1.jpg", "val.X/n02/2.jpg")
    assert refused(tmp_path).startswith(": holds train.X1/, train.X2/, val.X/, called like splits; --split")
    assert classes(tmp_path, "train.X1") == ("train.X1", ("n01", "n02"), {"train.X1/n01/1.jpg": "n01"})


def test_splits_called_otherwise_beside_others_are_not_guessed(tmp_path):
    """Intel's scenes: each split is in a folder of its own name, and the images to predict are flat."""
    tree(tmp_path, "seg_train/seg_train/sea/1.jpg", "seg_test/seg_test/sea/2.jpg", "seg_pred/seg_pred/3.jpg")
    assert refused(tmp_path).startswith(": holds seg_test/, seg_train/, called like splits, and beside them seg_pred/")
    for split, number in (("seg_train", 1), ("seg_test", 2)):
        assert classes(tmp_path, split) == (split, ("sea",), {f"{split}/{split}/sea/{number}.jpg": "sea"})


def test_further_splits_keep_their_names_and_the_numbers_of_all(tmp_path):
    """As iNaturalist has them: its public test set is flat."""
    tree(tmp_path, "train/00001_Animalia_Ant/1.jpg", "train/00002_Plantae_Bee/2.jpg", "public_test/3.jpg")
    tree(tmp_path, "train_mini/00002_Plantae_Bee/2.jpg", "val/00002_Plantae_Bee/4.jpg", "train.json")
    names = ("00001_Animalia_Ant", "00002_Plantae_Bee")
    assert classes(tmp_path)[:2] == ("train", names)
    for split in ("train_mini", "val"):
        assert [(s, c) for s, c, _ in [classes(tmp_path, split)]] == [(split, names)]
        assert open_source(str(tmp_path), split).labels.tolist() == [1]
    assert refused(tmp_path, "public_test").startswith("/public_test: 1 images (3.jpg) and no class folders")


def test_a_split_that_shares_no_class_with_the_others_is_refused(tmp_path):
    tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/Cats/3.jpg", "val/Dogs/4.jpg")
    for split in ("train", "val"):
        told = refused(tmp_path, split)
        assert told.startswith("/train: shares no class with the other splits (cat, dog; there Cats, Dogs)")
        assert told.endswith(f"call them alike, or give {tmp_path / split} by itself")
    assert classes(tmp_path / "val")[1] == ("Cats", "Dogs")


@pytest.mark.parametrize(("one", "other"), [("Cat", "cat"), ("cat", "cat "), ("caf\u00e9", "cafe\u0301")])
def test_a_class_that_splits_spell_in_two_ways_is_refused(tmp_path, one, other):
    tree(tmp_path, f"train/{one}/1.jpg", "train/dog/2.jpg", f"val/{other}/3.jpg", "val/dog/4.jpg")
    assert refused(tmp_path) == (f"/val: class {other!a} is called {one!a} in {tmp_path}/train; call it alike")
    tree(tmp_path, f"train/{other}/5.jpg", f"val/{one}/6.jpg")
    if (one, other) == ("Cat", "cat"):  # as letters are, small and capital
        assert classes(tmp_path)[1] == ("Cat", "cat", "dog")
    else:
        told = refused(tmp_path)
        assert told.startswith("/train: classes ")
        assert f"{one!a}" in told
        assert f"{other!a} " in told
        assert told.endswith(" look alike; one folder would be right")


def test_a_split_without_labels_numbers_no_classes(tmp_path):
    tree(tmp_path, "train/images/1.jpg", "train/labels/1.txt", "val/cat/2.jpg", "val/dog/3.jpg")
    assert refused(tmp_path).startswith("/train/images: 1 images (1.jpg) and no class folders: nothing here says")
    assert classes(tmp_path, "val")[1] == ("cat", "dog")


def test_a_flat_validation_split_is_told_as_one(tmp_path):
    tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/3.jpg", "val/4.jpg")
    assert classes(tmp_path)[1] == ("cat", "dog")
    assert refused(tmp_path, "val") == (
        "/val: 2 images (3.jpg, 4.jpg) and no class folders: nothing here says what they show; DIR/<class>/*.jpg or "
        "DIR/<split>/<class>/*.jpg would be right, or a labels.json that lists labels"
    )


def test_a_test_split_without_labels_leaves_the_training_classes_alone(tmp_path):
    tree(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "test/test/3.jpg")
    assert classes(tmp_path) == ("train", ("cat", "dog"), {"train/cat/1.jpg": "cat", "train/dog/2.jpg": "dog"})
    assert refused(tmp_path, "test").startswith("/test/test: 1 images (3.jpg) and no class folders")
    tree(tmp_path, "test/unknown/4.jpg")
    assert refused(tmp_path / "test").startswith(": holds test/, called like splits, and beside them unknown/")
    (tmp_path / "test" / "test").rename(tmp_path / "elsewhere")
    tree(tmp_path / "b", "train/cat/1.jpg", "train/dog/2.jpg", "test/unknown/3.jpg")
    assert refused(tmp_path / "b").endswith(f"call them alike, or give {tmp_path}/b/train by itself")
    assert classes(tmp_path / "b" / "train")[1] == ("cat", "dog")


def test_kaggles_flat_images_are_not_guessed(tmp_path):
    tree(tmp_path, "train/cat.0.jpg", "train/dog.0.jpg", "test1/1.jpg")  # Dogs vs. Cats
    assert refused(tmp_path).startswith("/train: 2 images (cat.0.jpg, dog.0.jpg) and no class folders: nothing here")
    (tmp_path / "train.csv").write_text("image_id,label\ncat.0.jpg,1\n", encoding="utf-8-sig")
    assert f"; {tmp_path}/train.csv may (columns image_id, label); " in refused(tmp_path)
    tree(tmp_path / "flat", "cat.0.jpg", "dog.0.jpg")
    assert refused(tmp_path / "flat").startswith(": 2 images (cat.0.jpg, dog.0.jpg) and no class folders")


@pytest.mark.parametrize(
    "names", [("images/1.jpg", "images/2.jpg"), ("JPEGImages/1.jpg",), ("img/1.jpg", "labels/1.txt")]
)
def test_a_folder_that_only_holds_the_images_is_no_class(tmp_path, names):
    tree(tmp_path, *names)
    assert re.match(r"/\w+: \d images \(1\.jpg.*\) and no class folders", refused(tmp_path))


def test_what_is_there_instead_of_images_is_told(tmp_path):
    tree(tmp_path, "train/cat/1.npy", "train/dog/2.npy", "a.tar")
    assert refused(tmp_path).startswith(": no images, but 3 other files (a.tar, train/cat/1.npy, train/dog/2.npy; imag")
    assert refused(tmp_path / "a.tar") == ": is a file; a SOURCE is a folder of images: unpack an archive first"


def test_a_folder_of_images_beside_another_is_no_class(tmp_path):
    tree(tmp_path, "images/cat/1.jpg", "images/dog/2.jpg", "masks/1.png")
    assert refused(tmp_path).startswith(": holds images/, which is called like no class, and masks beside, with images")
    assert classes(tmp_path / "images")[1] == ("cat", "dog")


@pytest.mark.parametrize("holder", ["Images", "images", "JPEGImages"])
def test_classes_in_a_folder_of_images_are_the_splits(tmp_path, holder):
    tree(tmp_path / "a", f"{holder}/cat/1.jpg", f"{holder}/dog/2.jpg", "Annotation/cat/1")  # Stanford Dogs
    assert classes(tmp_path / "a")[1] == ("cat", "dog")
    tree(tmp_path / "b", f"train/{holder}/cat/1.jpg", f"train/{holder}/dog/2.jpg", "val/dog/3.jpg")
    assert classes(tmp_path / "b") == (
        "train", ("cat", "dog"), {f"train/{holder}/cat/1.jpg": "cat", f"train/{holder}/dog/2.jpg": "dog"},
    )  # fmt: skip
    assert classes(tmp_path / "b", "val") == ("val", ("cat", "dog"), {"val/dog/3.jpg": "dog"})


def test_classes_in_a_folder_of_images_are_found_beside_lists(tmp_path, capsys):
    tree(tmp_path, "images/cat/1.jpg", "images/dog/2.jpg", "meta/classes.txt")
    assert classes(tmp_path)[1:] == (("cat", "dog"), {"images/cat/1.jpg": "cat", "images/dog/2.jpg": "dog"})
    assert "images: holds the images; passed over meta" in capsys.readouterr().err


@pytest.mark.parametrize("inner", ["flower_photos", "oxford-iiit-pet", "101_ObjectCategories"])
def test_an_archives_own_top_folder_is_named(tmp_path, inner):
    tree(tmp_path, f"{inner}/daisy/1.jpg", f"{inner}/rose/2.jpg", "Annotations/daisy/1.mat", "__MACOSX/x.jpg")
    assert refused(tmp_path) == (
        f": holds one folder, {inner}/, with folders in it (daisy, rose): if these are the classes or splits, give "
        f"{tmp_path / inner}"
    )
    assert classes(tmp_path / inner)[1] == ("daisy", "rose")


@pytest.mark.parametrize(
    "names",
    [
        ("food-101/images/pie/1.jpg", "food-101/images/soup/2.jpg"),
        ("flowers-102/jpg/1.jpg", "flowers-102/jpg/2.jpg"),
        ("oxford-iiit-pet/images/pug_1.jpg", "oxford-iiit-pet/annotations/trimaps/pug_1.png"),
    ],
    ids=lambda names: names[0].partition("/")[0],
)
def test_a_set_in_a_folder_is_no_class(tmp_path, names):
    tree(tmp_path, *names)
    inner = tmp_path / names[0].partition("/")[0]
    assert refused(tmp_path).endswith(f": if these are the classes or splits, give {inner}")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg"), "/cat/test: a split's name inside the class"),
        (
            ("bottle/train/good/1.png", "bottle/test/broken/2.png", "bottle/ground_truth/broken/2.png", "nut/x/3.png"),
            "/bottle/test/broken: a split's name inside the class folder ",
        ),
        (("cat/a/val/1.jpg", "dog/2.jpg"), "/cat/a/val: a split's name inside the class folder "),
        (
            ("cat/images/1.jpg", "cat/masks/1.png", "dog/2.jpg"),
            "/cat/images: called like no class, with masks/, in the",
        ),
        (
            ("cat/1.jpg", "cat/annotations/1.png", "dog/2.jpg"),
            "/cat/annotations: called like no class, with images, in",
        ),
        (
            ("food-101/images/pie/1.jpg", "CUB/images/wren/2.jpg"),
            "/CUB/images: called like no class, with folders in it, in the class folder ",
        ),
        (("fold1/cat/1.jpg", "fold1/dog/2.jpg", "fold2/cat/3.jpg", "fold2/dog/4.jpg"), "(cat, dog)"),
        (("fold1/cat/1.jpg", "fold1/dog/2.jpg", "fold2/dog/3.jpg", "fold2/cow/4.jpg", "fold3/cow/5.jpg"), "(dog)"),
        (("amazon/bike/1.jpg", "amazon/mug/2.jpg", "dslr/bike/3.jpg", "dslr/mug/4.jpg"), "(bike, mug)"),
        (("raw/cat/1.jpg", "raw/dog/2.jpg", "resized/cat/1.jpg", "resized/dog/2.jpg"), "(cat, dog)"),
        (("cat/1.jpg", "cat/depth/1.png", "dog/2.jpg", "dog/depth/2.png"), "(depth)"),
        (
            ("no/1.jpg", "yes/2.jpg", "tumor/no/3.jpg", "tumor/yes/4.jpg"),
            "/tumor/no: a folder called like a class, inside",
        ),
        (
            ("cat/1.jpg", "dog/2.jpg", "masks/3.png"),
            ": holds masks/, which is called like no class, and cat, dog beside",
        ),
    ],
)
def test_what_class_folders_hold_is_not_guessed(tmp_path, names, told):
    tree(tmp_path, *names)
    found = refused(tmp_path)
    if told.startswith("("):
        told = f"hold folders of the same names {told}: these may be the classes, or one of several kinds of pictures"
    assert told in found
    assert f"{tmp_path} given with --split all takes " in found
    outer = sorted({name.partition("/")[0] for name in names})
    assert set(classes(tmp_path, "all")[2].items()) == {(name, name.partition("/")[0]) for name in names}
    assert classes(tmp_path, "all")[1] == tuple(outer)


def test_folders_in_class_folders_that_tell_nothing_else_are_the_classes(tmp_path):
    tree(
        tmp_path,
        "cat/images/1.jpg",
        "cat/images/old/2.jpg",
        "cow/images/3.jpg",
        "dog/photos/4.jpg",
        "dog/photos2/5.jpg",
    )
    tree(tmp_path, "hen/6.jpg", "hen/photos/7.jpg")
    assert set(classes(tmp_path)[2].values()) == {"cat", "cow", "dog", "hen"}


@pytest.mark.parametrize("names", [("A/A_01/1.jpg", "A/A_02/2.jpg", "B/B_01/3.jpg"), ("0/0a/1.jpg", "0/0b/2.jpg")])
def test_folders_of_one_letter_are_not_guessed(tmp_path, names):
    tree(tmp_path, *names)
    assert ", and either may be the classes; " in refused(tmp_path)
    assert classes(tmp_path, "all")[2] == {name: name[0] for name in names}


def test_classes_that_are_less_than_meets_the_eye_are_noted(tmp_path, capsys):
    tree(tmp_path, "train/cat/tabby/1.jpg", "train/cat/siamese/2.jpg", "train/cow/young/3.jpg", "train/dog/4.xml")
    tree(tmp_path, "val/cat/5.jpg", "val/fox/6.jpg")
    assert classes(tmp_path)[1] == ("cat", "cow", "fox")
    said = capsys.readouterr().err
    assert "train: 1 of 3 classes are in other splits only: fox" in said
    assert "train: passed over 1 folders, without images or no classes: dog" in said
    assert "its own folders are the classes (cat, cow, fox), not the folders in these (cat/siamese, cat/tabby" in said


def test_stray_images_and_odd_numbers_are_noted(tmp_path, capsys):
    tree(tmp_path, "1/a.jpg", "2/b.jpg", "10/c.jpg", "preview.png")
    assert classes(tmp_path)[2] == {"1/a.jpg": "1", "2/b.jpg": "2", "10/c.jpg": "10"}
    said = capsys.readouterr().err
    assert "passed over 1 images that lie in no class folder, e.g. preview.png" in said
    assert "classes are numbered in the order of their names as text: label 0 is class '1'" in said


def test_a_labels_file_explains_what_folders_do_not(tmp_path):
    tree(tmp_path, "train/1.jpg", "cat/2.jpg")
    (tmp_path / "labels.json").write_text(
        '{"classes": ["sea", "dog"], "labels": {"train/1.jpg": ["dog"], "cat/2.jpg": []}}', encoding="utf-8-sig"
    )
    assert classes(tmp_path) == ("all", ("sea", "dog"), {"train/1.jpg": "dog", "cat/2.jpg": ""})


def test_a_folder_called_like_a_packaged_set_is_noted(tmp_path, monkeypatch, capsys):
    tree(tmp_path, "digits/cat/1.jpg", "digits/dog/2.jpg")
    monkeypatch.chdir(tmp_path)
    assert open_source("digits").classes[9] == "9"
    assert "digits is the published set; ./digits is the folder of that name" in capsys.readouterr().err
    assert open_source("./digits").classes == ("cat", "dog")
