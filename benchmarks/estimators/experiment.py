"""The estimators that are compared, the reinforcement learning runs, and the gradient variance at fixed policies.

Everything goes through the library: its algorithms, its trainer, its engines (one rank, ZeRO-0, fp32). What is set here
is what makes the comparison fair: all estimators maximise one objective, E[r] - beta * KL, and each optimizer step is
paid with the same number of generated answers, the greedy ones included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from remax.algorithms import Algorithm, KLPenalty, build_algorithm
from remax.checkpoint.export import export
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Prompts, Sequences
from remax.demo.corpus import mean_true_reward
from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward, TrainedReward
from remax.evaluation.policy import evaluate_policy
from remax.generation.decoder import Answers, GenerationSettings
from remax.generation.rollout import rollout
from remax.models.loading import quiet_libraries
from remax.models.policy import load_policy
from remax.models.reward_model import RewardModel, load_reward_model
from remax.training.trainer import Trainer, TrainerSettings
from utils.data.batches import PromptBatch
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.distributed import init_distributed, set_seed
from utils.metrics import MetricsLogger
from utils.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Estimator:
    """algorithm, settings: of `remax.algorithms`.   answers: generated per prompt, the greedy one included."""

    algorithm: str
    answers: int
    settings: dict[str, float] = field(default_factory=dict)


ESTIMATORS = {
    "reinforce": Estimator("reinforce", 1),
    "reinforce_mean": Estimator("reinforce", 1, {"baseline_decay": 0.9}),
    "remax": Estimator("remax", 2),
    "rloo_2": Estimator("rloo", 2, {"samples_per_prompt": 2}),
    "rloo_4": Estimator("rloo", 4, {"samples_per_prompt": 4}),
    "ppo": Estimator("ppo", 1),
}


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    answers_per_step: generated for one optimizer step, greedy ones included.   tokens: generated in a whole run.
    kl: beta, reward per nat; k1 estimate, in the reward, full reach: the exact gradient of E[r] - beta * KL.
    evaluations: in a run, evenly spaced over its tokens, besides the one before it.
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


def make_algorithm(estimator: Estimator, kl: float, **more) -> Algorithm:
    """One objective for all: no discount, no clip of the reward, a sum over the tokens, the exact KL penalty."""
    return build_algorithm(
        estimator.algorithm,
        kl=KLPenalty(kl, estimator="k1", where="reward", reach="full_step"),
        gamma=1.0,
        clip_reward_value=0.0,
        loss_aggregation="sequence",
        **(estimator.settings | more),
    )


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        rate: constant learning rate of the policy.
        critic_rate: that of PPO's critic.
        epochs: PPO's passes over each rollout.
        snapshots: whether the policy half-way and at the end is saved.
    """

    estimator: str
    seed: int
    rate: float
    critic_rate: float | None = None
    epochs: int | None = None
    snapshots: bool = False

    @property
    def name(self) -> str:
        parts = [self.estimator, f"seed{self.seed}", f"lr{self.rate:g}"]
        parts += [f"critic{self.critic_rate:g}"] if self.critic_rate else []
        return "-".join(parts + ([f"epochs{self.epochs}"] if self.epochs else []))


class CountingActor(Actor):
    """An actor that counts the tokens it generates."""

    generated = 0

    def rollout(self, prompts: Prompts, **options) -> Answers:
        answers = super().rollout(prompts, **options)
        self.generated += sum(part.answer_tokens for part in (answers.sampled, answers.greedy) if part is not None)
        return answers


