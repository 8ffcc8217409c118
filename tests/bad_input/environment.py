"""Environment variables with values that no launcher sets, and places that cannot be written."""

from __future__ import annotations

from tests.bad_input.kit import PROGRAMS, Case

RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FAULTS = {
    "RANK": ("one", "-1", "1.5", "", "9" * 5000, "²"),
    "WORLD_SIZE": ("two", "0", "-2"),
    "LOCAL_RANK": ("x", "-1"),
    "LOCAL_WORLD_SIZE": ("x", "0"),
    "LOCAL_SIZE": ("all",),
    "MASTER_PORT": ("http", "0", "65536", "99999"),
    "DEEPSPEED_TIMEOUT": ("soon", "0", "-5", "nan", "inf", "1e300"),
    "DS_ACCELERATOR": ("gpu", "", "CPU"),
    "OMP_NUM_THREADS": ("all", "0", "-4", "1.5"),
    "PMI_SIZE": ("x",),
    "OMPI_COMM_WORLD_SIZE": ("",),
    "OMPI_COMM_WORLD_RANK": ("x",),
    "SLURM_PROCID": ("node1",),
    "SLURM_STEP_NUM_TASKS": ("2(x3)",),
}
STAGES = tuple(PROGRAMS)

CASES = [
    Case(
        f"{name}={value[:10]}",
        STAGES[k % len(STAGES)],
        "",
        f"environment variable {name} is '{value[:40]}'; expected",
        environment=(RANKS if name in RANKS else {}) | {name: value},
    )
    for k, (name, value) in enumerate((name, value) for name, values in FAULTS.items() for value in values)
] + [
    Case(
        "rank beyond the ranks",
        "sft",
        "",
        "RANK is '3'; expected a number below WORLD_SIZE, which is 2",
        environment=RANKS | {"RANK": "3", "WORLD_SIZE": "2"},
    ),
    Case(
        "local rank beyond the ranks",
        "remax",
        "",
        "LOCAL_RANK is '2'; expected a number below LOCAL_WORLD_SIZE",
        environment=RANKS | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
    ),
    Case(
        "ranks without a launcher",
        "sft",
        "",
        "WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set",
        environment={"WORLD_SIZE": "2"},
    ),
    Case(
        "rank without its number of ranks",
        "sft",
        "",
        "RANK is '1'; expected a number below WORLD_SIZE, which is 1",
        environment={"RANK": "1"},
    ),
    Case("address that is empty", "sft", "", "MASTER_ADDR is ''; expected", environment=RANKS | {"MASTER_ADDR": ""}),
]
