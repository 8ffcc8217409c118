"""Ranks and collectives: alone, and two gloo ranks as a launcher would start them."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import distributed
from utils.distributed import LAUNCHER_VARIABLES
from utils.run import STOPPED, UserError

ROOT = Path(__file__).parents[2]


FOREIGN = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_")


@pytest.fixture
def no_launcher(monkeypatch):
    """The environment of a plain `python main.py`, put back afterwards."""
    for name in (*LAUNCHER_VARIABLES, *os.environ, "OMP_NUM_THREADS"):
        if name in LAUNCHER_VARIABLES or name.startswith(FOREIGN) or name == "OMP_NUM_THREADS":
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    return monkeypatch


def of_deepspeed(rank: int, ranks: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}


def of_mpirun(rank: int, ranks: int) -> dict[str, str]:
    world = {"RANK": rank, "SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_SIZE": ranks}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in world.items()}


def of_srun(rank: int, ranks: int) -> dict[str, str]:
    """A node for each rank."""
    step = {"PROCID": rank, "LOCALID": 0, "STEP_NUM_TASKS": ranks, "NTASKS": ranks, "STEP_NODELIST": "localhost"}
    return {f"SLURM_{name}": str(value) for name, value in step.items()}


def run_ranks(
    tmp_path: Path, body: str, ranks: int = 2, *, started_by=of_deepspeed, nodes: bool = False, **environment: str
) -> list[subprocess.CompletedProcess]:
    """Runs `body` (indented lines of a main function, `d` is utils.distributed) in `ranks` processes.

    `nodes`: by torchrun, as on machines that have one rank each, which meet on the loopback.
    """
    script = tmp_path / "ranks.py"
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    head = "import json, sys, random, torch\nimport numpy as np\nfrom utils import distributed as d\n"
    script.write_text(f"{head}from utils.run import run_main\ndef main():\n{lines}run_main(main)\n")
    foreign = (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS")
    clean = {name: x for name, x in os.environ.items() if name not in foreign and not name.startswith(FOREIGN)}
    port = str(distributed.free_port())
    started = []
    for rank in range(ranks):
        env = {**clean, "CUDA_VISIBLE_DEVICES": ""}
        if ranks > 1 and not nodes:
            env |= {"MASTER_PORT": port} | started_by(rank, ranks)
        env |= environment
        command = [sys.executable, str(script)]
        if nodes:
            where = f"--nnodes={ranks} --node_rank={rank} --master_addr=127.0.0.1 --master_port={port}"
            command[1:1] = ["-m", "torch.distributed.run", *where.split(), "--nproc_per_node=1"]
        started.append(
            subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    done = []
    for process in started:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_sum_of_one_rank_is_the_value_itself_in_float64(no_launcher, device):
    # float() of each value, whatever its type: 0.1 in float32 is 0.100000001490116..., 2^53 - 1 needs all of float64
    values = {"half": torch.tensor(0.1), "int": torch.tensor([7]), "wide": 2**53 - 1, "float": 0.1, "bool": True}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in values.items()}
    assert distributed.sum_across_ranks(moved) == {name: float(x) for name, x in values.items()}


def test_before_the_start_it_is_rank_0_of_1(no_launcher, capsys):
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.shutdown()
    assert distributed.sum_across_ranks({"a": torch.tensor(2), "b": 0.5}) == {"a": 2.0, "b": 0.5}
    assert distributed.gather_objects("x") == ["x"]
    distributed.print0("hello", 1)
    assert capsys.readouterr().out == "hello 1\n"


def test_the_launchers_rank_counts_before_the_start(no_launcher, capsys):
    no_launcher.setenv("RANK", "1")
    no_launcher.setenv("WORLD_SIZE", "2")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (1, 2, False)
    distributed.print0("hello")
    assert capsys.readouterr().out == ""
    with pytest.raises(RuntimeError, match="before init_distributed"):
        distributed.sum_across_ranks({"a": 1.0})


def test_the_peak_of_memory_grows_and_stays(no_launcher):
    before = distributed.peak_memory()
    torch.ones(60 * 2**20)  # 240 MiB, gone at once
    assert 2**28 < distributed.peak_memory() >= before
    assert distributed.peak_memory() < 2**36


def test_seeds_differ_by_rank_and_repeat(no_launcher):
    def draw(seed, rank):
        no_launcher.setenv("RANK", str(rank))
        distributed.set_seed(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(5, 0)
    assert draw(5, 0) == first
    assert all(a != b for a, b in zip(draw(5, 1), first, strict=True))
    assert draw(4, 1) == first  # seed + rank


def test_a_plain_process_gets_what_a_launcher_would_set(no_launcher):
    distributed._complete_environment(local_rank=-1)
    port = int(os.environ["MASTER_PORT"])
    assert [os.environ[name] for name in LAUNCHER_VARIABLES] == ["0", "0", "1", "127.0.0.1", str(port)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


def test_an_incomplete_launcher_is_bad_input(no_launcher):
    no_launcher.setenv("WORLD_SIZE", "2")
    no_launcher.setenv("RANK", "1")
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        distributed._complete_environment(local_rank=-1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (of_mpirun(1, 4) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR not set.*`mpirun -x MASTER_ADDR="),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "SLURM_NTASKS is 8 but srun did not start .*`srun python main.py"),
    ],
)
def test_a_rank_that_cannot_find_the_others_is_refused(no_launcher, variables, message):
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    no_launcher.setattr(os, "environ", dict(os.environ))  # what is filled in goes with it
    with pytest.raises(UserError, match=message):
        distributed._complete_environment(local_rank=-1)


def test_a_rank_without_a_gpu_is_refused(no_launcher):
    no_launcher.setenv("LOCAL_RANK", "3")
    no_launcher.setattr(os, "environ", dict(os.environ))
    no_launcher.setattr(torch.cuda, "is_available", lambda: True)
    no_launcher.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK is 3 but this process sees 1 GPU: .*--gpus-per-task"):
        distributed.init_distributed()


@pytest.mark.parametrize(
    ("mine", "quota", "others", "threads"),
    [
        (range(8), 8, [("here", range(8))], 4),
        (range(8), 8, [("there", range(8))], 8),  # another machine
        (range(4), 4, [("here", range(4, 8))], 4),  # srun has bound each rank to cores of its own
        (range(8), 2, [("here", range(8))], 1),  # a container's share of the cores
        (range(2), 2, [("here", range(2))] * 3, 1),
    ],
)
def test_ranks_of_a_machine_share_its_cores(no_launcher, capsys, mine, quota, others, threads):
    asked = []

    def gather(own):
        return [own, *((host, frozenset(cores)) for host, cores in others)]

    no_launcher.setattr(os, "environ", dict(os.environ))
    no_launcher.setattr(distributed, "gather_objects", gather)
    no_launcher.setattr(socket, "gethostname", lambda: "here")
    no_launcher.setattr(distributed, "usable_cores", lambda: frozenset(mine))
    no_launcher.setattr(distributed, "available_cores", lambda: quota)
    no_launcher.setattr(torch, "set_num_threads", asked.append)
    distributed._share_cores()
    assert asked == [threads]
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    os.environ["OMP_NUM_THREADS"] = "1"
    distributed._share_cores()  # now it is the user's choice
    assert asked == [threads] and capsys.readouterr().out == ""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"  # now it is torchrun's
    distributed._share_cores()
    assert asked == [threads] * 2 and os.environ["OMP_NUM_THREADS"] == str(threads)
    assert (f"OMP_NUM_THREADS: {threads} for each rank" in capsys.readouterr().out) == (threads > 1)


@pytest.mark.ranks
def test_two_ranks(tmp_path):
    body = """
