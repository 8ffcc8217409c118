"""What the planner says a step holds in memory, and what it held.

    python benchmarks/memory.py

Each case is step 3 on models of random weights, in processes of its own: two optimizer steps with prompts and answers
as long as they may be, of which the second is measured. The peak of each phase is read apart: on a GPU what torch has
allocated; on a CPU the resident memory, which follows what is allocated, since the process is told to give back at once
whatever is freed. What a first run of a tiny model leaves behind, libraries and their buffers, is subtracted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import (
    ROOT,
    SHAPES,
    config_of,
    corpus_tokenizer,
    figures_of,
    fill,
    forget_peak,
    machine,
    make_models,
    peak,
    resident,
    table,
)

MAIN = ROOT / "step3_rlhf_finetuning/main.py"
MIB = 2**20
RECORD = str(ROOT / "docs/results/memory.json")
# as those of `measuring`; the last is OPT's, whose feed-forward layers are four times as wide as the others
SIZES = SHAPES | {
    "30m": (512, 1376, 8, 8, 8, 8192),
    "70m": (512, 1536, 8, 8, 4, 50304),
    "125m": (768, 2048, 12, 12, 4, 32000),
    "opt": (512, 2048, 8, 8, 8, 8192),
}


@dataclass(frozen=True)
class Case:
    """A setting whose peaks are planned and measured."""

    name: str
    shape: str = "30m"
    family: str = "llama"
    dtype: str = "fp32"
    flags: str = "--algo remax --actor_zero_stage 2"
    prompts: int = 8
    micro: int = 4
    prompt: int = 64
    answer: int = 64
    ranks: int = 1


CHECKPOINTED = "--actor_gradient_checkpointing"
CPU_CASES = (
    Case("ReMax, ZeRO 2"),
    Case("ReMax, ZeRO 0", flags="--algo remax --actor_zero_stage 0"),
    Case("PPO, ZeRO 2", flags="--algo ppo --actor_zero_stage 2"),
    Case("ReMax, checkpointing", flags=f"--algo remax --actor_zero_stage 2 {CHECKPOINTED}"),
    Case("RLOO of 2, large vocabulary", "70m", flags="--algo rloo --samples_per_prompt 2 --actor_zero_stage 2"),
    Case("ReMax, LoRA", flags="--algo remax --actor_zero_stage 2 --actor_lora_dim 16 --only_optimize_lora"),
    Case("ReMax, OPT", "opt", "opt"),
    Case("ReMax, larger", "125m", prompts=4, micro=4),
    Case("ReMax, bf16, ZeRO 2", dtype="bf16", prompts=4, micro=2),
    Case("ReMax, ZeRO 3", flags="--algo remax --actor_zero_stage 3 --reference_zero_stage 3 --reward_zero_stage 3"),
    Case("ReMax, ZeRO 2, 2 ranks", ranks=2),
)
ON_GPU: dict[str, Any] = {"shape": "1.1b", "dtype": "bf16", "prompts": 32, "micro": 16, "answer": 128}
ZERO_2, PLAIN = "--algo remax --actor_zero_stage 2", "--cuda_graphs false"
GPU_CASES = (
    Case("1.1B, ReMax", flags=f"{ZERO_2} {PLAIN}", **ON_GPU),
    Case("1.1B, PPO", flags=f"--algo ppo --actor_zero_stage 2 {PLAIN}", **ON_GPU),
    Case("1.1B, ReMax, checkpointing", flags=f"{ZERO_2} {CHECKPOINTED} {PLAIN}", **ON_GPU),
    Case("1.1B, ReMax, CUDA graphs", flags=f"{ZERO_2} --cuda_graphs", **ON_GPU),
    Case("1.1B, ReMax, offload", flags=f"{ZERO_2} --offload {CHECKPOINTED} {PLAIN}", **ON_GPU),
    Case("1.1B, ReMax, ZeRO 3", flags="--algo remax --actor_zero_stage 3 --reference_zero_stage 3", **ON_GPU),
)


def prepare(folder: Path, shape: str, family: str, dtype: str) -> None:
    """A policy and a reward model, their tokenizer, and prompts of more tokens than are taken."""
    rows, tokenizer = corpus_tokenizer()
    make_models(folder, config_of(family, SIZES[shape]), tokenizer, dtype)
    words_of = " ".join(row["prompt"] for row in rows)
    prompts = [words_of[i : i + 2000] for i in range(200)] + ["short, so that not every prompt is too long"] * 2
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def flags_of(case: Case, folder: Path) -> list[str]:
    """Of step 3."""
    fixed = (
        "--data_split 0,0,1 --skip_doctor --max_steps 2 --max_eval_batches 1 --gamma 1 --target_kl 0 --save_minutes 0"
    )
    sizes = {
        "per_device_generation_batch_size": case.prompts,
        "per_device_training_batch_size": case.micro,
        "per_device_eval_batch_size": case.micro,
        "max_prompt_seq_len": case.prompt,
        "max_answer_seq_len": case.answer,
        "actor_dtype": case.dtype,
        "reward_dtype": case.dtype,
        "actor_model_name_or_path": folder / "policy",
        "reward_model_name_or_path": folder / "reward",
        "data_path": folder / "prompts.jsonl",
        "output_dir": folder / "out",
    }
    return [*fixed.split(), *(str(x) for name, size in sizes.items() for x in (f"--{name}", size)), *case.flags.split()]


# ----------------------------------------------------------------------------------------------------------- measuring


class Peaks:
    """The largest peak of each phase of the steps."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.phase = ""

    def ends(self, phase: str) -> None:
        """What was since the phase before belongs to this one."""
        self.found[phase] = peak()
        forget_peak()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, trainers and engines say what they do."""
        from remax.engines.base import TrainedEngine
        from remax.stages import rlhf
        from remax.training import trainer

        timer, step, evaluate = trainer.Timer.__call__, TrainedEngine.step, rlhf.evaluate_policy
        names = {"generation": "rollout", "scoring": "scoring", "update": "rest of the update"}
        peaks, steps = self, 0

        @contextlib.contextmanager
        def timed(self: Any, name: str) -> Iterator[None]:
            nonlocal steps
            steps = 0
            forget_peak()
            with timer(self, name):
                yield
            peaks.ends(names[name])

        def stepped(self: Any) -> Any:
            nonlocal steps
            of = "critic's " if steps else ""
            peaks.ends(f"{of}update")
            result = step(self)
            peaks.ends(f"{of}step")
            steps += 1
            return result

        def evaluated(*args: Any, **options: Any) -> Any:
            forget_peak()
            found = evaluate(*args, **options)
            peaks.ends("evaluation")
            return found

        trainer.Timer.__call__, TrainedEngine.step, rlhf.evaluate_policy = timed, stepped, evaluated
        try:
            yield
        finally:
            trainer.Timer.__call__, TrainedEngine.step, rlhf.evaluate_policy = timer, step, evaluate


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Bytes of each phase beyond what a run of a tiny model leaves, in this process."""
    import torch
    import torch.distributed as dist

    from remax.stages import rlhf

    dist.destroy_process_group = lambda *args: None  # a stage leaves its group at its end; the second run needs it
    before, build, peaks = [0], rlhf.build_models, Peaks()

    def built(*args: Any, **options: Any) -> Any:
        gc.collect()
        before[0] = torch.cuda.memory_allocated() if torch.cuda.is_available() else resident("VmRSS")
        return build(*args, **options)

    for of in ("tiny", "true"):
        rlhf.build_models = built
        sys.argv = [str(MAIN), *flags_of(case, folder / of)]
        with peaks.watching(), contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(MAIN), run_name="stage")["main"]()
    return {phase: size - before[0] for phase, size in peaks.found.items() if phase != "rest of the update"}


