"""Ranks: start-up on GPU or CPU, under a launcher or without, and the few collectives that the pipeline needs.

Every function works before `init_distributed` too, as rank 0 of 1 (or with the rank that the launcher gave).
"""

import os
import random
import socket
import zlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.run import UserError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(local_rank: int = -1, timeout: timedelta | None = None) -> None:
    """Joins the process group: nccl with GPUs, gloo on a CPU; a plain `python main.py` becomes rank 0 of 1.

    On a CPU the ranks share the cores (OMP_NUM_THREADS, where set, wins), and DeepSpeed's shared-memory collective is
    left out: it is compiled at first use and no faster than gloo.

    Args:
        local_rank: The flag that the deepspeed launcher adds; -1: from the environment.
        timeout: How long a collective waits for the other ranks. Default: DEEPSPEED_TIMEOUT minutes, else 30.

    Raises:
        UserError: The launcher's variables are incomplete, or the rendezvous port is taken.
    """
    if dist.is_initialized():
        return
    _complete_environment(local_rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _share_cores()

    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if timeout is None:
        timeout = timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
    try:
        deepspeed.init_distributed(timeout=timeout, verbose=False)
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"--master_port: the ranks cannot meet at {address} ({str(error).splitlines()[0]}); if another run uses "
            "this port, choose a free one: `deepspeed --master_port 29600 main.py ...`"
        ) from error


def _complete_environment(local_rank: int) -> None:
    """Sets what a launcher would have set; without those variables DeepSpeed looks for MPI."""
    mpi_size = os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))
    if "RANK" not in os.environ and int(mpi_size) > 1:
        return  # started by mpirun: DeepSpeed asks MPI for the ranks
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if local_rank >= 0:
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
        if missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set; start with "
                "`deepspeed main.py ...` or `torchrun main.py ...`, or unset WORLD_SIZE for a single process"
            )
        return
    values = ("0", str(max(local_rank, 0)), "1", "127.0.0.1", str(free_port()))
    for name, value in zip(LAUNCHER_VARIABLES, values, strict=True):
        os.environ.setdefault(name, value)


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, cut to the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    quota, period = quota_file.read_text().split() if quota_file.is_file() else ("max", "")
    return cores if quota == "max" else min(cores, max(1, int(quota) // int(period)))


def _share_cores() -> None:
    """Divides the cores among the ranks of this machine: two ranks with all cores each would slow one another down."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
    threads = max(1, available_cores() // int(ranks_here))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on rank 0, which prints and writes for all."""
    return rank() == 0


def device() -> torch.device:
    """Where this rank's tensors live."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def _alone() -> bool:
    if dist.is_initialized():
        return dist.get_world_size() == 1
    if world_size() > 1:
        raise RuntimeError(f"a collective among {world_size()} ranks before init_distributed()")
    return True


def barrier() -> None:
    """Waits for every rank. On gloo a time-out names the ranks that did not come."""
    if _alone():
        return
    if dist.get_backend() == "gloo":
        dist.monitored_barrier(wait_all_ranks=True)
    else:
        dist.barrier(device_ids=[device().index])


def shutdown() -> None:
    """Leaves the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _scalar(value: float | torch.Tensor) -> torch.Tensor:
    """The number as a float64 tensor on this rank's device; does not wait for the GPU when it is there already."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()).to(device(), torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device())


def sum_across_ranks(values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """Sums of the ranks' values, name by name, by one float64 all_reduce and one transfer to the CPU.

    Raises:
        RuntimeError: The ranks came with different names (numbers would be added to the wrong ones).
    """
    names = sorted(values)
    alone = _alone()
    if not names:
        return {}
    numbers = [_scalar(values[name]) for name in names]
    if alone:
        return dict(zip(names, torch.stack(numbers).tolist(), strict=True))
    fingerprint = float(zlib.crc32("\n".join(names).encode()))
    total = torch.stack([*numbers, _scalar(fingerprint), _scalar(fingerprint**2)])
    dist.all_reduce(total)
    *sums, sum_of_fingerprints, sum_of_squares = total.tolist()
    # Mean and mean square of the fingerprints are this rank's own only where all are equal.
    ranks = world_size()
    if sum_of_fingerprints != ranks * fingerprint or abs(sum_of_squares / ranks / fingerprint**2 - 1) > 1e-12:
        raise RuntimeError(f"sum_across_ranks: the ranks gave different names; rank {rank()} gave {names}")
    return dict(zip(names, sums, strict=True))


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank (pickled: for small things)."""
    if _alone():
        return [obj]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def set_seed(seed: int) -> None:
    """Seeds python, numpy and torch with seed + rank, so that ranks draw different noise."""
    seed = seed + rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # all devices


def print0(*args: Any) -> None:
    """Prints on rank 0 only, at once."""
    if is_main():
        print(*args, flush=True)
