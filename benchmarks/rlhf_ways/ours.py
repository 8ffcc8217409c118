"""A step of this pipeline: the trainer of step 3, its models built from the flags that a user would give."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from rlhf_ways.clock import Clock
from rlhf_ways.models import LEARNING_RATE

from remax.checks.generation import decode_serves
from remax.cli.validate import make_algorithm, parse_step3
from remax.models.loading import quiet_libraries
from remax.stages.models import build_models, check_models
from remax.stages.planning import fit_to_memory
from remax.stages.settings import trainer_settings
from remax.training.sentinel import Sentinel
from remax.training.trainer import Trainer
from utils.data.batches import PromptBatch
from utils.distributed import device_memory, set_seed, sum_across_ranks
from utils.metrics import MetricsLogger

WAYS = {
    "ReMax": "--algo remax",
    "ReMax, greedy answers cut": "--algo remax --max_greedy_seq_len {quarter}",
    "ReMax, no CUDA graphs": "--algo remax --cuda_graphs false",
    "RLOO k=2": "--algo rloo --samples_per_prompt 2",
    "GRPO k=2": "--algo grpo --samples_per_prompt 2",
    "PPO": "--algo ppo",
}
# What a step calls, by the role that it asks.
WATCHED = {
    "actor": {"rollout": "generate", "old_logprobs": "reference"},
    "reward": {"score_parts": "score"},
    "reference": {"logprobs": "reference", "hidden": "reference"},
    "critic": {"old_values": "reference"},
    "judge": {"read": "reference"},
}


def flags(way: str, folder: Path, output: str, cell) -> list[str]:
    """Of step 3."""
    line = f"--actor_model_name_or_path {folder / 'policy'} --reward_model_name_or_path {folder / 'reward'}"
    line += f" --output_dir {output} --max_prompt_seq_len {cell.prompt} --max_answer_seq_len {cell.answer}"
    line += f" --per_device_generation_batch_size {cell.prompts} --per_device_training_batch_size {cell.forward_rows}"
    line += f" --actor_zero_stage 2 --actor_dtype {cell.dtype} --reward_dtype {cell.dtype} --top_p {cell.top_p}"
    # as the other sides do it, which learn from the model's log-probs; of use where sampling is truncated
    line += f" --logprobs_of model --data_path {folder} --max_steps 1000 --target_kl 0"
    line += f" --actor_learning_rate {LEARNING_RATE} {cell.more}"
    return [*line.split(), *WAYS[way].format(quarter=max(1, cell.answer // 4)).split()]


class Ours:
    """One of `WAYS`."""

    def __init__(self, way: str, folder: Path, cell) -> None:
        quiet_libraries()
        output = tempfile.mkdtemp(dir=folder)
        args = parse_step3(flags(way, folder, output, cell))
        set_seed(args.seed)
        fit_to_memory(args, 1, device_memory())
        tokenizers = check_models(args)
        models = build_models(args, tokenizers, 1000)
        algorithm = make_algorithm(args, sum_across_ranks=sum_across_ranks)
        self.trainer = Trainer(
            models.actor,
            models.reference,
            models.reward,
            algorithm,
            trainer_settings(args),
            measure=lambda: sys.exit("a benchmark evaluates nothing"),
            metrics=MetricsLogger(output),
            pad_id=tokenizers.actor.pad_token_id,
            critic=models.critic,
            judge=models.judge,
            sentinel=Sentinel(len(tokenizers.actor)),
            decode=tokenizers.actor.decode,
            trusts_decode=decode_serves(models.actor, None),
        )
        self.clock, self.steps = Clock(cell.seconds), 0
        for role, methods in WATCHED.items():
            owner = getattr(self.trainer, role)
            for name in methods if owner is not None else ():
                if hasattr(owner, name):
                    self.clock.watch(owner, name, methods[name])
        self.clock.watch(self.trainer, "update", "update")

    def step(self, rows: list[list[int]]) -> dict[str, float]:
        """One step on prompts of equal length: seconds of its parts."""
        ids = torch.tensor(rows)
        lengths, weight = torch.full((len(rows),), ids.shape[1]), torch.ones(len(rows))
        batch = PromptBatch(input_ids=ids, lengths=lengths, prompts=[""] * len(rows), weight=weight)
        self.steps += 1
        with self.clock.step() as found:
            figures = self.trainer.learn(self.steps, [batch])
        return found | {"length": figures["length"]}
