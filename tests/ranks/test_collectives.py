"""What ranks agree on, and what launchers tell them."""

from pathlib import Path

import pytest

from pretrain.engine.processgroup import _device_number
from pretrain.errors import InputError
from pretrain.ranks.launcher import local_rank, rank, rank_variables

SLURM = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node7",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "node0",
}  # fmt: skip
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "MASTER_ADDR": "node0"}


def test_a_refusal_that_one_rank_sees_is_every_ranks(ranks, tmp_path):
    ranks(2, Path(__file__).parent / "refuses.py", tmp_path)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert said == ["shard 7 is missing here (seen by rank 1)"] * 2


@pytest.mark.parametrize(
    ("env", "number", "size", "local"),
    [
        ({}, 0, 1, 0),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 0, 1, 0),  # plain python in an interactive allocation
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 3, 4, 1),
        (SLURM, 2, 4, 0),
        (OPEN_MPI, 5, 8, 1),
        (HYDRA, 5, 8, 1),
        ({**SLURM, **OPEN_MPI}, 5, 8, 1),  # mpirun in an allocation: the place is not its daemons'
        ({**SLURM, **HYDRA}, 5, 8, 1),
        ({**SLURM, "PMI_RANK": "2", "PMI_SIZE": "4"}, 2, 4, 0),  # srun --mpi=pmi2
    ],
)
def test_every_launchers_environment_gives_the_same_place(env, number, size, local):
    found = rank_variables(env)
    assert (int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"])) == (number, size, local)
    assert found["MASTER_ADDR"]
    assert 0 < int(found["MASTER_PORT"]) < 65536
    assert (rank(env), local_rank(env)) == (number, local)  # who speaks of a mistake found before the ranks have met


def test_the_first_rank_of_a_host_without_a_device_speaks_for_those_after_it():
    assert [_device_number(local, 2) for local in range(2)] == [0, 1]
    assert [_device_number(local, 1) for local in range(2)] == [0, 0]  # each is shown its own
    for local in (2, 3):
        with pytest.raises(InputError, match="2 devices are visible") as refused:
            _device_number(local, 2)
        assert refused.value.only_this_rank == (local == 2)


def test_srun_tasks_meet_at_the_first_node():
    found = rank_variables({**SLURM, "SLURM_JOB_ID": "77"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node7", "20077")


@pytest.mark.parametrize(("env", "option"), [(OPEN_MPI, "-x MASTER_ADDR=HOST"), (HYDRA, "-genv MASTER_ADDR HOST")])
def test_mpi_ranks_on_several_nodes_must_be_told_where_the_first_is(env, option):
    assert (rank_variables(env)["MASTER_ADDR"], rank_variables(env)["LOCAL_SIZE"]) == ("node0", "4")
    untold = {name: value for name, value in env.items() if name != "MASTER_ADDR"}
    with pytest.raises(InputError, match=f"8 ranks, 4 of them on the first node.*mpirun {option}"):
        rank_variables(untold)
    one_node = {name: "8" if value == "4" else value for name, value in untold.items()}
    assert rank_variables(one_node)["MASTER_ADDR"] == "127.0.0.1"
