"""`build` into a folder that holds shards: "already built" is said only of what would come out again."""

import json
import os
from dataclasses import replace

import pytest

from pretrain.datasets.folder import open_folder
from pretrain.errors import InputError
from pretrain.shards.write import ShardLayout, write_shards
from tests.datasets.pictures import picture


@pytest.fixture
def built(tmp_path):
    """A folder of bitmaps, which are all equally large, and its shards."""
    for number, name in enumerate(("cat/1.bmp", "cat/2.bmp", "dog/3.bmp")):
        os.utime(picture(tmp_path / "set" / name, number), ns=(0, 10**18))
    write_shards(open_folder(tmp_path / "set"), tmp_path / "out")
    return tmp_path / "set", tmp_path / "out"


def test_an_unchanged_source_is_not_built_twice(built):
    source, out = built
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert write_shards(open_folder(source), out) == (out / "index.vfi", False)
    source = source.rename(source.with_name("renamed"))
    assert write_shards(open_folder(source), out) == (out / "index.vfi", False)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def replace_all(source):
    for number, path in enumerate(sorted(source.glob("*/*"))):
        picture(path, 9 - number)


def replace_in_time(source):
    """As if unpacked from an archive that gives every file one time."""
    os.utime(picture(source / "cat" / "1.bmp", 5), ns=(0, 10**18))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replace_all, "files of the source are not those it was built from: their sizes or times differ"),
        (replace_in_time, "files of the source are not those it was built from: their sizes or times differ"),
        (lambda source: picture(source / "dog" / "4.bmp"), "samples is 3, asked for 4, its images or labels differ"),
        (lambda source: (source / "dog" / "3.bmp").rename(source / "cat" / "3.bmp"), "its images or labels differ"),
        (lambda source: (source / "dog").rename(source / "wolf"), "its images or labels differ"),
    ],
)
def test_a_changed_source_is_refused(built, change, told):
    source, out = built
    change(source)
    with pytest.raises(InputError) as refused:
        write_shards(open_folder(source), out)
    assert str(refused.value).startswith(f"{out}: holds another data set ({told}")
    assert str(refused.value).endswith("; choose another folder, or remove this one")


def test_a_folder_that_another_build_writes_is_let_alone(built, tmp_path):
    source, _ = built
    data = open_folder(source)
    said = []

    def read(row):
        if not said:
            with pytest.raises(InputError, match="another build writes here") as refused:
                write_shards(data, tmp_path / "new")
            said.append(refused)
        return data.read(row)

    write_shards(replace(data, read=read), tmp_path / "new", readers=1)
    assert said
    assert not write_shards(data, tmp_path / "new")[1]


def test_other_options_are_refused(built):
    source, out = built
    for layout in (ShardLayout(seed=1), ShardLayout(bytes=1 << 20), ShardLayout(samples=2)):
        with pytest.raises(InputError, match="holds another data set"):
            write_shards(open_folder(source), out, layout)


def test_class_names_and_lists_of_labels_are_part_of_it(tmp_path):
    picture(tmp_path / "set" / "1.bmp")

    def opened(classes, labels):
        (tmp_path / "set" / "labels.json").write_text(json.dumps({"classes": classes, "labels": {"1.bmp": labels}}))
        return open_folder(tmp_path / "set")

    write_shards(opened(["a", "b"], ["a"]), tmp_path / "out")
    assert not write_shards(opened(["a", "b"], ["a"]), tmp_path / "out")[1]
    for other in (opened(["a", "c"], ["a"]), opened(["a", "b"], ["b"]), opened(["a", "b"], [])):
        with pytest.raises(InputError, match="its images or labels differ"):
            write_shards(other, tmp_path / "out")
