"""The recorded trainings of one rank on the second device: `python tests/second_device/trainings.py FOLDER [NAME ...]`.

Writes FOLDER/outcomes.json: where each training ended otherwise than recorded, and what the host waited for in each of
its steps.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "references"), str(TESTS)]

import torch  # noqa: E402
from cases import CASES, STAGES, command, prepare  # noqa: E402
from mains import run_program  # noqa: E402
from record import FILE, differences  # noqa: E402
from run import outcome  # noqa: E402
from sim import DeviceMismatch, Sim, Waits, install, watching  # noqa: E402

# Further flags of the recorded trainings, which change no figure.
MORE = {
    "supervised, packed, LoRA": "--gradient_checkpointing",
    "remax, full KL, rewards": "--skip_doctor false",
    "rloo": "--actor_gradient_checkpointing",
    "ppo": "--critic_gradient_checkpointing",
}
MODELS = "--actor_model_name_or_path {models}/llama --reward_model_name_or_path {models}/llama-reward"
# The programs that do not train.
OTHERS = {
    "step1_supervised_finetuning/prompt_eval.py": "--model_name_or_path_finetune {models}/opt --num_prompts 2"
    " --num_return_sequences 2 --num_beams 2 --max_new_tokens 6 --data_path {data} --output {folder}/answers.jsonl",
    "step2_reward_model_finetuning/rw_eval.py": "--model_name_or_path {models}/llama-reward --max_seq_len 72"
    " --data_path {data} --output {folder}/scores.jsonl",
    "remax/doctor.py": f"{MODELS} --max_prompt_seq_len 60 --max_answer_seq_len 10 --data_path {{data}}",
}
FEW = "--max_steps 1 --max_eval_batches 1"


class PlainEngine:
    """What `TrainedEngine` asks of DeepSpeed, on one rank and without ZeRO."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, clipping: float):
        self.module, self.optimizer, self.lr_scheduler, self.clipping = module, optimizer, schedule, clipping

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Gradients add up by themselves."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def get_lr(self) -> list[float]:
        return self.lr_scheduler.get_last_lr()

    def step(self) -> None:
        self.norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clipping or float("inf"))
        self.optimizer.step()
        self.lr_scheduler.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> torch.Tensor:
        return self.norm

    def was_step_applied(self) -> bool:
        return True


def train(folder: Path, name: str, more: str, output: str) -> tuple[Path, list[dict[str, dict[str, int]]]]:
    """A recorded training with further flags; its folder, and the waits of each step."""
    from remax.training import finetune, trainer

    steps = []

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            with watching():
                result = step(*args)
            steps.append({"reads": dict(Waits.reads), "copies": dict(Waits.copies)})
            return result

        return wrapper

    stage, flags = CASES[1][name]
    path = folder / output.replace(",", "").replace(" ", "-")
    with (
        Sim(),
        patch.object(trainer.Trainer, "step", watched(trainer.Trainer.step)),
        patch.object(finetune, "optimizer_step", watched(finetune.optimizer_step)),
    ):
        program = TESTS.parent / STAGES[stage] / "main.py"
        status = run_program(program, command(stage, f"{flags} {more}", folder, path), folder)
    assert status == 0, f"{name}: status {status}"
    return path, steps


@contextmanager
def mask_on_the_cpu() -> Iterator[None]:
    """A fault: the mask of the answers stays behind."""
    from remax.core.sequences import Sequences

    right = Sequences.answer_mask.fget
    with patch.object(Sequences, "answer_mask", property(lambda sequences: right(sequences).cpu())):
        yield


@contextmanager
def loss_that_is_read() -> Iterator[None]:
    """A fault: the loss of every micro-batch is read."""
    from remax.algorithms.base import Algorithm

    right = Algorithm.loss

    def loss(*args: Any) -> Any:
        of_batch, figures = right(*args)
        of_batch.item()
        return of_batch, figures

    with patch.object(Algorithm, "loss", loss):
        yield


FAULTS: dict[str, Callable[[], Any]] = {"mask": mask_on_the_cpu, "read": loss_that_is_read}


def main() -> None:
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    prepare(folder)
    device = install()

    import deepspeed

    import remax.stages.finetune
    import remax.stages.rlhf  # noqa: F401

    gc.collect()
    gc.freeze()  # each training ends with a collection, which would go through all that was imported

    def initialize(model, optimizer, lr_scheduler, config, dist_init_required):
        return (PlainEngine(model.to(device), optimizer, lr_scheduler, config["gradient_clipping"]),)

    deepspeed.initialize = initialize
    recorded = json.loads(FILE.read_text())["outcomes"]["1"]
    trainings: dict[str, dict[str, Any]] = {}
    for name in only or CASES[1]:
        path, steps = train(folder, name, MORE.get(name, ""), name)
        # Another optimizer's code, and so another rounding.
        lines = differences(outcome(path), recorded[name], exact=False)
        trainings[name] = {"differences": lines, "steps": steps}
    for program, flags in OTHERS.items():
        names = {"folder": folder, "models": folder / "models", "data": folder / "data"}
        with Sim():
            assert run_program(TESTS.parent / program, flags.format(**names).split(), folder) == 0, program
    faults: dict[str, dict[str, Any]] = {}
    for name, fault in FAULTS.items():
        faults[name] = {}
        with fault():
            try:
                _, faults[name]["steps"] = train(folder, "remax", FEW, f"fault {name}")
            except DeviceMismatch as error:
                faults[name]["error"] = str(error)
    (folder / "outcomes.json").write_text(json.dumps({"trainings": trainings, "faults": faults}))


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
