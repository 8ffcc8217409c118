"""One rank of the pinned trainings: `python tests/references/run.py FOLDER`, with a launcher's variables set.

All cases of this number of ranks, or those that are named, run one after the other in the same process; rank 0 writes
FOLDER/outcomes.json. A name that ends in STOPPED is that case, stopped by a signal in its middle and gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import CASES, STAGES, command  # noqa: E402
from mains import run_program  # noqa: E402

STOPPED, STOP_AFTER = ", stopped", 3  # behind a case's name; a step
TIMES = ("time", "seconds", "tokens_per_second")


def weights_of(folder: Path) -> dict[str, str | float]:
    """Exact (a digest) and approximate (norm, and a sum in which every weight has its own factor) fingerprints."""
    digest, norm, probe = hashlib.sha256(), 0.0, 0.0
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
            flat = tensor.double().flatten()
            norm += float(flat.square().sum())
            probe += float((flat * torch.sin(torch.arange(len(flat), dtype=torch.float64))).sum())
    return {"digest": digest.hexdigest()[:16], "norm": norm**0.5, "probe": probe}


def files_of(output: Path) -> list[Path]:
    """All files of a run but those of its checkpoints."""
    return [file for file in output.rglob("*") if "checkpoints" not in file.relative_to(output).parts]


def outcome(output: Path) -> dict:
    """What a run left behind, without its times and its size."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in record.items() if not k.rpartition("/")[2].startswith(TIMES)} for record in records]
    metrics = [{k: v for k, v in record.items() if not k.startswith("run/")} for record in metrics]
    folders = sorted({file.parent for file in files_of(output) if file.suffix == ".safetensors"})
    results = json.loads((output / "results.json").read_text())
    notes = {
        str(file.relative_to(output)): json.loads(file.read_text())
        for file in files_of(output)
        if file.name == "evaluation.json"
    }
    answers = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(output.glob("answers/*")))).hexdigest()[:16]
    scores = {}
    if (output / "config.json").is_file():
        config = json.loads((output / "config.json").read_text())
        scores = {name: config[name] for name in ("score_mean", "score_std") if name in config}
    weights = {str(folder.relative_to(output)): weights_of(folder) for folder in folders}
    return {
        "metrics": metrics,
        "results": results,
        "weights": weights,
        "notes": notes,
        "answers": {"digest": answers},
        "scores": scores,
    }


def stop(program: Path, flags: list[str], folder: Path) -> None:
    """Runs until the last rank gets a signal after step STOP_AFTER, which all of them leave for."""
    from remax.training.loop import _Run

    keep = _Run.keep

    def stopped(self: _Run, due: bool) -> None:
        if self.state.step == STOP_AFTER and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        keep(self, due)

    with patch.object(_Run, "keep", stopped):
        status = run_program(program, flags, folder)
    assert status == 128 + signal.SIGTERM, status


def main() -> None:
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    ranks, outcomes = int(os.environ["WORLD_SIZE"]), {}
    for name in only or CASES[ranks]:
        stage, flags = CASES[ranks][name.removesuffix(STOPPED)]
        output = folder / f"{ranks}" / name.replace(",", "").replace(" ", "_")
        program, flags = HERE.parents[1] / STAGES[stage] / "main.py", command(stage, flags, folder, output)
        if name.endswith(STOPPED):
            stop(program, flags, folder)
            flags += ["--resume", "auto"]
        status = run_program(program, flags, folder)
        assert status == 0, f"{name} ended with status {status}"
        if os.environ["RANK"] == "0":
            outcomes[name] = outcome(output)
            (folder / f"outcomes{ranks}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