d.init_distributed()
d.set_seed(3)
r = d.rank()
d.barrier()
record = {
    "rank": r, "ranks": d.world_size(), "main": d.is_main(), "device": str(d.device()),
    "backend": torch.distributed.get_backend(),
    "threads": torch.get_num_threads(),
    # 0.1 + 0.2, and a number that float32 would round away
    "sum": d.sum_across_ranks({"b": 0.1 * (r + 1), "a": torch.tensor(2**24 + r)}),
    "empty": d.sum_across_ranks({}),
    "gathered": d.gather_objects({"rank": r}),
    "noise": torch.rand(()).item(),
}
d.print0("once")
json.dump(record, open(f"{r}.json", "w"))
d.shutdown()
d.shutdown()
"""
    done = run_ranks(tmp_path, body, nodes=True)
    assert [p.returncode for p in done] == [0, 0], done
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert sum(p.stdout.count("once") for p in done) == 1
    assert (first["rank"], first["main"], second["rank"], second["main"]) == (0, True, 1, False)
    assert first["noise"] != second["noise"]
    for record in (first, second):
        assert record["ranks"] == 2
        assert (record["device"], record["backend"]) == ("cpu", "gloo")
        assert record["threads"] == max(1, distributed.available_cores() // 2)
        assert record["sum"] == {"a": 2.0**25 + 1, "b": 0.1 + 0.2}
        assert record["empty"] == {}
        assert record["gathered"] == [{"rank": 0}, {"rank": 1}]


@pytest.mark.ranks
@pytest.mark.parametrize("started_by", [of_mpirun, of_srun])
def test_different_names_on_two_ranks_are_an_error_on_both(tmp_path, started_by):
    body = """
