"""What mpirun and srun tell a process about its rank, in the names that torch, DeepSpeed and this project read.

`deepspeed` and `torchrun` set those names themselves. Light to import: early errors, too, are rank 0's to tell.
"""

import re
import zlib
from collections.abc import Mapping

# ours: those of Open MPI's mpirun, of MPICH's and Intel's, and of srun
NAMES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"),
}
# Who started the process, as mpirun uses srun inside of Slurm, and srun's plug-ins set PMI_RANK: a name only it sets.
MARKS = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALRANKID", "SLURM_STEP_NUM_TASKS")
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
RUNS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID")


def launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, and where the ranks meet, as far as it is known and not set.

    The port follows from the number of the job, so that two runs on one machine do not meet. The address is the first
    host of a Slurm step; mpirun tells nobody its hosts, so it is known for a single machine only.

    Returns:
        Nothing where torchrun or deepspeed has set RANK, or where there is one process.
    """
    if "RANK" in environment:
        return {}
    which = next((i for i, mark in enumerate(MARKS) if mark in environment), None)
    if which is None:
        return {}
    found = {ours: environment[names[which]] for ours, names in NAMES.items() if names[which] in environment}
    if int(found.get("WORLD_SIZE", "1")) <= 1:
        return {}
    run = " ".join(environment.get(name, "") for name in RUNS)
    found["MASTER_PORT"] = str(20_000 + zlib.crc32(run.encode()) % 10_000)
    if MARKS[which].startswith("SLURM"):
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if hosts:
            found["MASTER_ADDR"] = first_host(hosts)
    elif found["WORLD_SIZE"] == environment.get(LOCAL_SIZES[which]):
        found["MASTER_ADDR"] = "127.0.0.1"
    return {name: value for name, value in found.items() if name not in environment}


def first_host(hosts: str) -> str:
    """The first name of a Slurm list such as "node[07-09,12],gpu3"."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
