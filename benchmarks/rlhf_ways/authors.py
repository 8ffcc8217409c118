"""A step of ReMax as the authors' public code takes it, with this project's optimizer and engine.

Sampled and greedy answers come from two calls of transformers' `generate`, one after the other. Everything is padded
to the longest prompt with the longest answer. The actor reads the answers once more without gradient; of its logits and
the reference's over the whole vocabulary, in fp32, come log-probs, entropy and KL. The reward model reads the sampled
answers and the greedy ones by turns. The update has the logits of every token, the prompt's among them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from rlhf_ways.clock import Clock
from rlhf_ways.models import LEARNING_RATE
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import DTYPES, EngineConfig
from remax.engines.optimizer import OptimizerConfig
from utils.distributed import device, set_seed

GAMMA, KL, EOS, PAD = 0.95, 0.1, 0, 1


def answer_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B, T - 1) log-probs of all tokens but the first."""
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


class Authors:
    """The authors' way."""

    def __init__(self, way: str, folder: Path, cell) -> None:
        set_seed(1)
        self.cell, dtype = cell, DTYPES[cell.dtype]
        load = AutoModelForCausalLM.from_pretrained
        config = EngineConfig(2, dtype=cell.dtype, micro_batch_size=cell.forward_rows)
        optimizer = OptimizerConfig(LEARNING_RATE, total_steps=1000)
        self.actor = TrainedEngine(load(folder / "policy", dtype=dtype), config, optimizer)
        self.reference = FrozenEngine(load(folder / "policy", dtype=dtype), EngineConfig(dtype=cell.dtype))
        reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=dtype)
        self.reward = FrozenEngine(reward, EngineConfig(dtype=cell.dtype))
        self.clock = Clock(cell.seconds)

    @torch.no_grad()
    def generate(self, prompts: Tensor, **options) -> Tensor:
        """(B, P) -> (B, P + A), padded to the longest answer that there may be."""
        cell = self.cell
        config = GenerationConfig(max_new_tokens=cell.answer, eos_token_id=EOS, pad_token_id=PAD, **options)
        ids = self.actor.model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        return F.pad(ids, (0, cell.prompt + cell.answer - ids.shape[1]), value=PAD)

    @torch.no_grad()
    def score(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B,) rewards, in micro-batches."""
        parts = ids.split(self.cell.forward_rows)
        return torch.cat([self.reward(input_ids=x, attention_mask=(x != PAD).long()).logits[:, 0] for x in parts])

    @torch.no_grad()
    def experience(self, ids: Tensor) -> dict[str, Tensor]:
        """(B, T) -> (B, T - 1) log-probs under actor and reference, entropy and KL."""
        found = []
        for x in ids.split(self.cell.forward_rows):
            mask = (x != PAD).long()
            ours, theirs = (m(input_ids=x, attention_mask=mask).logits.float() for m in (self.actor, self.reference))
            logp, logq = ours[:, :-1].log_softmax(-1), theirs[:, :-1].log_softmax(-1)
            p = logp.exp()
            columns = {
                "logprobs": answer_logprobs(ours, x),
                "reference": answer_logprobs(theirs, x),
                "entropy": -(p * logp).sum(-1),
                "kl": (p * (logp - logq)).sum(-1),
            }
            found.append(columns)
        return {name: torch.cat([columns[name] for columns in found]) for name in found[0]}

    def step(self, rows: list[list[int]]) -> dict[str, float]:
        """One step on prompts of equal length: seconds of its parts."""
        cell, clock = self.cell, self.clock
        with clock.step() as found:
            prompts = torch.tensor(rows, device=device())
            self.actor.train(False)
            with clock("generate"):
                sampled = self.generate(prompts, do_sample=True, top_k=0, top_p=cell.top_p)
                greedy = self.generate(prompts, do_sample=False)
            self.actor.train()
            with clock("reference"):
                known = self.experience(sampled)
            with clock("score"):
                difference = (self.score(sampled) - self.score(greedy)).clamp(-5, 5)  # (B,)
            start = cell.prompt - 1
            mask = (sampled[:, cell.prompt :] != PAD).float()  # (B, A)
            steps_left = mask.flip(1).cumsum(1).flip(1)  # (B, A) with the present one
            penalty = KL * (known["logprobs"] - known["reference"])[:, start:]
            advantages = (GAMMA**steps_left * difference[:, None] - penalty) * mask
            with clock("update"):
                self.update(sampled, advantages, mask)
            {name: float((known[name][:, start:] * mask).sum() / mask.sum()) for name in ("entropy", "kl")}
        return found | {"length": float(mask.sum() / len(mask))}

    def update(self, ids: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """An optimizer step on all micro-batches."""
        size, start = self.cell.forward_rows, self.cell.prompt - 1
        parts = list(zip(ids.split(size), advantages.split(size), mask.split(size), strict=True))
        for i, (x, advantage, counted) in enumerate(parts):
            logits = self.actor(input_ids=x, attention_mask=(x != PAD).long(), use_cache=False).logits
            logprobs = answer_logprobs(logits, x)[:, start:]
            loss = -(advantage * logprobs * counted).sum() / mask.sum()
            self.actor.backward(loss, last=i == len(parts) - 1)
        self.actor.step()
