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
from utils.run import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_launcher(monkeypatch):
    """The environment of a plain `python main.py`, put back afterwards."""
    for name in (*LAUNCHER_VARIABLES, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def run_ranks(tmp_path: Path, body: str, ranks: int = 2, **environment: str) -> list[subprocess.CompletedProcess]:
    """Runs `body` (indented lines of a main function, `d` is utils.distributed) in `ranks` processes."""
    script = tmp_path / "ranks.py"
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    head = "import json, sys, random, torch\nimport numpy as np\nfrom utils import distributed as d\n"
    script.write_text(f"{head}from utils.run import run_main\ndef main():\n{lines}run_main(main)\n")
    clean = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS")}
    launcher = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    started = []
    for rank in range(ranks):
        env = {**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        env |= launcher | environment if ranks > 1 else environment
        command = [sys.executable, str(script)]
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


def test_mpi_is_left_to_deepspeed(no_launcher):
    no_launcher.setenv("OMPI_COMM_WORLD_SIZE", "4")
    distributed._complete_environment(local_rank=-1)
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("cores", "variables", "threads"),
    [(8, {"WORLD_SIZE": "2"}, 4), (2, {"WORLD_SIZE": "16", "LOCAL_SIZE": "4"}, 1), (3, {"LOCAL_WORLD_SIZE": "2"}, 1)],
)
def test_ranks_of_a_machine_share_its_cores(no_launcher, cores, variables, threads):
    asked = []
    no_launcher.setattr(distributed, "available_cores", lambda: cores)
    no_launcher.setattr(torch, "set_num_threads", asked.append)
    no_launcher.setenv("OMP_NUM_THREADS", "")
    no_launcher.delenv("OMP_NUM_THREADS")
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    distributed._share_cores()
    assert asked == [threads]
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    distributed._share_cores()  # now it is the user's choice
    assert asked == [threads]


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
    done = run_ranks(tmp_path, body)
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
def test_different_names_on_two_ranks_are_an_error_on_both(tmp_path):
    body = """
d.init_distributed()
try:
    d.sum_across_ranks({"a": 1.0, "b" if d.rank() else "c": 2.0})
except RuntimeError as error:
    assert "different names" in str(error)
    sys.exit(7)
"""
    assert [p.returncode for p in run_ranks(tmp_path, body)] == [7, 7]


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
