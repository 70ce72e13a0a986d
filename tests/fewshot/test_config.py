"""What a few-shot config may say."""

import json
from pathlib import Path

import pytest

from fewshot.config import FewshotConfig, ProtocolSection
from pretrain.configfile import read_config
from pretrain.errors import InputError

SHIPPED = Path(__file__).parents[2] / "configs" / "fewshot" / "imagenet.json"


@pytest.fixture
def read(tmp_path):
    def build(*overrides):
        path = tmp_path / "c.json"
        path.write_text(json.dumps({"name": "c"}))
        return read_config(FewshotConfig, path, overrides)

    return build


def test_the_defaults_are_the_protocol(read):
    protocol = read().fewshot
    assert (protocol.shots, protocol.seeds, protocol.l2) == ((1, 5, 10, 25), (0, 1, 2), 1024.0)


def test_the_shipped_config_is_the_published_setting():
    config = read_config(FewshotConfig, SHIPPED)
    protocol = config.fewshot
    assert (protocol.shots, protocol.seeds, protocol.l2) == ((1, 5, 10, 25), (0, 1, 2), 1024.0)
    assert (config.data.support, config.data.query, config.model.image_size) == (None, None, None)
    assert protocol.batch == ProtocolSection().batch, "as a run scores itself, to the last digit of the features"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fewshot.shot=[1]", r"fewshot\.shot: unknown key; did you mean fewshot\.shots"),
        ("fewshot.shots=[0,1]", r"fewshot\.shots: found \[0, 1\]; shots are"),
        ("fewshot.shots=[]", r"fewshot\.shots: found \[\]; at least one"),
        ("fewshot.seeds=[1,1]", r"fewshot\.seeds: found \[1, 1\]; name each once"),
        ("fewshot.seeds=[-1]", r"fewshot\.seeds"),
        ("fewshot.l2=0", r"fewshot\.l2: found 0"),
        ('fewshot.probes=["rigde"]', r"fewshot\.probes: found 'rigde'; known: ridge ridge_held_out logistic sgd knn10"),
        ('fewshot.features=["given"]', r"fewshot\.features: found 'given'; known: tanh"),
        (
            'fewshot.features=["block_6_cls"]',
            r"fewshot\.features: found 'block_6_cls', is block6_cls meant\? known: tanh",
        ),
        ("model.image_size=0", r"model\.image_size"),
        ("data.train=x", r"data\.train: unknown key"),
        ("data.patience_minutes=30", r"data\.patience_minutes: found 30; .*less than 30"),
        ("name=a/b", r"name: found 'a/b'; a folder's name"),
    ],
)
def test_what_a_config_may_not_say_is_named(read, override, message):
    with pytest.raises(InputError, match=message):
        read(override)


def test_shots_are_put_in_order(read):
    assert read("fewshot.shots=[10,1]").fewshot.shots == (1, 10)
