"""Short runs of all stages and algorithms end as they did when they were recorded, bit for bit on the same machine.

Stopped in the middle and gone on with, they end so, too. A refactoring leaves tests/references/trajectories.json
as it is; `tests/references/record.py` says how to renew it.
"""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "references"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record = load("record")
REFERENCE = json.loads(record.FILE.read_text())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    record.prepare(folder)
    return folder


# Together all stages, ReMax and PPO, ZeRO 0 to 3, LoRA, packing, streaming, moving averages, the mix with plain text.
STOPPED = {
    1: ["supervised, packed, LoRA", "r-dpo, streamed", "remax, everything", "ppo"],
    2: ["supervised, ZeRO 3, LoRA", "ranking, ZeRO 3, packed", "remax, ZeRO 2", "remax, ZeRO 3, LoRA"],
}


def compare(folder: Path, ranks: int, names: list[str]) -> None:
    """Of a case that is stopped and gone on with, the outcome is that of the one never stopped."""
    recorded = REFERENCE["outcomes"][str(ranks)]
    found = record.run(folder, ranks, *names)
    exact = REFERENCE["machine"] == record.machine()
    lines = record.differences(found, {name: recorded[name.removesuffix(", stopped")] for name in names}, exact)
    assert not lines, "\n".join(lines[:20])


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", (1, 2))
def test_trajectories_are_those_recorded(prepared, ranks):
    recorded = REFERENCE["outcomes"][str(ranks)]
    compare(prepared, ranks, [*recorded, *(f"{name}, stopped" for name in STOPPED[ranks])])


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2))
def test_trajectories_do_not_depend_on_a_stop(prepared, ranks):
    rest = [name for name in REFERENCE["outcomes"][str(ranks)] if name not in STOPPED[ranks]]
    compare(prepared, ranks, [f"{name}, stopped" for name in rest])


def test_differences_are_seen():
    # A changed bit, a lost record and a new name; elsewhere only what rounding cannot explain.
    found = {"loss": [1.0, 2.0], "digest": "a", "new": 1}
    expected = {"loss": [1.0, 2.0 + 1e-15], "digest": "b"}
    assert record.differences(found, expected, exact=True) == [
        "/new: only here",
        f"/loss[1]: 2.0, reference {2.0 + 1e-15!r}",
        "/digest: 'a', reference 'b'",
    ]
    assert record.differences(found, expected, exact=False) == ["/new: only here"]
    assert record.differences([1.0], [1.1], exact=False) == ["[0]: 1.0, reference 1.1"]
    assert record.differences([1.0], [1.0, 2.0], exact=False)


def test_examination_leaves_no_trace():
    # The recorded figures of a training with the doctor and without it.
    runs = REFERENCE["outcomes"]["2"]
    plain, examined = runs["remax, examined"], runs["remax, plain"]
    assert plain["weights"]["actor_final"] == examined["weights"]["actor_final"]
