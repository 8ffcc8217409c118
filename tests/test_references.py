"""Short runs of all stages and algorithms end as they did when they were recorded, bit for bit on the same machine.

A refactoring leaves tests/references/trajectories.json as it is; `tests/references/record.py` says how to renew it.
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


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", (1, 2))
def test_trajectories_are_those_recorded(prepared, ranks):
    exact = REFERENCE["machine"] == record.machine()
    found = record.run(prepared, ranks)
    lines = record.differences(found, REFERENCE["outcomes"][str(ranks)], exact)
    assert not lines, "\n".join(lines[:20])


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
