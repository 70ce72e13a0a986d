"""A rank whose lanes take up more at once than may be read ahead is told so, with what would do."""

from types import SimpleNamespace

import pytest

from pretrain.stream.order import Order
from pretrain.training.setup import _short_read_ahead


@pytest.mark.parametrize(("ranks", "needed"), [(1, 14_649), (8, 1831), (16, None)])
def test_the_word_names_what_the_lanes_of_a_rank_hold(ranks, needed):
    samples = 300_000_000
    setup = SimpleNamespace(
        order=Order(samples, 4096, 0),
        config=SimpleNamespace(data=SimpleNamespace(read_ahead_mib=1024)),
        index=SimpleNamespace(samples=samples, bytes=117_190 * samples),
        world=SimpleNamespace(size=ranks),
    )
    said = _short_read_ahead(setup)
    assert bool(said) == (needed is not None)
    if said:
        assert f"16,384 lanes of 8 samples are {needed:,} MiB a rank" in said
        assert f"{16_384 if ranks == 1 else 2048} would do" in said
