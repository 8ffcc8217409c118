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

from utils.bounds import peak_resident
from utils.launchers import launcher_variables
from utils.run import UserError, first_line, rank_of_launcher
from utils.whereabouts import close_board, open_board

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_patience: timedelta | None = None  # of `barrier`, which would take torch's default, whatever the group was told
_beside_nccl: dist.ProcessGroup | None = None  # see `_hosts`


def init_distributed(local_rank: int = -1, timeout: timedelta | None = None) -> None:
    """Joins the process group: nccl with GPUs, gloo on a CPU; a plain `python main.py` becomes rank 0 of 1.

    The ranks of a machine share its cores (OMP_NUM_THREADS, where set, wins). DeepSpeed's shared-memory collective is
    left out on a CPU: it is compiled at first use and no faster than gloo.

    Args:
        local_rank: The flag that the deepspeed launcher adds; -1: from the environment.
        timeout: How long a collective waits for the other ranks. Default: DEEPSPEED_TIMEOUT minutes, else 30.

    Raises:
        UserError: The launcher's variables are incomplete, the rank has no GPU, or the rendezvous port is taken.
    """
    if dist.is_initialized():
        return
    _complete_environment(local_rank)
    if torch.cuda.is_available():
        if (place := device().index) >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK is {place} but this process sees {torch.cuda.device_count()} GPU: start no more ranks on "
                "a machine than it has GPUs, and let each see all of them (srun: --gres=gpu:8, not --gpus-per-task)"
            )
        torch.cuda.set_device(device())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

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
            f"--master_port: the ranks cannot meet at {address} ({first_line(error)}); if another run uses "
            "this port, choose a free one: `deepspeed --master_port 29600 main.py ...`"
        ) from error
    global _patience
    _patience = timeout
    _hosts()
    _share_cores()
    if world_size() > 1:
        open_board(rank(), world_size(), timeout)


def _complete_environment(local_rank: int) -> None:
    """Sets what a launcher would have set; without those variables DeepSpeed looks for MPI."""
    os.environ.update(launcher_variables(os.environ))
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            f"SLURM_NTASKS is {os.environ['SLURM_NTASKS']} but srun did not start this process, which would train "
            "alone: start with `srun python main.py ...`, or unset SLURM_NTASKS for a single process"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if local_rank >= 0:
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
        if missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set; start with "
                "`deepspeed main.py ...` or `torchrun main.py ...`, or unset WORLD_SIZE for a single process; "
                "mpirun on several machines: `mpirun -x MASTER_ADDR=FIRST_HOST ...`"
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


def usable_cores() -> frozenset[int]:
    """Cores that this process may run on."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return frozenset(os.sched_getaffinity(0) if has_affinity else range(os.cpu_count() or 1))


def available_cores() -> int:
    """How many cores this process may use: its CPU affinity, cut to the container's quota where there is one."""
    cores = len(usable_cores())
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    quota, period = quota_file.read_text().split() if quota_file.is_file() else ("max", "")
    return cores if quota == "max" else min(cores, max(1, int(quota) // int(period)))


def _hosts() -> dist.ProcessGroup | None:
    """The group in which the ranks wait for one another and swap objects: all, by gloo (None: the default one is that).

    nccl aborts the process when a rank keeps the others waiting, before anybody could say why, and it waits on the GPU.
    """
    global _beside_nccl
    if dist.get_backend() == "gloo":
        return None
    if _beside_nccl is None:
        _beside_nccl = dist.new_group(backend="gloo", timeout=_patience)
    return _beside_nccl


def _share_cores() -> None:
    """Divides this process's cores by the ranks that run on them: with all cores each they would slow one another down.

    mpirun and srun may bind each rank to cores of its own, so the ranks compare what they were given. torchrun sets
    OMP_NUM_THREADS to 1 where nobody has set it, which would leave an offloaded optimizer one thread.
    """
    mine = (socket.gethostname(), usable_cores())
    everyone = gather_objects(mine)  # by all ranks, also where OMP_NUM_THREADS is set
    of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if "OMP_NUM_THREADS" in os.environ and not of_torchrun:
        return
    sharing = sum(host == mine[0] and bool(cores & mine[1]) for host, cores in everyone)
    threads = max(1, available_cores() // sharing)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if of_torchrun and threads > 1:
        print0(f"OMP_NUM_THREADS: {threads} for each rank, its share of the cores; torchrun had set 1")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else rank_of_launcher()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_machine() -> int:
    """Ranks that share this machine's memory, as the launcher says; all of them, where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


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
    """Waits for every rank, as long as `init_distributed` was told. A time-out names the ranks that did not come."""
    if not _alone():
        dist.monitored_barrier(_hosts(), timeout=_patience, wait_all_ranks=True)


def shutdown() -> None:
    """Leaves the process group, where there is one."""
    global _beside_nccl
    close_board()
    if dist.is_initialized():
        dist.destroy_process_group()
    _beside_nccl = None


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


def largest_of_ranks(number: int) -> int:
    """The largest of one whole number of each rank, on all of them."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank (pickled: for small things); waits for no GPU."""
    if _alone():
        return [obj]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, obj, group=_hosts())
    return gathered


def device_memory() -> int | None:
    """Bytes of this rank's GPU; None where it has none."""
    return torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else None


def peak_memory() -> int:
    """The most bytes that any rank has held so far: allocated on its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        here = torch.cuda.max_memory_allocated()
    else:
        here = peak_resident()
    return max(gather_objects(here))


def set_seed(seed: int) -> None:
    """Seeds python, numpy and torch with seed + rank, so that ranks draw different noise."""
    seed = seed + rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # all devices


def random_state() -> dict[str, Any]:
    """Where the random generators of this rank stand, as json can say it."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    of_numpy = {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}}
    state = {"python": python, "numpy": of_numpy, "torch": _hex(torch.get_rng_state())}
    return state | ({"cuda": _hex(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Any]) -> None:
    """Goes on from what `random_state` gave, also where that was on another kind of device."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    words = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": words}})
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _hex(numbers: torch.Tensor) -> str:
    return bytes(numbers.tolist()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def print0(*args: Any) -> None:
    """Prints on rank 0 only, at once."""
    if is_main():
        print(*args, flush=True)
