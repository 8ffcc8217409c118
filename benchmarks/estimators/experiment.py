"""What is compared, and what all its parts share: methods, tasks, settings, prompts, the reward.

Everything goes through the library: its algorithms, its trainer, its engines (one rank, ZeRO-0, fp32). What is set here
is what makes the comparison fair: all estimators maximise one objective, E[r] - beta * KL, and each optimizer step is
paid with the same number of answers, generated (the greedy ones included) or read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax.algorithms import ALGORITHMS, Algorithm, KLPenalty, build_algorithm
from remax.core.sequences import Sequences
from remax.demo.corpus import ease
from remax.engines.base import FrozenEngine
from remax.engines.scorer import Reward
from remax.models.reward_model import RewardModel, load_reward_model
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders


@dataclass(frozen=True)
class Estimator:
    """algorithm, settings: of `remax.algorithms`.   samples: drawn for each prompt."""

    algorithm: str
    samples: int = 1
    settings: dict[str, float | str] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """Generated per prompt, the greedy one included."""
        return self.samples + ALGORITHMS[self.algorithm].greedy


def calibrated(samples: int) -> Estimator:
    return Estimator("remax", samples, {"baseline": "calibrated"})


ESTIMATORS = {
    "reinforce": Estimator("reinforce"),
    "reinforce_mean": Estimator("reinforce", settings={"baseline_decay": 0.9}),
    "remax": Estimator("remax"),
    "remax_kl": Estimator("remax", settings={"baseline": "greedy_kl"}),
    "calibrated": calibrated(1),
    "calibrated_2": calibrated(2),
    "calibrated_4": calibrated(4),
    "rloo_2": Estimator("rloo", 2),
    "rloo_4": Estimator("rloo", 4),
    "rloo_4_opo": Estimator("rloo", 4, {"baseline": "length_weighted"}),
    "rloo_4_otb": Estimator("rloo", 4, {"baseline": "token_weighted"}),
    "rloo_4_batch": Estimator("rloo", 4, {"advantage_scaling": "batch"}),  # REINFORCE++ with a group baseline
    "grpo_4": Estimator("grpo", 4),
    "ppo": Estimator("ppo", settings={"epochs": 1}),
    "ppo_4": Estimator("ppo", settings={"epochs": 4}),  # passes over each rollout
}


@dataclass(frozen=True)
class Offline:
    """A method that generates nothing and learns from the pairs that the reward model has learned from.

    loss: that of step 2 (`--loss`), or `supervised`: that of step 1, on the chosen answers.   alpha: of R-DPO, reward
    for each token.   steps: of the optimizer, for 1000 tokens of an online run's, so that both last about as long.
    """

    loss: str
    steps: float
    alpha: float = 0.0


# A token's worth if the length alone had decided the preferences: the coefficient of a logistic regression of them.
LENGTH_ALPHA = 0.14
OFFLINE = {
    "sft_chosen": Offline("supervised", steps=6),
    "dpo": Offline("dpo", steps=5),
    "r_dpo": Offline("r-dpo", steps=5, alpha=LENGTH_ALPHA),
}
METHODS = (*ESTIMATORS, *OFFLINE)
TASKS = {"demo": 0.0, "uneven": 5.0}  # what the easiest kind of prompt adds to a reward, and the hardest takes off it


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    answers_per_step: generated for one optimizer step, greedy ones included, or read.   tokens: generated in a whole
    run.   kl: beta, reward per nat; k1 estimate, in the reward, full reach: the exact gradient of E[r] - beta * KL; DPO
    has the same beta.   evaluations: in a run, evenly spaced over its tokens, besides the one before it.
    unevenness: times the `ease` of a prompt, added to the reward of all its answers (see TASKS).
    """

    data: str
    actor: str
    reward: str
    cache: str
    answers_per_step: int = 32
    tokens: int = 24_000
    kl: float = 0.3
    evaluations: int = 5
    max_prompt: int = 48
    max_answer: int = 48
    data_split: str = "4,4,2"
    unevenness: float = 0.0


def make_algorithm(estimator: Estimator, kl: float) -> Algorithm:
    """One objective for all: no discount, no clip of the reward, a sum over the tokens, the exact KL penalty."""
    return build_algorithm(
        estimator.algorithm,
        kl=KLPenalty(kl, estimator="k1", where="reward", reach="full_step"),
        gamma=1.0,
        clip_reward_value=0.0,
        loss_aggregation="sequence",
        **({"samples_per_prompt": estimator.samples} if estimator.samples > 1 else {}),
        **estimator.settings,
    )


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        estimator: its name in `ESTIMATORS`, or in `OFFLINE`.
        rate: constant learning rate of the policy.
        critic_rate: that of PPO's critic.
        snapshots: whether the policy half-way and at the end is saved.
    """

    estimator: str
    seed: int
    rate: float
    critic_rate: float | None = None
    snapshots: bool = False

    @property
    def name(self) -> str:
        parts = [self.estimator, f"seed{self.seed}", f"lr{self.rate:g}"]
        return "-".join(parts + ([f"critic{self.critic_rate:g}"] if self.critic_rate else []))


class UnevenReward(Reward):
    """The reward model, with what the kind of a prompt adds: pairs of answers to one prompt leave that open."""

    def __init__(self, setting: Setting, tokenizer: PreTrainedTokenizerBase, engine: FrozenEngine):
        super().__init__(engine)
        self.unevenness, self.tokenizer = setting.unevenness, tokenizer

    def score(self, sequences: Sequences, forwards: int = 1) -> Tensor:
        scores = super().score(sequences, forwards)
        if not self.unevenness:
            return scores
        rows = zip(sequences.input_ids.tolist(), sequences.counts[0], strict=True)
        prompts = self.tokenizer.batch_decode(
            [ids[:length] for ids, length in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return scores + self.unevenness * torch.tensor([ease(prompt) for prompt in prompts])


def load_scorer(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    return load_reward_model(setting.reward, "the reward model", dtype=torch.float32, tokenizer=tokenizer)


def prompt_loaders(
    setting: Setting, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int, pairs: bool = False
) -> tuple[DataLoader, DataLoader]:
    """Training batches of so many rows, and held-out ones: prompts, or the pairs that step 2 learns from."""
    return build_loaders(
        DataConfig(data_path=[setting.data], data_split=setting.data_split, cache_dir=setting.cache, seed=seed),
        stage=1 if pairs else 2,
        tokenizer=tokenizer,
        max_len=setting.max_prompt + (setting.max_answer if pairs else 0),
        train_batch_size=rows,
        eval_batch_size=400,
    )


def batches_for_ever(loader: DataLoader) -> Iterator:
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def write_json(path: Path, record: dict) -> None:
    """As a whole or not at all: a killed run leaves no torn file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(path)
