"""Environment variables that a launcher or the user sets: refused before a library fails on them."""

import math
import os
from collections.abc import Mapping, MutableMapping

LARGEST = 2**31 - 1
WHOLE_NUMBERS = {  # with the smallest and the largest that each may be
    "RANK": (0, LARGEST),
    "WORLD_SIZE": (1, LARGEST),
    "LOCAL_RANK": (0, LARGEST),
    "LOCAL_WORLD_SIZE": (1, LARGEST),
    "LOCAL_SIZE": (1, LARGEST),
    "MASTER_PORT": (1, 65535),
    **{f"OMPI_COMM_WORLD_{name}": (0, LARGEST) for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")},
    **{name: (0, LARGEST) for name in ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")},
    **{f"SLURM_{name}": (0, LARGEST) for name in ("PROCID", "LOCALID")},
    "SLURM_STEP_NUM_TASKS": (1, LARGEST),
    "SLURM_NTASKS": (1, LARGEST),
}
ACCELERATORS = ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa", "supa", "klxpu")  # known to DeepSpeed
LONGEST_TIMEOUT = 10**6  # minutes, two years


def environment_fault(environment: Mapping[str, str] = os.environ) -> str | None:
    """What cannot be a rank, a port, a time-out, a number of threads or an accelerator, and what was expected."""

    def refused(name: str, expected: str) -> str:
        return f"environment variable {name} is {environment[name][:40]!r}; expected {expected}, or unset it"

    for name, (smallest, largest) in WHOLE_NUMBERS.items():
        if name in environment and not _is_whole(environment[name], smallest, largest):
            expected = f"from {smallest} to {largest}" if largest < LARGEST else f"of at least {smallest}"
            return refused(name, f"a whole number {expected}, as a launcher sets it")
    for rank, size, unset in (("RANK", "WORLD_SIZE", "1"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE", LARGEST)):
        ranks = environment.get(size, unset)
        if int(environment.get(rank, "0")) >= int(ranks):
            return refused(rank, f"a number below {size}, which is {ranks}")
    if environment.get("MASTER_ADDR") == "":
        return refused("MASTER_ADDR", "the name or address of the machine of rank 0")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        counts = environment.get(name, "1").split(",")  # a number for each level of nesting
        if not all(_is_whole(count, 1, LARGEST) for count in counts):
            return refused(name, "a whole number of threads, at least 1")
    try:
        minutes = float(environment.get("DEEPSPEED_TIMEOUT", "30"))
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= LONGEST_TIMEOUT:
        return refused("DEEPSPEED_TIMEOUT", f"minutes, above 0 and at most {LONGEST_TIMEOUT}")
    if environment.get("DS_ACCELERATOR", "cpu") not in ACCELERATORS:
        return refused("DS_ACCELERATOR", f"one of {', '.join(ACCELERATORS)}")
    return None


def hide_gpus(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where DS_ACCELERATOR asks for the CPU, torch sees no GPU, though the deepspeed launcher shows each rank one.

    To be called before anything asks torch for GPUs.
    """
    if environment.get("DS_ACCELERATOR") == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""


def _is_whole(text: str, smallest: int, largest: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(largest)) and smallest <= int(text) <= largest
