"""What single answers' gradients and the gradient of all parameters vary by, at policies that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from experiment import (
    ESTIMATORS,
    Estimator,
    Setting,
    UnevenReward,
    batches_for_ever,
    load_scorer,
    make_algorithm,
    prompt_loaders,
    write_json,
)
from torch import Tensor

from remax.algorithms import Algorithm
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Prompts, Sequences
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Reference
from remax.generation.decoder import GenerationSettings
from remax.generation.rollout import rollout
from remax.models.loading import quiet_libraries
from remax.models.policy import load_policy
from remax.models.reward_model import RewardModel
from utils.data.batches import PromptBatch
from utils.distributed import set_seed
from utils.present import present
from utils.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Probe:
    """An estimator whose gradient is measured.

    shift: a constant added to the reward of every answer.   own_value: rewards are compared with the mean of further
    answers to the same prompt, to which the running value of a prompt tends (SPO, arXiv 2509.13232); their tokens are
    not counted.
    """

    estimator: str
    shift: float = 0.0
    fitted_critic: bool = True
    own_value: bool = False


SCALED = [name for name, e in ESTIMATORS.items() if e.algorithm == "grpo" or "advantage_scaling" in e.settings]
PROBES = {name: Probe(name) for name in ESTIMATORS if name not in (*SCALED, "ppo_4")} | {  # scaled: of another length
    "prompt's own value": Probe("reinforce", own_value=True),
    "ppo, critic as loaded": Probe("ppo", fitted_critic=False),
    "reinforce, reward + 2": Probe("reinforce", shift=2.0),
    "reinforce, reward - 2": Probe("reinforce", shift=-2.0),
    "reinforce_mean, reward + 2": Probe("reinforce_mean", shift=2.0),
    "remax, reward + 2": Probe("remax", shift=2.0),
    "calibrated, reward + 2": Probe("calibrated", shift=2.0),
}
SAMPLES = 4  # answers to each prompt, shared by all estimators
FURTHER = 8  # answers to each prompt for its own value


def units(estimator: Estimator, samples: int) -> list[slice]:
    """Rows of one prompt's `samples` answers that make one independent estimate each."""
    return [slice(i, i + estimator.samples) for i in range(0, samples, estimator.samples)]


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
        self.reward = UnevenReward(setting, self.tokenizer, FrozenEngine(load_scorer(setting, self.tokenizer), frozen))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def answer(self, batch: PromptBatch, samples: int, greedy: bool) -> tuple[Sequences, Sequences | None]:
        prompts = Prompts(batch.input_ids, batch.lengths)
        generation = GenerationSettings(self.setting.max_answer, self.pad_id)
        answers = rollout(self.model.hf, prompts, generation, samples=samples, greedy=greedy)
        return answers.sampled, answers.greedy

    @torch.no_grad()
    def score(self, sampled: Sequences, critic: RewardModel | None = None, greedy: Sequences | None = None) -> Rollout:
        """With the greedy answers, a row for each prompt, also what a calibrated baseline reads of them."""
        rollout = Rollout(
            sampled,
            self.reward.score(sampled),
            reference_logprobs=self.reference.logprobs(sampled),
            old_logprobs=self.model(sampled)[0],
            values=None if critic is None else critic(sampled, every_token=True),
        )
        if greedy is None:
            return rollout
        algorithm, times = make_algorithm(ESTIMATORS["calibrated"], self.setting.kl), len(sampled) // len(greedy)
        cost = algorithm.cost(self.model(greedy)[0], self.reference.logprobs(greedy), greedy.answer_mask)
        baseline = self.reward.score(greedy)
        return replace(
            rollout,
            baseline=baseline.repeat_interleave(times),
            greedy_cost=cost.repeat_interleave(times),
        )

    def gradient(self, algorithm: Algorithm, part: Rollout) -> Tensor:
        """(parameters,) of the loss of a prepared part: minus the estimate of the policy gradient."""
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


def settled(fixed: FixedPolicy, batches: Iterator[PromptBatch], rollouts: int) -> dict[str, Algorithm]:
    """By probe, the algorithms as earlier rollouts of this policy leave them."""
    found = {name: make_algorithm(ESTIMATORS[probe.estimator], fixed.setting.kl) for name, probe in PROBES.items()}
    for _ in range(rollouts):
        sampled, greedy = fixed.answer(next(batches), samples=SAMPLES, greedy=True)
        scored = fixed.score(sampled, greedy=greedy)
        for name, algorithm in found.items():
            if not algorithm.critic:
                algorithm.prepare(shifted(scored, PROBES[name], None))
    return found


def shifted(rollout: Rollout, probe: Probe, own_values: Tensor | None) -> Rollout:
    rewards = rollout.rewards + probe.shift
    if probe.own_value and own_values is not None:
        rewards = rewards - own_values
    return replace(rollout, rewards=rewards, baseline=present(rollout.baseline, "the greedy rewards") + probe.shift)


@dataclass
class Drawn:
    """A block of prompts with SAMPLES answers each: what all probes see.

    rollouts: by whether the critic was fitted.   own_values: (B,) of the prompts.   weights: (B, A), the squared length
    of each token's score with respect to its logits, 1 - 2 pi(y) + sum_v pi(v)^2.
    """

    rollouts: dict[bool, Rollout]
    greedy: Sequences
    own_values: Tensor
    weights: Tensor

    def of(self, probe: Probe) -> Rollout:
        return shifted(self.rollouts[probe.fitted_critic], probe, self.own_values)


