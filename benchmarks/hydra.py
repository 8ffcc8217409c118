"""Memory and seconds of a step with separate and with shared weights, by the shipped step 3, beside a prediction.

    taskset -c 0 python benchmarks/hydra.py --output docs/results/hydra.md

All models have one shape and random weights, so that answers hardly ever end and every way generates the same number of
tokens. Each way is a process of its own. Counted are the model states (weights, gradients and Adam's averages, each
where its engine steps) and the largest resident memory during a step, on a GPU what torch allocated at most.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from measuring import (
    ROOT,
    SHAPES,
    config_of,
    corpus_tokenizer,
    forget_peak,
    machine,
    make_models,
    measured_apart,
    peak,
    resident,
    spread,
)

MAIN = ROOT / "step3_rlhf_finetuning/main.py"
PARTS = ("seconds_generation", "seconds_scoring", "seconds_update", "seconds_per_step")
RANK = 16
ADAPTERS = f"--actor_lora_dim {RANK} --only_optimize_lora"
CRITIC = f"--algo ppo --critic_lora_dim {RANK}"


@dataclass(frozen=True)
class Way:
    """A setting: its flags, and what it holds in numbers of models of the policy's (P) and a scorer's (S) size."""

    flags: str
    trained: tuple[int, int]  # whole P and S
    frozen: tuple[int, int]
    sets: int

    @property
    def held(self) -> str:
        """Static models / sets of adapters, as Hydra-RLHF counts them."""
        return f"{sum(self.trained) + sum(self.frozen)} / {self.sets}"


WAYS = {
    "PPO": Way("--algo ppo", (1, 1), (1, 1), 0),
    "LoRA-PPO": Way(f"{CRITIC} {ADAPTERS}", (0, 0), (2, 2), 2),
    "Dynamic-LoRA-PPO": Way(f"{CRITIC} {ADAPTERS} --share reference", (0, 0), (1, 1), 2),
    "J-Hydra-PPO": Way(f"--algo ppo --joint_critic {ADAPTERS} --share all", (0, 0), (1, 0), 1),
    "Hydra-PPO": Way(f"{CRITIC} {ADAPTERS} --share all", (0, 0), (1, 0), 2),
    "ReMax": Way("--algo remax", (1, 0), (1, 1), 0),
    "LoRA-ReMax": Way(f"--algo remax {ADAPTERS}", (0, 0), (2, 1), 1),
    "Dynamic-LoRA-ReMax": Way(f"--algo remax {ADAPTERS} --share reference", (0, 0), (1, 1), 1),
    "Hydra-ReMax": Way(f"--algo remax {ADAPTERS} --share all", (0, 0), (1, 0), 1),
}
# weights, gradient, and what the optimizer keeps, of a trained parameter; and a frozen one's weights
BYTES = {"fp32": (4 + 4 + 8, 4), "bf16": (2 + 4 + 12, 2)}


def parameters(shape: str, rank: int = RANK) -> tuple[int, int, int]:
    """Of a policy (P), of a scorer (S), and of one set of adapters on every linear layer but the head."""
    hidden, wide, layers, heads, key_heads, vocabulary = SHAPES[shape]
    keys = hidden * key_heads // heads
    linear = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, wide)] * 3
    trunk = vocabulary * hidden + layers * (sum(a * b for a, b in linear) + 2 * hidden) + hidden
    return trunk + vocabulary * hidden, trunk + hidden, layers * sum(rank * (a + b) for a, b in linear)


def predicted(way: Way, shape: str, dtype: str, rank: int = RANK) -> int:
    """Bytes of the model states; a score or value head on a shared trunk, a few thousand numbers, is left out."""
    policy, scorer, adapters = parameters(shape, rank)
    trained, frozen = BYTES[dtype]
    learning = way.trained[0] * policy + way.trained[1] * scorer + way.sets * adapters
    return trained * learning + frozen * (way.frozen[0] * policy + way.frozen[1] * scorer)


def make_hydra(folder: Path, shape: str) -> None:
    """The policy with a score head beside, for the ways that share everything."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoTokenizer

    policy, both = folder / "policy", folder / "hydra"
    config = AutoConfig.from_pretrained(policy, num_labels=1)
    config.architectures = ["LlamaForCausalLM", "LlamaForSequenceClassification"]
    config.save_pretrained(both)
    AutoTokenizer.from_pretrained(policy).save_pretrained(both)
    weights = {name: tensor for file in policy.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights["score.weight"] = torch.randn(1, SHAPES[shape][0]).to(weights["lm_head.weight"]) / 50
    save_file(weights, both / "model.safetensors", metadata={"format": "pt"})


def numbers_of(engine) -> Iterator:  # noqa: ANN001 - a DeepSpeed engine or a module lies within
    """The tensors of an engine's model states."""
    import torch

    for parameter in engine.model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    optimizer = getattr(engine.wrapped, "optimizer", None)
    for state in (getattr(optimizer, "optimizer", optimizer).state if optimizer is not None else {}).values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def one(args: argparse.Namespace) -> None:
    """A few steps of one way in this process; its figures on the last line."""
    import torch

    from remax.engines.base import Engine, FrozenEngine, TrainedEngine
    from remax.training import trainer
    from remax.training.trainer import Trainer

    way, folder = WAYS[args.one], Path(args.folder)
    libraries, states, peaks = resident("VmRSS") / 2**30, {}, []

    def count(engine: Engine) -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in numbers_of(engine)}
        states[id(engine)] = sum(storages.values())

    def build(self: FrozenEngine, *rest, start=FrozenEngine.__init__) -> None:
        start(self, *rest)
        count(self)

    def step(self: TrainedEngine, original=TrainedEngine.step):
        if self.wrapped.global_steps:  # Adam's averages are there
            count(self)
        return original(self)

    def learn(self: Trainer, *rest, original=Trainer.learn):
        forget_peak()
        figures = original(self, *rest)
        peaks.append(peak() / 2**30)
        return figures

    FrozenEngine.__init__, TrainedEngine.step, Trainer.learn = build, step, learn
    if not torch.cuda.is_available():  # so that other work on the machine does not count
        trainer.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    output, shared = folder / args.one, "--share all" in way.flags
    line = f"--data_path {folder}/data --data_split 0,0,1 --output_dir {output} --actor_dtype {args.dtype}"
    line += f" --actor_model_name_or_path {folder / ('hydra' if shared else 'policy')}"
    if not shared:
        line += f" --reward_model_name_or_path {folder / 'reward'}"
    if "--share" not in way.flags or args.one == "Dynamic-LoRA-ReMax":  # where the reward model is one of its own
        line += f" --reward_dtype {args.dtype}"
    line += f" --per_device_generation_batch_size {args.prompts} --per_device_training_batch_size {args.micro_batch}"
    line += f" --max_prompt_seq_len 64 --max_answer_seq_len {args.tokens} --max_steps {args.steps} --gamma 1"
    line += " --max_eval_batches 1 --per_device_eval_batch_size 2 --skip_doctor true --target_kl 0 --logging_steps 1"
    sys.argv = [str(MAIN), *line.split(), *way.flags.split(), *args.more.split()]
    runpy.run_path(str(MAIN), run_name="stage")["main"]()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "train/seconds_per_step" in record][1:]  # the first one warms up
    figures = {part: [record[f"train/{part}"] for record in steps] for part in PARTS}
    figures |= {"states": sum(states.values()), "peak": max(peaks[1:]), "libraries": libraries}
    print("FIGURES" + json.dumps(figures), flush=True)


