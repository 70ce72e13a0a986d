"""What ranks agree on, and what launchers tell them."""

from pathlib import Path

import pytest

from pretrain.engine.distributed import _place


def test_a_refusal_that_one_rank_sees_is_every_ranks(ranks, tmp_path):
    ranks(2, Path(__file__).parent / "refuses.py", tmp_path)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert said == ["shard 7 is missing here (seen by rank 1)"] * 2


@pytest.mark.parametrize(
    ("env", "rank", "size", "local"),
    [
        ({}, 0, 1, 0),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 0, 1, 0),  # plain python in an interactive allocation
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 3, 4, 1),
        (
            {
                "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123456",
                "SLURM_STEP_NODELIST": "node7",
            },
            2, 4, 0,
        ),
    ],
)  # fmt: skip
def test_every_launchers_environment_gives_the_same_place(env, rank, size, local):
    place = _place(env)
    assert (int(place["RANK"]), int(place["WORLD_SIZE"]), int(place["LOCAL_RANK"])) == (rank, size, local)
    assert place["MASTER_ADDR"]
    assert 0 < int(place["MASTER_PORT"]) < 65536


def test_srun_tasks_meet_at_the_first_node():
    env = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node7",
    }  # fmt: skip
    assert (_place(env)["MASTER_ADDR"], _place(env)["MASTER_PORT"]) == ("node7", "20077")
