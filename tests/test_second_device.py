"""All of the training on a device that is not the CPU, without a GPU: see tests/second_device/sim.py.

The recorded trainings of one rank run on it: supervised, ranking, DPO and every algorithm, with doctor, reward
functions, packing, checkpointing, full KL, moving average, plain text, sentinel and variance meter. A tensor that was
left on the CPU ends them, their figures are those of the CPU, and what makes the host wait for a GPU is counted.
"""

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests import zygote

API = ("_setup_privateuseone_for_python_backend", "_DummyBackendModule")  # of torch, experimental
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not all(hasattr(backend_registration, name) for name in API), reason="this torch lacks the API"),
]


@functools.cache
def start_early() -> tuple[subprocess.Popen, Path]:
    """Starts the trainings, and says where they write; conftest.py calls this before the first test."""
    place = tempfile.TemporaryDirectory()
    program, folder = Path(__file__).parent / "second_device" / "trainings.py", Path(place.name)
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder / "cache")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, program, folder],
            cwd=Path(__file__).parents[1],
            env=zygote.inherited() | alone,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end() -> None:
        process.kill()
        process.wait()
        place.cleanup()

    atexit.register(end)
    return process, folder


@pytest.fixture(scope="module")
def found():
    """What those trainings have left."""
    process, folder = start_early()
    assert process.wait(600) == 0, (folder / "log").read_text()[-6000:]
    return json.loads((folder / "outcomes.json").read_text())


def test_recorded_trainings_are_the_same_there(found):
    assert len(found["trainings"]) >= 13
    differences = {name: training["differences"] for name, training in found["trainings"].items()}
    assert differences == {name: [] for name in differences}


def ours(waits: dict[str, int]) -> dict[str, int]:
    """Without those of the decode, which looks after every few tokens at which answers have ended."""
    return {place: times for place, times in waits.items() if not place.startswith("remax/generation/")}


def listed(step: dict[str, dict[str, int]]) -> str:
    """The waits of a step, by place."""
    lines = []
    for kind, waits in step.items():
        lines.append(f"{sum(waits.values())} {kind}, {sum(ours(waits).values())} of them outside of generation:")
        lines += [f"  {times:3} {place}" for place, times in sorted(waits.items())]
    return "\n".join(lines)


def test_waits_of_a_remax_step(found, capsys):
    # 4 prompts in one batch, learned from in 2 micro-batches, by Llamas. Read are the lengths of both kinds of answers,
    # a denominator, a gradient's norm and the figures; and in each forward the prompts, to find those that rows share.
    # Copied are the batch, the order of the rows in the micro-batches, and once, where the reward model reads sampled
    # and greedy answers together, which rows share a prompt. Another wait wants a reason.
    for step in found["trainings"]["remax"]["steps"]:
        assert sum(ours(step["reads"]).values()) <= 11, listed(step)
        assert sum(ours(step["copies"]).values()) <= 5, listed(step)
    with capsys.disabled():
        print(f"\n{listed(step)}")


def test_faults_are_found(found):
    assert found["faults"]["mask"]["error"].startswith("remax/models/reward_model.py:")
    right, wrong = found["trainings"]["remax"]["steps"][0]["reads"], found["faults"]["read"]["steps"][0]["reads"]
    assert sum(wrong.values()) == sum(right.values()) + 2  # one for each micro-batch
    assert [place.split(":")[0] for place in wrong.keys() - right.keys()] == ["remax/training/trainer.py"]