d.init_distributed()
assert d.sum_across_ranks({"rank": d.rank(), "one": 1}) == {"rank": 1.0, "one": 2.0}
try:
    d.sum_across_ranks({"a": 1.0, "b" if d.rank() else "c": 2.0})
except RuntimeError as error:
    assert "different names" in str(error)
    d.shutdown()  # threads of gloo that are left at the end of a process may abort it
    sys.exit(7)
"""
    done = run_ranks(tmp_path, body, started_by=started_by)
    assert [p.returncode for p in done] == [7, 7], done


@pytest.mark.ranks
def test_beside_nccl_the_ranks_wait_by_gloo(tmp_path):
    # nccl would abort a rank that waits too long, before it could say for whom.
    body = """
import datetime, time
d.dist.get_backend = lambda group=None: "nccl"
d.init_distributed(timeout=datetime.timedelta(seconds=2))
d.barrier()
if d.rank():
    time.sleep(4)
else:
    try:
        d.barrier()
    except RuntimeError as error:
        assert "Ranks 1 failed to pass monitoredBarrier in 2000 ms" in str(error), error
        print("named")
d.shutdown()
"""
    done = run_ranks(tmp_path, body)
    assert [p.returncode for p in done] == [0, 0], done
    assert "named" in done[0].stdout


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("does", "has"), [("time.sleep(8)", "not come"), ("time.sleep(0.5), os._exit(1)", "ended")], ids=["late", "gone"]
)
def test_a_rank_that_waits_in_vain_says_where_the_other_one_was(tmp_path, does, has):
    body = f"""
import datetime, os, time
from utils import whereabouts
whereabouts.EVERY = 0.1
d.init_distributed(timeout=datetime.timedelta(seconds=3))
with whereabouts.at("step 12"):
    with whereabouts.at("generation"):
        if d.rank():
            {does}
    with whereabouts.at("update"):
        d.sum_across_ranks({{"a": 1.0}})
"""
    waiting, _ = run_ranks(tmp_path, body)
    *notes, error = [line for line in waiting.stderr.splitlines() if line.startswith(("error", "note"))]
    assert waiting.returncode == STOPPED and "Traceback" not in waiting.stderr, waiting
    assert error.startswith("error: rank 0 waited ") and error.endswith(
        f" s in update of step 12 for a rank that has {has}; rank 1 was last seen in generation of step 12"
    )
    if has == "not come":  # before nccl, which says nothing, would end it
        expected = "note: rank 0 has been in update of step 12 for 3 s; rank 1 was last seen in generation of step 12"
        assert notes == [expected]


@pytest.mark.ranks
def test_a_plain_process_runs_on_cpu(tmp_path):
    body = "d.init_distributed()\nprint(d.rank(), d.world_size(), d.sum_across_ranks({'a': 1}))\nd.shutdown()"
    (done,) = run_ranks(tmp_path, body, ranks=1)
    assert done.returncode == 0, done.stderr
    assert "0 1 {'a': 1.0}" in done.stdout


@pytest.mark.ranks
def test_a_port_in_use_is_bad_input(tmp_path):
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        (done,) = run_ranks(tmp_path, "d.init_distributed()", ranks=1, MASTER_PORT=port)
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert port in message[0]
    assert "deepspeed --master_port" in message[0]