PAPER = """
The paper's own measurements stand beside these in [paper.md](paper.md).
"""


def report(args: argparse.Namespace, figures: dict[str, dict]) -> str:
    import torch

    libraries = max(found["libraries"] for found in figures.values())
    seconds = "of the clock" if torch.cuda.is_available() else "of CPU time, on one core"
    where = machine("torch", "transformers", "deepspeed")
    lines = [
        f"{where}; Llama of {args.shape}, {args.dtype}, ZeRO {0 if args.dtype == 'fp32' else 1}, adapters "
        f"of rank {RANK} on every linear layer; {args.prompts} prompts, answers of {args.tokens} tokens, micro-batches "
        f"of {args.micro_batch}; seconds {seconds}, median [range] of {args.steps - 1} steps. Model states are those "
        "of all engines, each as it steps; the peak is the whole process's during a step, libraries included "
        f"({libraries:.2f} GiB).",
        "",
        "| setting | static models / sets | states predicted GiB | measured GiB | of PPO's | peak of a step GiB "
        "| of PPO's | scoring s | update s | step s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = figures.get("PPO")
    for name, found in figures.items():
        shares = ["", ""] if base is None else [f"{found[key] / base[key]:.2f}" for key in ("states", "peak")]
        times = [spread(found[part]) for part in ("seconds_scoring", "seconds_update", "seconds_per_step")]
        told = predicted(WAYS[name], args.shape, args.dtype) / 2**30
        cells = [name, WAYS[name].held, f"{told:.2f}", f"{found['states'] / 2**30:.2f}", shares[0]]
        peak = f"{found['peak']:.2f}"
        lines.append(f"| {' | '.join([*cells, peak, shares[1], *times])} |")
    lines += ["", *conclusions(figures), PAPER, *by_arithmetic()]
    return "\n".join(lines)


def conclusions(figures: dict[str, dict]) -> Iterator[str]:
    """What was wanted of Hydra-ReMax, beside what it does here."""
    if not {"PPO", "ReMax", "Hydra-ReMax"} <= set(figures):
        return
    ppo, full, hydra = (figures[name] for name in ("PPO", "ReMax", "Hydra-ReMax"))
    others = [name for name in ("ReMax", "LoRA-ReMax", "Dynamic-LoRA-ReMax") if name in figures]
    scoring = {name: statistics.median(figures[name]["seconds_scoring"]) for name in (*others, "Hydra-ReMax")}
    times = ", ".join(f"{scoring[name] / scoring['Hydra-ReMax']:.2f} ({name})" for name in others)
    yield "Hydra-ReMax, against what was aimed at:"
    yield ""
    yield f"- model states {hydra['states'] / ppo['states']:.3f} of PPO's (at most .15)"
    yield f"- model states {hydra['states'] / full['states']:.3f} of full ReMax's (at most .22)"
    yield f"- peak of a step {hydra['peak'] / ppo['peak']:.2f} of PPO's (at most .5)"
    yield f"- scoring so many times as fast as with a reward model of its own: {times} (at least 1.4)"


def by_arithmetic() -> Iterator[str]:
    """The same sums for larger models."""
    yield f"By the same arithmetic, in bf16 with adapters of rank {RANK}, GB (10^9 bytes) of model states on one rank:"
    yield ""
    yield "| shape | " + " | ".join(WAYS) + " |"
    yield "|" + "---|" * (len(WAYS) + 1)
    for shape in ("1.1b", "7b"):
        yield f"| {shape} | " + " | ".join(f"{predicted(way, shape, 'bf16') / 1e9:.1f}" for way in WAYS.values()) + " |"
    hydra, ppo, full = (predicted(WAYS[name], "7b", "bf16") for name in ("Hydra-ReMax", "PPO", "ReMax"))
    yield ""
    yield (
        f"At 7B that is {hydra / ppo:.3f} of PPO's and {hydra / full:.3f} of full ReMax's. Of a card with 24 GB "
        f"{24 - hydra / 1e9:.1f} are left for activations, the cache of the answers being written, and the libraries."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="134m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prompts", type=int, default=4, help="answers of a step")
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8, help="of every answer")
    parser.add_argument("--steps", type=int, default=3, help="of which the first is not counted")
    parser.add_argument("--more", default="", help="further flags of step 3, for every way")
    parser.add_argument("--output", help="a Markdown file for the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    from remax.demo.corpus import make_corpus

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), config_of("llama", SHAPES[args.shape]), corpus_tokenizer()[1], args.dtype)
        make_corpus(Path(folder) / "data", seed=0, train_rows=2000, test_rows=64)
        make_hydra(Path(folder), args.shape)
        for way, found in measured_apart(__file__, args.ways, Path(folder)):
            figures[way] = found
            print(way, found, flush=True)
    table = report(args, figures)
    print(table)
    if args.output:
        import torch

        core = "" if torch.cuda.is_available() else "taskset -c 0 "
        command = f"{core}python benchmarks/hydra.py {' '.join(sys.argv[1:])}"
        Path(args.output).write_text(f"# One trunk for several roles: memory and seconds\n\n    {command}\n\n{table}\n")


if __name__ == "__main__":
    main()