def planned(case: Case, cuda: bool) -> Any:
    """The planner's view: no weights are made."""
    from remax.cli.validate import parse_step3
    from remax.planning.phases import plan
    from remax.planning.states import Machine
    from remax.stages.planning import job_of

    with tempfile.TemporaryDirectory() as place:
        for name in ("policy", "reward"):
            config_of(case.family, SIZES[case.shape]).save_pretrained(Path(place) / name)
        (Path(place) / "prompts.jsonl").touch()
        return plan(job_of(parse_step3(flags_of(case, Path(place))), Machine(case.ranks, cuda)))


def run_case(case: Case) -> dict[str, int]:
    """Measures in processes of its own."""
    with tempfile.TemporaryDirectory() as place:
        for name, shape in (("tiny", "tiny"), ("true", case.shape)):
            prepare(Path(place) / name, shape, case.family, case.dtype)
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        command = [sys.executable, __file__, "--one", case.name, "--folder", place]
        if case.ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(case.ranks)]
            command = [*launcher, "--master_port", "29517", *command[1:]]
        return figures_of(case.name, command, **environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="only those whose names begin so")
    parser.add_argument("--json", default=RECORD, help="file of what was measured; cases that are not run keep theirs")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results/memory.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    if args.one:
        found = measure(next(case for case in cases if case.name == args.one), Path(args.folder))
        if os.environ.get("RANK", "0") == "0":
            print("FIGURES" + json.dumps(found), flush=True)
        return
    record = Path(args.json)
    measured = json.loads(record.read_text()) if record.is_file() else {}
    for case in cases:
        if args.cases is None or any(case.name.startswith(part) for part in args.cases):
            measured[case.name] = run_case(case)
            record.write_text(json.dumps(measured, indent=1) + "\n")
            print(case.name, flush=True)
            for phase, real, size in compared(case, measured[case.name], torch.cuda.is_available()):
                print(f"  {phase:18} {size / MIB:9.1f} {real / MIB:9.1f}  {size / real - 1:+.1%}", flush=True)
    if args.write:
        fill(ROOT / "docs/results/memory.md", tables(measured, torch.cuda.is_available()))


def compared(case: Case, measured: dict[str, int], cuda: bool) -> Iterator[tuple[str, int, float]]:
    """(phase, measured, planned) bytes."""
    plan = planned(case, cuda)
    for phase in plan.phases:
        if phase in measured:
            yield phase, measured[phase], plan.of(phase)


def tables(measured: dict[str, dict[str, int]], cuda: bool) -> dict[str, list[str]]:
    """The tables of docs/results/memory.md by their names."""
    from remax.planning.states import PHASES

    rows: list[list[str]] = []
    errors: list[float] = []
    for case in GPU_CASES if cuda else CPU_CASES:
        if case.name not in measured:
            continue
        cells = dict.fromkeys(PHASES, "")
        for phase, real, size in compared(case, measured[case.name], cuda):
            errors.append(size / real - 1)
            cells[phase] = f"{size / MIB:.0f} / {real / MIB:.0f} ({errors[-1]:+.0%})"
        rows.append([case.name, *cells.values()])
    within = sum(abs(error) <= 0.1 for error in errors)
    lines = table(("case", *PHASES), rows)
    lines += [f"{within} of {len(errors)} peaks are within 10 %; from {min(errors):+.1%} to {max(errors):+.1%}.", ""]
    lines.append(machine("torch", "deepspeed", "transformers") + ".")
    return {"gpu" if cuda else "cpu": lines}


if __name__ == "__main__":
    main()