@torch.no_grad()
def draw(fixed: FixedPolicy, critics: dict[bool, RewardModel], batch: PromptBatch) -> Drawn:
    sampled, greedy = fixed.answer(batch, samples=SAMPLES, greedy=True)
    further, _ = fixed.answer(batch, samples=FURTHER, greedy=False)
    own = fixed.reward.score(further).view(-1, FURTHER).mean(1).repeat_interleave(SAMPLES)
    logits = fixed.model.head(fixed.model.hidden(sampled).flatten(0, 1))  # (B * A, V)
    p = logits.softmax(-1)
    drawn = p.gather(1, sampled.answer_ids.flatten()[:, None])[:, 0]
    weights = (1 - 2 * drawn + p.square().sum(1)).view(sampled.answer_mask.shape) * sampled.answer_mask
    rollouts = {fitted: fixed.score(sampled, critic, present(greedy, "greedy")) for fitted, critic in critics.items()}
    return Drawn(rollouts, present(greedy, "greedy"), own, weights)


def prepared(algorithm: Algorithm, part: Rollout) -> Rollout:
    """As `prepare` has it, and the algorithm as it was before: later blocks are no later rollouts."""
    before = deepcopy(algorithm.state_dict())
    part = algorithm.prepare(part)
    algorithm.load_state_dict(before)
    return part


def probe_block(
    fixed: FixedPolicy, probes: dict[str, Probe], algorithms: dict[str, Algorithm], drawn: Drawn
) -> dict[str, Block]:
    """Every probe's block on the same answers: a gradient for each of its units."""
    size = sum(p.numel() for p in fixed.parameters)
    blocks = {}
    for name, probe in probes.items():
        estimator, algorithm, block = ESTIMATORS[probe.estimator], algorithms[name], Block(torch.zeros(size))
        whole = prepared(algorithm, drawn.of(probe))
        for prompt in range(len(drawn.greedy)):
            for rows in units(estimator, SAMPLES):
                part = whole.select(slice(prompt * SAMPLES + rows.start, prompt * SAMPLES + rows.stop))
                tokens = int(part.sequences.answer_lengths.sum())
                if algorithm.greedy:
                    tokens += int(drawn.greedy.answer_lengths[prompt])
                block.add(fixed.gradient(algorithm, part), tokens)
        blocks[name] = block
    return blocks


def noise_of_answers(algorithm: Algorithm, whole: Rollout, drawn: Drawn, estimator: Estimator) -> dict[str, float]:
    """Sums over a block's answers of sum_t w_t A_t^2 and of tokens, each with its share of the greedy answer."""
    whole = prepared(algorithm, whole)
    logprobs = present(whole.old_logprobs, "old log-probs").clone().requires_grad_()
    loss, _ = algorithm.loss(whole, PolicyOutput(logprobs), 1)  # its derivative by a log-prob is -A_t
    (advantages,) = torch.autograd.grad(loss, logprobs)
    tokens = int(whole.sequences.answer_lengths.sum())
    if algorithm.greedy:
        tokens += int(drawn.greedy.answer_lengths.sum()) * SAMPLES // estimator.samples
    return {
        "square": float((drawn.weights * advantages.square()).sum()),
        "tokens": tokens,
        "answers": len(whole),
    }


def measure_answers(
    path: Path, policy: str, setting: Setting, *, blocks: int = 20, prompts: int = 32, rollouts: int = 20, seed: int = 0
) -> None:
    """Writes to `path` {probes: {name: {square, tokens, answers, blocks: [..]}}}: the squared gradient of an answer.

    The gradient is that with respect to the logits, which needs no backward pass of the model. PPO is left out: its
    critic has to be fitted. A calibrated baseline has seen `rollouts` earlier rollouts of 32 prompts.
    """
    quiet_libraries()
    set_seed(seed)
    fixed = FixedPolicy(policy, setting)
    loader = prompt_loaders(setting, fixed.tokenizer, prompts, seed)[0]
    batches = batches_for_ever(loader)
    algorithms = settled(fixed, batches, rollouts)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(blocks):
        drawn = draw(fixed, {True: None}, next(batches))
        for name, probe in PROBES.items():
            if not (algorithms[name].critic or probe.shift):
                estimator = ESTIMATORS[probe.estimator]
                found.setdefault(name, []).append(noise_of_answers(algorithms[name], drawn.of(probe), drawn, estimator))
    coefficients = {
        name: a.calibration.coefficients() for name, a in algorithms.items() if name.startswith("calibrated")
    }
    write_json(path, {"coefficients": coefficients, "probes": found})


def measure_variance(
    path: Path,
    policy: str,
    setting: Setting,
    *,
    blocks: int = 16,
    prompts: int = 8,
    critic_steps: int = 30,
    critic_rate: float = 1e-3,
    rollouts: int = 10,
    seed: int = 0,
    probes: dict[str, Probe] = PROBES,
) -> None:
    """Writes to `path` {rewards, answers, probes: {name: {all: figures, without: [figures without block i, ..]}}}.

    blocks, prompts: so many independent blocks of so many prompts.   rollouts: earlier ones, for moving averages and
    calibrated baselines.   probes: with rloo_4, the unbiased reference.
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
    algorithms = settled(fixed, wide, rollouts)
    measured = [probe_block(fixed, probes, algorithms, draw(fixed, critics, next(batches))) for _ in range(blocks)]
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
