"""Rank 1 alone finds fault; both ranks must refuse, with its words."""

import sys
from pathlib import Path

import pytest

from pretrain.engine import processgroup
from pretrain.errors import InputError
from pretrain.ranks import collectives

world = processgroup.start()


def check() -> int:
    if world.rank == 1:
        raise InputError("shard 7 is missing here")
    return 5


try:
    collectives.together(check)
except InputError as error:
    Path(sys.argv[1], f"rank{world.rank}").write_text(str(error))
assert collectives.together(lambda: world.rank) == world.rank
assert collectives.any_rank(world.device, world.rank == 1, False) == [True, False]
assert collectives.all_gather_list([world.rank] * 2) == [0, 0, 1, 1]
collectives.require_same("abc", "the index")
with pytest.raises(InputError, match=r"^data\.train: the index on rank 1 is other"):
    collectives.require_same("other" * world.rank, "data.train: the index")
processgroup.stop()
