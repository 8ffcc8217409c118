"""What may stand in the environment; `tests/bad_input` has what may not."""

import pytest

from utils.environment import environment_fault

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LAUNCHED | {"LOCAL_SIZE": "2", "DEEPSPEED_TIMEOUT": "0.5", "DS_ACCELERATOR": "cuda"},
        LAUNCHED | {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "4,2"},
        {"WORLD_SIZE": "2", "LOCAL_RANK": "3"},
    ],
)
def test_what_launchers_and_users_set_is_taken(environment):
    assert environment_fault(environment) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "2"}, "RANK is '2'; expected a number below WORLD_SIZE, which is 2, or unset it"),
        ({"LOCAL_RANK": "8", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK is '8'; expected a number below LOCAL_WORLD_SIZE"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'; expected a whole number from 1 to 65535"),
        ({"OMP_NUM_THREADS": "4,0"}, "OMP_NUM_THREADS is '4,0'; expected a whole number of threads"),
        ({"DEEPSPEED_TIMEOUT": "1e7"}, "DEEPSPEED_TIMEOUT is '1e7'; expected minutes, above 0 and at most 1000000"),
    ],
)
def test_limits(change, message):
    assert message in (environment_fault(LAUNCHED | change) or "")