def load_scorer(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    return load_reward_model(setting.reward, "the reward model", dtype=torch.float32, tokenizer=tokenizer)


def prompt_loaders(setting: Setting, tokenizer: PreTrainedTokenizerBase, prompts: int, seed: int):
    return build_loaders(
        DataConfig(data_path=[setting.data], data_split=setting.data_split, cache_dir=setting.cache, seed=seed),
        stage=2,
        tokenizer=tokenizer,
        max_len=setting.max_prompt,
        train_batch_size=prompts,
        eval_batch_size=400,
    )


def batches_for_ever(loader) -> Iterator[PromptBatch]:
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def build_trainer(
    run: Run, setting: Setting, folder: Path
) -> tuple[Trainer, Iterator[PromptBatch], PreTrainedTokenizerBase]:
    """-> trainer, endless batches of prompts, tokenizer. The trainer's `measure` gives the figures alone."""
    estimator = ESTIMATORS[run.estimator]
    tokenizer = load_tokenizer(setting.actor)
    prompts = setting.answers_per_step // estimator.answers
    train_loader, held_out = prompt_loaders(setting, tokenizer, prompts, run.seed)
    held_out = list(held_out)
    engine = EngineConfig(zero_stage=0, dtype="fp32", micro_batch_size=setting.answers_per_step)

    def policy():
        return load_policy(setting.actor, "the policy", dtype=torch.float32, tokenizer=tokenizer)

    def optimizer(rate: float) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=rate, total_steps=1, schedule="constant")

    actor = CountingActor(
        TrainedEngine(policy(), engine, optimizer(run.rate)),
        generation=GenerationSettings(setting.max_answer, tokenizer.pad_token_id),
    )
    reference = Reference(FrozenEngine(policy(), engine))
    reward = Reward(FrozenEngine(load_scorer(setting, tokenizer), engine))
    algorithm = make_algorithm(estimator, setting.kl, epochs=run.epochs)
    critic = None
    if algorithm.critic:
        critic = TrainedReward(TrainedEngine(load_scorer(setting, tokenizer), engine, optimizer(run.critic_rate)))

    def evaluate() -> dict[str, float]:
        evaluation = evaluate_policy(actor, reference, reward, held_out, tokenizer)
        prompts, answers = zip(*((row["prompt"], row["answer"]) for row in evaluation.answers), strict=True)
        true = mean_true_reward(prompts, answers)
        return {"true_reward": true.mean} | evaluation.figures

    trainer = Trainer(
        actor,
        reference,
        reward,
        algorithm,
        TrainerSettings(micro_batch_size=setting.answers_per_step),
        measure=evaluate,
        metrics=MetricsLogger(folder, tensorboard_dir=None, console_every=10**9, drop_after=-1),
        pad_id=tokenizer.pad_token_id,
        critic=critic,
    )
    return trainer, batches_for_ever(train_loader), tokenizer


