"""What the stream's tests share: two small indices without their shards."""

import pytest

from pretrain.index.indexfile import INDEX_NAME
from pretrain.shards.indexwriter import write_index
from tests.index.entries import LISTS, SINGLE


@pytest.fixture
def single(tmp_path):
    (tmp_path / "single").mkdir()
    write_index(tmp_path / "single" / INDEX_NAME, SINGLE, classes=[f"class {n}" for n in range(8)])
    return tmp_path / "single"


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "lists").mkdir()
    write_index(tmp_path / "lists" / INDEX_NAME, LISTS)
    return tmp_path / "lists"
