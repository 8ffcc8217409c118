"""Records the trajectories that tests/test_references.py compares with.

    python tests/references/record.py            compares, and says what differs
    python tests/references/record.py --write    replaces tests/references/trajectories.json

Write only after a change that is meant to move numbers, and say in its message which and why.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILE = HERE / "trajectories.json"
sys.path[:0] = [str(ROOT), str(HERE)]

from cases import CASES, prepare  # noqa: E402

from tests import zygote  # noqa: E402
from utils.distributed import free_port  # noqa: E402


def machine() -> dict[str, str]:
    """What decides the last bits of a sum."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    packages = {
        name: version(name) for name in ("torch", "transformers", "deepspeed", "tokenizers", "datasets", "peft")
    }
    found = {"cpu": names[0] if names else platform.processor(), "vectors": torch.backends.cpu.get_cpu_capability()}
    return found | packages


def environment(folder: Path, ranks: int) -> dict[str, str]:
    """The variables of all ranks of a run in `folder`."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return common | {"HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}


def run(folder: Path, ranks: int, *only: str, timeout: float = 900.0) -> dict:
    """The outcomes of all cases of that many ranks, in `folder` as `prepare` left it."""
    logs = [folder / f"log{ranks}-{rank}.txt" for rank in range(ranks)]
    zygote.run_ranks(
        HERE / "run.py",
        [folder, *only],
        folder=folder,
        logs=logs,
        timeout=timeout,
        environment=environment(folder, ranks),
    )
    return json.loads((folder / f"outcomes{ranks}.json").read_text())


def differences(found: object, expected: object, exact: bool, where: str = "") -> list[str]:
    """Where two outcomes differ: in any bit, or by more than rounding can explain."""
    if isinstance(found, dict) and isinstance(expected, dict):
        only = sorted(found.keys() ^ expected.keys())
        missing = [f"{where}/{name}: only {'here' if name in found else 'in the reference'}" for name in only]
        shared = [name for name in expected if name in found and (exact or name != "digest")]
        nested = [differences(found[name], expected[name], exact, f"{where}/{name}") for name in shared]
        return [*missing, *(line for lines in nested for line in lines)]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, exact, f"{where}[{i}]")]
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (found, expected))
    if found == expected or (numbers and not exact and math.isclose(found, expected, rel_tol=2e-2, abs_tol=2e-3)):
        return []
    return [f"{where}: {found!r}, reference {expected!r}"]


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        found = {str(ranks): run(Path(folder), ranks, *arguments) for ranks in CASES}
    if "--write" in sys.argv:
        FILE.write_text(json.dumps({"machine": machine(), "outcomes": found}, separators=(",", ":")) + "\n")
        print(f"{FILE.relative_to(ROOT)} written")
        return
    reference = json.loads(FILE.read_text())
    exact = reference["machine"] == machine()
    lines = differences(found, reference["outcomes"], exact)
    print("\n".join(lines[:40]) or f"no difference ({'bit for bit' if exact else 'within tolerance: another machine'})")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