def train(path: Path, run: Run, setting: Setting) -> None:
    """Trains and writes the record {run, points} to `path`.

    points: held-out figures after so many generated tokens, wall-clock seconds and CPU seconds of training (evaluation
    not counted). A process of one thread takes its CPU seconds of wall-clock on a core of its own.
    """
    folder = path.parent
    quiet_libraries()
    init_distributed()
    set_seed(run.seed)
    trainer, batches, tokenizer = build_trainer(run, setting, folder)
    spent = {"tokens": 0, "steps": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    points = [spent | trainer.measure()]
    for mark in range(1, setting.evaluations + 1):
        while spent["tokens"] < setting.tokens * mark / setting.evaluations:
            batch, before = next(batches), trainer.actor.generated
            wall, cpu = time.perf_counter(), time.process_time()
            _, figures = trainer.step([batch])
            spent["seconds"] += time.perf_counter() - wall
            spent["cpu_seconds"] += time.process_time() - cpu
            spent["tokens"] += trainer.actor.generated - before
            spent["steps"] += 1
            trainer.metrics.log(spent["steps"], figures | {f"spent/{k}": v for k, v in spent.items()})
        points.append(spent | trainer.measure())
        snapshot = {max(1, setting.evaluations // 2): "policy_half", setting.evaluations: "policy_end"}.get(mark)
        if run.snapshots and snapshot:
            export(trainer.actor.model, tokenizer, folder / snapshot, zero3=False)
    trainer.metrics.close()
    write_json(path, {"run": asdict(run), "points": points})


def write_json(path: Path, record: dict) -> None:
    """As a whole or not at all: a killed run leaves no torn file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(path)


# ------------------------------------------------------------------------------------------------- gradient variance


@dataclass(frozen=True)
class Probe:
    """An estimator whose gradient is measured. shift: a constant added to the reward of every answer."""

    estimator: str
    shift: float = 0.0
    fitted_critic: bool = True


PROBES = {name: Probe(name) for name in ESTIMATORS} | {
    "ppo, critic as loaded": Probe("ppo", fitted_critic=False),
    "reinforce, reward + 2": Probe("reinforce", shift=2.0),
    "reinforce, reward - 2": Probe("reinforce", shift=-2.0),
    "reinforce_mean, reward + 2": Probe("reinforce_mean", shift=2.0),
    "remax, reward + 2": Probe("remax", shift=2.0),
}
SAMPLES = 4  # answers to each prompt, shared by all estimators


def units(estimator: Estimator, samples: int) -> list[slice]:
    """Rows of one prompt's `samples` answers that make one independent estimate each."""
    size = estimator.settings.get("samples_per_prompt", 1)
    return [slice(i, i + size) for i in range(0, samples, size)]


class FixedPolicy:
    """A policy that stays as it is, with what scores its answers."""

    def __init__(self, policy: str, setting: Setting):
        self.setting = setting
        self.tokenizer = load_tokenizer(policy)
        self.pad_id = self.tokenizer.pad_token_id
        frozen = EngineConfig(zero_stage=0, dtype="fp32")

        def load(name: str):
            return load_policy(name, "the policy", dtype=torch.float32, tokenizer=self.tokenizer)

        self.model = load(policy).eval()
        self.reference = Reference(FrozenEngine(load(setting.actor), frozen))
        self.reward = Reward(FrozenEngine(load_scorer(setting, self.tokenizer), frozen))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def answer(self, batch: PromptBatch, samples: int, greedy: bool) -> tuple[Sequences, Sequences | None]:
        prompts = Prompts(batch.input_ids, batch.lengths)
        generation = GenerationSettings(self.setting.max_answer, self.pad_id)
        answers = rollout(self.model.hf, prompts, generation, samples=samples, greedy=greedy)
        return answers.sampled, answers.greedy

    @torch.no_grad()
    def score(self, sampled: Sequences, critic: RewardModel) -> Rollout:
        return Rollout(
            sampled,
            self.reward.score(sampled),
            reference_logprobs=self.reference.logprobs(sampled),
            old_logprobs=self.model(sampled)[0],
            values=critic(sampled, every_token=True),
        )

    def gradient(self, algorithm: Algorithm, part: Rollout) -> Tensor:
        """(parameters,) of the loss: minus the estimate of the policy gradient."""
        part = algorithm.prepare(part)
        logprobs = self.model(part.sequences)[0]
        loss, _ = algorithm.loss(part, PolicyOutput(logprobs), len(part))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])


def fit_critic(fixed: FixedPolicy, batches: Iterator[PromptBatch], steps: int, rate: float) -> RewardModel:
    """The reward model, turned into the fixed policy's critic by PPO's own value loss."""
    critic = load_scorer(fixed.setting, fixed.tokenizer)
    algorithm = make_algorithm(ESTIMATORS["ppo"], fixed.setting.kl)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(steps):
        sampled, _ = fixed.answer(next(batches), samples=1, greedy=False)
        batch = algorithm.prepare(fixed.score(sampled, critic))
        loss, _ = algorithm.value_loss(batch, critic(sampled, every_token=True), len(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
    return critic.requires_grad_(False)


@torch.no_grad()
def reward_figures(fixed: FixedPolicy, batches: list[PromptBatch]) -> dict[str, float]:
    """What a baseline has to guess.

    Mean of the rewards, their spread among the answers to one prompt and among prompts (of the prompts' own means,
    without what the few answers add to it), mean of the greedy answers, mean KL.
    """
    drawn = [fixed.answer(batch, samples=SAMPLES, greedy=True) for batch in batches]
    groups = torch.cat([fixed.reward.score(sampled) for sampled, _ in drawn]).view(-1, SAMPLES)  # (prompts, SAMPLES)
    greedy = torch.cat([fixed.reward.score(greedy) for _, greedy in drawn])
    kl = torch.cat([(fixed.model(s)[0] - fixed.reference.logprobs(s)).sum(1) for s, _ in drawn])  # 0 behind answers
    within = groups.var(1).mean()
    among = (groups.mean(1).var() - within / SAMPLES).clamp(min=0.0)
    figures = {"mean": groups.mean(), "within": within.sqrt(), "among": among.sqrt(), "greedy": greedy.mean()}
    return {name: float(value) for name, value in (figures | {"kl": kl.mean()}).items()}


@dataclass
class Block:
    """Sums over the units of one block of prompts: how many, their tokens, their gradients and squared norms."""

    gradient: Tensor
    units: int = 0
    tokens: int = 0
    squares: float = 0.0

    def add(self, gradient: Tensor, tokens: int) -> None:
        self.gradient += gradient
        self.squares += float(gradient.double().square().sum())
        self.tokens += tokens
        self.units += 1


def probe_block(
    fixed: FixedPolicy, probes: dict[str, Probe], critics: dict[bool, RewardModel], batch: PromptBatch, mean: float
) -> dict[str, Block]:
    """Every probe's block on the same answers. mean: the policy's mean reward, for the moving average."""
    sampled, greedy = fixed.answer(batch, samples=SAMPLES, greedy=True)
    rollouts = {fitted: fixed.score(sampled, critic) for fitted, critic in critics.items()}
    baseline = fixed.reward.score(greedy).repeat_interleave(SAMPLES)  # (B * SAMPLES,)
    size = sum(p.numel() for p in fixed.parameters)
    blocks = {}
    for name, probe in probes.items():
        estimator = ESTIMATORS[probe.estimator]
        algorithm, block = make_algorithm(estimator, fixed.setting.kl), Block(torch.zeros(size))
        whole = rollouts[probe.fitted_critic]
        whole = replace(whole, rewards=whole.rewards + probe.shift, baseline=baseline + probe.shift)
        for prompt in range(len(batch)):
            for rows in units(estimator, SAMPLES):
                part = whole.select(slice(prompt * SAMPLES + rows.start, prompt * SAMPLES + rows.stop))
                tokens = int(part.sequences.answer_lengths.sum())
                if algorithm.greedy:
                    tokens += int(greedy.answer_lengths[prompt])
                if estimator.settings.get("baseline_decay"):
                    algorithm.load_state_dict(algorithm.state_dict() | {"moving_average": mean + probe.shift})
                block.add(fixed.gradient(algorithm, part), tokens)
        blocks[name] = block
    return blocks


def measure_variance(
    path: Path,
    policy: str,
    setting: Setting,
    *,
    blocks: int = 16,
    prompts: int = 8,
    critic_steps: int = 30,
    critic_rate: float = 1e-3,
    seed: int = 0,
    probes: dict[str, Probe] = PROBES,
) -> None:
    """Writes to `path` {rewards, answers, probes: {name: {all: figures, without: [figures without block i, ..]}}}.

    blocks, prompts: so many independent blocks of so many prompts.   probes: with rloo_4, the unbiased reference.
    """
    quiet_libraries()
    set_seed(seed)
    fixed = FixedPolicy(policy, setting)
    batches = batches_for_ever(prompt_loaders(setting, fixed.tokenizer, prompts, seed)[0])
    wide = batches_for_ever(prompt_loaders(setting, fixed.tokenizer, 2 * setting.answers_per_step, seed + 1)[0])
    critics = {
        True: fit_critic(fixed, wide, critic_steps, critic_rate),
        False: load_scorer(setting, fixed.tokenizer).requires_grad_(False),
    }
    rewards = reward_figures(fixed, [next(wide) for _ in range(4)])
    mean = rewards["mean"]
    measured = [probe_block(fixed, probes, critics, next(batches), mean) for _ in range(blocks)]
    figures = {}
    for name in probes:
        pairs = [(block[name], block["rloo_4"]) for block in measured]
        without = [compare(pairs[:i] + pairs[i + 1 :]) for i in range(blocks)]
        figures[name] = {"all": compare(pairs), "without": without}
    write_json(path, {"rewards": rewards, "answers": blocks * prompts * SAMPLES, "probes": figures})


def cross_product(a: list[Block], b: list[Block]) -> float:
    """E g_a . E g_b, from products of different blocks, whose noise is independent: unbiased."""
    x, y = (torch.stack([block.gradient / block.units for block in blocks]).double() for blocks in (a, b))
    products = x @ y.T  # (blocks, blocks)
    return float((products.sum() - products.trace()) / (len(a) * (len(a) - 1)))


def compare(pairs: list[tuple[Block, Block]]) -> dict[str, float]:
    """Blocks of an estimator, each with that of an unbiased estimator on the same answers -> figures.

    unit_variance   E|g|^2 - |E g|^2, the trace of the covariance of the estimate from one unit
    variance        of the mean gradient of 1000 generated tokens: unit_variance * tokens per unit / 1000
    signal          |E g|^2 of the unbiased estimator
    cosine          between the two expected gradients; 0 where a squared norm comes out negative, hidden by noise
    """
    own, exact = map(list, zip(*pairs, strict=True))
    units, tokens = sum(b.units for b in own), sum(b.tokens for b in own)
    norm, signal = cross_product(own, own), cross_product(exact, exact)
    unit_variance = sum(b.squares for b in own) / units - norm
    scale = (max(norm, 0.0) * max(signal, 0.0)) ** 0.5
    return {
        "unit_variance": unit_variance,
        "tokens_per_unit": tokens / units,
        "variance": unit_variance * tokens / units / 1000,
        "signal": signal,
        "cosine": cross_product(own, exact) / scale if scale else 0.0,
    }
