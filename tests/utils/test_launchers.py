"""RANK and its like from what mpirun and srun set."""

import pytest

from utils.launchers import first_host, launcher_variables

OPEN_MPI = {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in OPEN_MPI.items()}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "77"}
SRUN |= {"SLURM_STEP_NODELIST": "gpu[07-08]", "PMI_RANK": "5", "PMI_SIZE": "8"}  # and what its plug-in sets
RANK_5 = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        (OPEN_MPI, None),  # two machines, and nobody knows their names
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "127.0.0.1"),
        (MPICH, "127.0.0.1"),
        (SRUN, "gpu07"),
        ({**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"} | OPEN_MPI, None),  # mpirun starts its daemons with srun
    ],
)
def test_a_rank_is_found(environment, address):
    found = launcher_variables(environment)
    port = int(found.pop("MASTER_PORT"))
    assert 20_000 <= port < 30_000
    assert found == RANK_5 | ({"MASTER_ADDR": address} if address else {})


def test_every_rank_of_a_job_meets_at_the_same_port_and_other_jobs_elsewhere():
    def port(**more):
        return launcher_variables(SRUN | more)["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0") != port(SLURM_JOB_ID="78") != port(SLURM_STEP_ID="1")


def test_what_the_user_set_stays():
    found = launcher_variables(SRUN | {"MASTER_ADDR": "mine", "MASTER_PORT": "1"})
    assert found == RANK_5


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SRUN | {"RANK": "0", "WORLD_SIZE": "1"},  # torchrun, started by srun
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # the batch script itself
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_where_nothing_is_to_be_found(environment):
    assert launcher_variables(environment) == {}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("a", "a"), ("a-1,b-2", "a-1"), ("n[07-09,12],m3", "n07"), ("r[1-2]n[03,05].x,q", "r1n03.x")],
)
def test_the_first_host(hosts, first):
    assert first_host(hosts) == first
