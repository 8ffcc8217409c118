"""Proof by enumeration: the expected gradient estimate of every algorithm is the exact gradient of the objective its
docstring states.

A causal language model of 5 words answers two prompts with at most 3 tokens. All its answers are listed; each one's
gradient estimate, weighted with its probability and added up, must equal autograd through the written-out objective, in
float64 to 1e-9. The estimates go the way of training (left-padded prompts, batches padded with EOS, chunked log-probs);
the objectives are computed one unpadded row at a time with nothing but log_softmax, and truncation from its definition.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from remax.algorithms.calibration import PAPER, token_weights
from remax.algorithms.grpo import GRPO
from remax.algorithms.inpo import INPO
from remax.algorithms.kl import ESTIMATORS, REACHES, WHERE, KLPenalty
from remax.algorithms.ppo import PPO
from remax.algorithms.raft import RAFT, SuperHF
from remax.algorithms.reinforce import Reinforce
from remax.algorithms.remax import ReMax
from remax.algorithms.rloo import RLOO
from remax.core.logprobs import PolicyOutput, token_stats
from remax.core.rollout import Rollout
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from utils.present import present

EOS = 0  # also the padding
BETA = 0.3
NO_KL = KLPenalty(0.0)
SAMPLINGS = [Sampling(), Sampling(temperature=0.6), Sampling(top_p=0.8), Sampling(temperature=1.4, top_p=0.75, top_k=4)]


class TinyLM(nn.Module):
    """One causal attention layer over token and position embeddings; `hidden` (B, T, H), `head` (n, H) -> (n, V)."""

    def __init__(self, vocabulary: int, seed: int, scale: float = 1.0, width: int = 4, positions: int = 8):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.tokens, self.positions = weight(vocabulary, width), weight(positions, width)
        self.query, self.key, self.value = weight(width, width), weight(width, width), weight(width, width)
        self.output = weight(vocabulary, width)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tokens[ids] + self.positions[: ids.shape[1]]
        scores = (x @ self.query) @ (x @ self.key).transpose(1, 2) / x.shape[-1] ** 0.5
        future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        attention = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.tanh(x + attention @ (x @ self.value))

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.output.T


def truncated(logits: Tensor, sampling: Sampling) -> Tensor:
    """(V,) logits -> (V,) log-probs of what is sampled, by definition: the k best, then the fewest with top_p."""
    logits = logits / sampling.temperature
    order = logits.argsort(descending=True).tolist()
    if sampling.top_k:
        order = order[: sampling.top_k]
    kept, mass = [], 0.0
    probabilities = logits[order].softmax(0).tolist()
    for word, p in zip(order, probabilities, strict=True):
        if mass >= sampling.top_p:
            break
        kept, mass = [*kept, word], mass + p
    drop = torch.ones(len(logits), dtype=torch.bool)
    drop[kept] = False
    return logits.masked_fill(drop, -torch.inf).log_softmax(0)


@dataclass
class World:
    """All answers of positive probability, a row each; exact tables (N, A), zero behind an answer, with gradient."""

    policy: TinyLM
    reference: TinyLM
    sampling: Sampling
    prompts: int
    prompt_of: list[int]
    answers: list[tuple[int, ...]]
    sequences: Sequences
    rewards: Tensor  # (N,)
    greedy_rewards: Tensor  # (N,) of the prompt's greedy answer
    greedy_row: list[int]  # (N,) where that stands
    logq: Tensor
    k1: Tensor
    kl: Tensor  # sum_v q log(q / rho)
    reverse_kl: Tensor  # sum_v rho log(rho / q) over the kept words
    expected_k2: Tensor  # sum_v q k1^2 / 2
    expected_k3: Tensor  # sum_v q (rho/q - 1 + k1)
    expected_bregman: Tensor  # sum_v q (q/rho - 1 - k1)
    half_chi2: Tensor  # sum_v (q - rho)^2 / rho / 2
    js: Tensor  # sum_v (q log(q/m) + rho log(rho/m)) / 2 over the kept words, m = (q + rho)/2
    js_pull: Tensor  # sum_v rho G(q/rho), see kl.py
    expected_clamped_js: Tensor  # sum_v q (max(0, log(q/m)) + max(0, log(rho/m))) / 2
    clamped_js_pull: Tensor  # sum_v (max(0, rho - q) - rho log(rho/m)) / 2
    entropy: Tensor
    score_square: Tensor  # |grad log q(y_t)|^2 with respect to the logits of t: 1 - 2 q(y_t) + sum_v q(v)^2

    @property
    def probability(self) -> Tensor:  # (N,) of the answer, with gradient
        return self.logq.sum(1).exp()

    @property
    def fixed(self) -> Tensor:  # (N,) the same without gradient: states are held
        return self.probability.detach()

    def costs(self, estimator: str) -> Tensor:
        w = self.k1.exp()  # q/rho; 1 behind an answer, where all costs are 0
        above = [(2 * w / (1 + w)).log(), (2 / (1 + w)).log()]  # log(q/m), log(rho/m)
        return {
            "k1": self.k1,
            "k2": self.k1**2 / 2,
            "k3": 1 / w - 1 + self.k1,
            "bregman": w - 1 - self.k1,
            "js": (above[0] + above[1] / w) / 2,
            "clamped_js": (above[0].clamp(min=0) + above[1].clamp(min=0)) / 2,
            "full": self.kl,
        }[estimator]

    def expected_costs(self, estimator: str) -> Tensor:
        """E_{y_t ~ q}[c_t | s_t] over the vocabulary."""
        return {
            "k1": self.kl,
            "k2": self.expected_k2,
            "k3": self.expected_k3,
            "bregman": self.expected_bregman,
            "js": self.js,
            "clamped_js": self.expected_clamped_js,
            "full": self.kl,
        }[estimator]

    def pull(self, estimator: str) -> Tensor:
        """D_t of kl.py: its gradient is E_{y_t ~ q}[grad c_t | s_t]."""
        return {
            "k2": self.kl,
            "k3": self.reverse_kl,
            "bregman": self.half_chi2,
            "js": self.js_pull,
            "clamped_js": self.clamped_js_pull,
            "full": self.kl,
        }[estimator]

    def gradient(self, objective: Tensor) -> Tensor:
        grads = torch.autograd.grad(objective / self.prompts, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in grads])


PROMPTS = [(3, 1), (2, EOS, 4, 1)]  # of different lengths; the second holds an EOS


@cache
def world(sampling: Sampling = SAMPLINGS[0], vocabulary: int = 5, length: int = 3) -> World:
    policy, reference = TinyLM(vocabulary, seed=1), TinyLM(vocabulary, seed=2, scale=0.7)
    prompts = [tuple(word % vocabulary for word in prompt) for prompt in PROMPTS]
    all_answers = sorted({cut(answer) for answer in product(range(vocabulary), repeat=length)})
    noise = torch.Generator().manual_seed(3)

    rows, tables, rewards, greedy_rewards = [], defaultdict(list), [], []
    for i, prompt in enumerate(prompts):
        reward = dict(zip(all_answers, torch.randn(len(all_answers), generator=noise).double().tolist(), strict=True))
        greedy = greedy_answer(policy, prompt, length)
        for answer in all_answers:
            steps = exact_steps(policy, reference, prompt, answer, sampling)
            if steps["logq"].isinf().any():
                continue  # never drawn
            rows.append((i, answer))
            rewards.append(2.0 + reward[answer])  # far from zero, so that a lost baseline shows
            greedy_rewards.append(2.0 + reward[greedy])
            for name, values in steps.items():
                tables[name].append(nn.functional.pad(values, (0, length - len(values))))

    width = max(len(prompt) for prompt in prompts)
    padded = [(EOS,) * (width - len(prompts[i])) + prompts[i] for i, _ in rows]
    generated = [answer + (EOS,) * (length - len(answer)) for _, answer in rows]
    lengths = torch.tensor([len(prompts[i]) for i, _ in rows])
    sequences = Sequences.from_generation(
        Prompts(torch.tensor(padded), lengths), torch.tensor(generated), [EOS], pad_id=EOS
    )
    assert sequences.answer_lengths.tolist() == [len(answer) for _, answer in rows]
    return World(
        policy,
        reference,
        sampling,
        len(prompts),
        [i for i, _ in rows],
        [answer for _, answer in rows],
        sequences,
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(greedy_rewards, dtype=torch.float64),
        [rows.index((i, greedy_answer(policy, prompts[i], length))) for i, _ in rows],
        **{name: torch.stack(values) for name, values in tables.items()},
    )


def cut(answer: tuple[int, ...]) -> tuple[int, ...]:
    return answer[: answer.index(EOS) + 1] if EOS in answer else answer


@torch.no_grad()
def greedy_answer(policy: TinyLM, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    answer: tuple[int, ...] = ()
    while len(answer) < length and EOS not in answer:
        logits = policy.head(policy.hidden(torch.tensor([prompt + answer]))[0, -1])
        answer += (int(logits.argmax()),)
    return answer


def exact_steps(
    policy: TinyLM, reference: TinyLM, prompt: tuple[int, ...], answer: tuple[int, ...], sampling: Sampling
) -> dict[str, Tensor]:
    """One unpadded row -> per token of the answer, (T,): the tables of `World`."""
    ids, steps = torch.tensor([prompt + answer]), defaultdict(list)
    logits = policy.head(policy.hidden(ids)[0])
    with torch.no_grad():
        reference_logits = reference.head(reference.hidden(ids)[0])
    for t, word in enumerate(answer, start=len(prompt) - 1):
        logq = truncated(logits[t], sampling)  # (V,)
        logrho = (reference_logits[t] / sampling.temperature).log_softmax(0)
        kept = ~logq.isinf()
        q, rho, k1 = logq[kept].exp(), logrho[kept].exp(), logq[kept] - logrho[kept]
        steps["logq"].append(logq[word])
        steps["k1"].append(logq[word] - logrho[word])
        steps["kl"].append((q * k1).sum())
        steps["reverse_kl"].append(-(rho * k1).sum())
        steps["expected_k2"].append((q * k1**2).sum() / 2)
        steps["expected_k3"].append((rho - q + q * k1).sum())
        m = (q + rho) / 2
        q_above, rho_above = (q / m).log(), (rho / m).log()
        steps["expected_bregman"].append((q * (q / rho - 1 - k1)).sum())
        steps["half_chi2"].append(((q - rho) ** 2 / rho).sum() / 2)
        steps["js"].append((q * q_above + rho * rho_above).sum() / 2)
        steps["js_pull"].append((rho * dilogarithm(k1)).sum())
        steps["expected_clamped_js"].append((q * (q_above.clamp(min=0) + rho_above.clamp(min=0))).sum() / 2)
        steps["clamped_js_pull"].append(((rho - q).clamp(min=0) - rho * rho_above).sum() / 2)
        steps["entropy"].append(-(q * logq[kept]).sum())
        steps["score_square"].append(1 - 2 * logq[word].detach().exp() + q.detach().square().sum())
    return {name: torch.stack(values) for name, values in steps.items()}


def dilogarithm(log_w: Tensor) -> Tensor:
    """G(w) = integral from 1 to w of log((1 + x) / 2) / (2 x) dx; with x = exp(u) that of log((1 + e^u) / 2) / 2 du."""
    nodes, weights = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(48))  # on (-1, 1)
    u = log_w[:, None] * (nodes + 1) / 2
    return ((((1 + u.exp()) / 2).log() / 2) * weights).sum(1) * log_w / 2


def forward(model: TinyLM, sequences: Sequences, sampling: Sampling, reference: TinyLM | None = None) -> PolicyOutput:
    """As in training: one padded batch, answer tokens only, in chunks."""
    mask = sequences.answer_mask
    logprob, entropy, kl = token_stats(
        sequences.at(model.hidden(sequences.input_ids), sequences.predictor_columns)[mask],
        model.head,
        sequences.answer_ids[mask],
        chunks=4,
        sampling=sampling,
        entropy=True,
        stats_grad=reference is not None,
        reference_hidden=None
        if reference is None
        else sequences.at(reference.hidden(sequences.input_ids), sequences.predictor_columns)[mask],
        reference_head=None if reference is None else reference.head,
    )
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    return PolicyOutput(*(zeros.masked_scatter(mask, x) for x in (logprob, entropy, kl)))


@cache
def outputs(w_key: tuple, replay: bool = True) -> tuple[PolicyOutput, Tensor]:
    w = world(*w_key)
    output = forward(w.policy, w.sequences, w.sampling if replay else Sampling(), w.reference)
    reference = forward(w.reference, w.sequences, w.sampling.without_truncation()).logprobs.detach()
    return output, reference


def expected_estimate(
    algorithm, w_key: tuple, *, groups: Tensor | None = None, values: Tensor | None = None, replay: bool = True
) -> Tensor:
    """Sum over all answers, or all groups of answers (G, k), of probability * gradient estimate (the step a trainer
    would take).

    The loss is a sum over rows, so its derivative by each row's outputs can be weighted before it runs through the
    model, once for all.
    """
    w = world(*w_key)
    output, reference = outputs(w_key, replay)
    groups = torch.arange(len(w.rewards))[:, None] if groups is None else groups
    prepared = algorithm.prepare(drawn(algorithm, w_key, groups.flatten(), values=values, replay=replay))
    numbers = torch.arange(groups.numel())
    rollout = algorithm.learned(replace(prepared, greedy_cost=numbers))  # which nothing reads any more
    kept = present(rollout.greedy_cost, "the numbers of the rows")
    rows = groups.flatten()[kept]
    leaf = PolicyOutput(*(x.detach()[rows].requires_grad_() for x in (output.logprobs, output.entropy, output.full_kl)))
    loss, _ = algorithm.loss(rollout, leaf, denominator=1 if algorithm.kept else groups.shape[1])
    leaves = (leaf.logprobs, leaf.entropy, leaf.full_kl)
    by_row = torch.autograd.grad(loss, leaves, allow_unused=True)
    weight = w.fixed[groups].prod(1)[kept // groups.shape[1], None]  # (rows, 1)
    total = sum(
        (weight * grad * x[rows]).sum()
        for grad, x in zip(by_row, (output.logprobs, output.entropy, output.full_kl), strict=True)
        if grad is not None
    )
    return -w.gradient(total)


def drawn(algorithm, w_key: tuple, rows: Tensor, *, values: Tensor | None = None, replay: bool = True) -> Rollout:
    """Some of the answers, scored, with what the algorithm asks for."""
    w = world(*w_key)
    output, reference = outputs(w_key, replay)
    logprobs, cost = output.logprobs.detach(), None
    if algorithm.needs_greedy_cost:
        greedy = torch.tensor(w.greedy_row)
        cost = algorithm.cost(logprobs[greedy], reference[greedy], w.sequences.answer_mask[greedy])[rows]
    return Rollout(
        w.sequences.select(rows),
        w.rewards[rows],
        w.greedy_rewards[rows] if algorithm.greedy else None,
        reference[rows],
        old_logprobs=logprobs[rows] if algorithm.needs_old_logprobs else None,
        values=values[rows] if values is not None else None,
        greedy_cost=cost,
    )


def all_groups(w: World, k: int) -> Tensor:
    """(G, k) row numbers: every k answers to one prompt, in every order."""
    groups = []
    for i in range(w.prompts):
        rows = [row for row, prompt in enumerate(w.prompt_of) if prompt == i]
        groups += list(product(rows, repeat=k))
    return torch.tensor(groups)


def key(sampling: Sampling = SAMPLINGS[0], vocabulary: int = 5, length: int = 3) -> tuple:
    return (sampling, vocabulary, length)


def close(a: Tensor, b: Tensor) -> bool:
    assert b.norm() > 1e-3, "a zero gradient proves nothing"
    return bool((a - b).abs().max() < 1e-9)


@pytest.fixture(params=SAMPLINGS, ids=lambda s: f"T{s.temperature}-p{s.top_p}-k{s.top_k}")
def w_key(request) -> tuple:
    return key(request.param)


# ---- the world itself


def test_world_has_all_kinds_of_answers():
    w = world()
    assert len(w.answers) == 2 * (1 + 4 + 16 * 5)
    assert {len(answer) for answer in w.answers} == {1, 2, 3}
    assert any(EOS not in answer for answer in w.answers)  # never ends
    assert len({len(w.sequences.input_ids[i][:n]) for i, n in enumerate(w.sequences.prompt_lengths.tolist())}) == 2


def test_probabilities_sum_to_one_and_replay_gives_the_log_probs_of_the_sampling_distribution(w_key):
    w = world(*w_key)
    output, _ = outputs(w_key)
    assert w.fixed.sum().item() == pytest.approx(2.0, abs=1e-12)  # one per prompt
    for table, x in [(w.logq, output.logprobs), (w.entropy, output.entropy), (w.kl, output.full_kl)]:
        assert (table - x).abs().max() < 1e-12


def test_the_objectives_agree_with_each_other():
    w = world()
    by_answer = (w.probability * w.k1.sum(1)).sum()  # KL of whole answers
    by_step = (w.probability * w.kl.sum(1)).sum()  # chain rule of the KL
    assert by_answer.item() == pytest.approx(by_step.item(), abs=1e-12)
    assert close(w.gradient(by_answer), w.gradient(by_step))


# ---- one answer a prompt


def single_answer_algorithms(**settings):
    settings = {"gamma": 1.0, **settings}
    yield Reinforce(clip_on="difference", **settings)
    averaged = Reinforce(baseline_decay=0.9, **settings)
    averaged.moving_average = 1.7
    yield averaged
    yield ReMax(**settings)


@pytest.mark.parametrize("name", ["reinforce", "moving average", "remax"])
def test_no_kl_is_the_gradient_of_the_expected_reward(w_key, name):
    settings = {"kl": NO_KL, "clip_reward_value": 0.0}
    algorithm = dict(zip(["reinforce", "moving average", "remax"], single_answer_algorithms(**settings), strict=True))[
        name
    ]
    w = world(*w_key)
    assert close(expected_estimate(algorithm, w_key), w.gradient((w.probability * w.rewards).sum()))


def penalties() -> list[KLPenalty]:
    refused = [("k1", "loss", "one_step"), ("k1", "loss", "full_step"), ("full", "reward", "one_step")]
    every = [choice for choice in product(ESTIMATORS, WHERE, REACHES) if choice not in refused]
    return [KLPenalty(BETA, *choice) for choice in every]


def stated_objective(w: World, kl: KLPenalty) -> Tensor:
    """Row by row the table at the top of kl.py; `fixed` holds the states."""
    c = w.costs(kl.estimator).sum(1)  # (N,)
    reward = (w.probability * w.rewards).sum()
    exact = reward - BETA * (w.probability * c).sum()
    local = BETA * (w.fixed * c).sum()  # its gradient is beta E[sum_t grad c_t]
    if kl.where == "loss" and kl.reach == "full_step":
        return exact
    if kl.where == "loss":
        return reward - BETA * (w.fixed * w.pull(kl.estimator).sum(1)).sum()
    if kl.reach == "full_step":
        return exact + local
    return reward - BETA * (w.fixed * w.expected_costs(kl.estimator).sum(1)).sum() + local


@pytest.mark.parametrize("kl", penalties(), ids=lambda kl: f"{kl.estimator}-{kl.where}-{kl.reach}")
def test_every_kl_penalty_estimates_what_its_table_says(w_key, kl):
    w = world(*w_key)
    algorithm = ReMax(gamma=1.0, kl=replace(kl), clip_reward_value=0.0)
    assert close(expected_estimate(algorithm, w_key), w.gradient(stated_objective(w, kl)))


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_full_step_is_the_exact_kl_regularised_gradient(w_key, estimator):
    w = world(*w_key)
    kl = KLPenalty(BETA, estimator, "reward" if estimator == "k1" else "loss", "full_step")
    assert w.sampling.truncates or (w.expected_k3 - w.kl).abs().max() < 1e-12  # k3 only is off under truncation
    cost = w.expected_k3 if estimator == "k3" else w.kl
    exact = w.gradient((w.probability * (w.rewards - BETA * cost.sum(1))).sum())
    assert close(expected_estimate(ReMax(gamma=1.0, kl=kl, clip_reward_value=0.0), w_key), exact)


@pytest.mark.parametrize("estimator", ["bregman", "js"])
def test_full_step_is_the_exact_gradient_of_other_divergences(w_key, estimator):
    # E[R] - beta E[ sum_t JS_t ], and E[R] - beta E[ sum_t chi2_t - KL_t ], which rho's other words leave alone: with K
    # the kept ones sum_K (q - rho)^2 / rho = sum_K q^2 / rho - 2 + rho(K), and chi2 adds their mass, 1 - rho(K).
    w = world(*w_key)
    kl = KLPenalty(BETA, estimator, "loss", "full_step")
    outside = w.kl - w.expected_k3  # rho's mass outside of the kept words
    divergence = w.js if estimator == "js" else 2 * w.half_chi2 + outside - w.kl
    assert w.sampling.truncates or outside.abs().max() < 1e-12
    exact = w.gradient((w.probability * (w.rewards - BETA * divergence.sum(1))).sum())
    assert close(expected_estimate(ReMax(gamma=1.0, kl=kl, clip_reward_value=0.0), w_key), exact)


def test_k1_one_step_is_not_the_exact_gradient():
    w = world()
    exact = w.gradient((w.probability * (w.rewards - BETA * w.k1.sum(1))).sum())
    one_step = expected_estimate(ReMax(gamma=1.0, kl=KLPenalty(BETA, reach="one_step"), clip_reward_value=0.0), key())
    assert (one_step - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("estimator, where", [(e, "reward" if e == "k1" else "loss") for e in ESTIMATORS])
def test_normalized_full_step_is_exact_for_the_mean_over_the_answer(w_key, estimator, where):
    # J = E[ R - beta (1/T) sum_t c_t ]
    w = world(*w_key)
    kl = KLPenalty(BETA, estimator, where, "full_step", normalize=True)
    mean = w.costs(estimator).sum(1) / w.sequences.answer_lengths
    exact = w.gradient((w.probability * (w.rewards - BETA * mean)).sum())
    assert close(expected_estimate(ReMax(gamma=1.0, kl=kl, clip_reward_value=0.0), w_key), exact)


def test_the_refused_penalties_have_expected_gradient_zero(w_key):
    w = world(*w_key)
    k1_in_loss = w.gradient((w.fixed * w.k1.sum(1)).sum())  # E[sum_t grad k1_t]
    full_one_step_in_reward = w.gradient((w.fixed * (w.logq * w.kl.detach()).sum(1)).sum())  # E[sum_t grad log q KL_t]
    assert k1_in_loss.abs().max() < 1e-12
    assert full_one_step_in_reward.abs().max() < 1e-12


def test_entropy_bonus_holds_the_states(w_key):
    w = world(*w_key)
    algorithm = Reinforce(gamma=1.0, kl=NO_KL, clip_reward_value=0.0, entropy_coef=0.4)
    objective = (w.probability * w.rewards).sum() + 0.4 * (w.fixed * w.entropy.sum(1)).sum()
    assert close(expected_estimate(algorithm, w_key), w.gradient(objective))


def test_the_clip_changes_the_reward_and_nothing_else():
    w, limit = world(), 0.8
    difference = ReMax(gamma=1.0, kl=NO_KL, clip_reward_value=limit)
    clipped = (w.rewards - w.greedy_rewards).clamp(-limit, limit)
    assert ((w.rewards - w.greedy_rewards).abs() > limit).any()
    assert close(expected_estimate(difference, key()), w.gradient((w.probability * clipped).sum()))

    on_reward = ReMax(gamma=1.0, kl=NO_KL, clip_reward_value=2.0, clip_on="reward")
    assert close(expected_estimate(on_reward, key()), w.gradient((w.probability * w.rewards.clamp(-2, 2)).sum()))


def by_prefix(w: World, per_token: Tensor) -> Tensor:
    """(N, A) -> (N, A): E[ x_t | s_t, y_t ], the mean over all answers that begin with the same t tokens."""
    sums, mass = defaultdict(float), defaultdict(float)
    names = [[(w.prompt_of[n], answer[: t + 1]) for t in range(len(answer))] for n, answer in enumerate(w.answers)]
    for n, prefixes in enumerate(names):
        for t, prefix in enumerate(prefixes):
            sums[prefix] += w.fixed[n].item() * per_token[n, t].item()
            mass[prefix] += w.fixed[n].item()
    means = torch.zeros_like(per_token)
    for n, prefixes in enumerate(names):
        for t, prefix in enumerate(prefixes):
            means[n, t] = sums[prefix] / mass[prefix]
    return means


def test_discount_weighs_each_token_by_what_is_left_and_keeps_the_baseline():
    # sum_s mu(s) sum_a grad q(a|s) Q(s, a), Q(s_t, y_t) = E[ gamma^(T-t+1) (r - b) | s_t, y_t ]; the KL undiscounted
    w, gamma = world(), 0.7
    left = w.sequences.answer_lengths[:, None] - torch.arange(3)  # (N, A): 1 at the last token
    weights = gamma ** left.double() * w.sequences.answer_mask

    def exact(baseline: Tensor) -> Tensor:
        q_values = by_prefix(w, weights * (w.rewards - baseline)[:, None])
        objective = (w.fixed * (w.logq * q_values).sum(1)).sum() - BETA * (w.fixed * w.kl.sum(1)).sum()
        return w.gradient(objective)

    kl = KLPenalty(BETA, reach="one_step")
    estimate = expected_estimate(ReMax(kl=kl, gamma=gamma, clip_reward_value=0.0), key())
    assert close(estimate, exact(w.greedy_rewards))
    assert (estimate - exact(torch.zeros_like(w.rewards))).norm() > 0.05 * estimate.norm()  # b does not drop out


# ---- the baselines of ReMax


ANY = {"constant": 0.7, "greedy": -1.3, "kl": 2.1, "others": 0.6, "past": 0.8}


def remax(baseline: str, kl: KLPenalty, k: int = 1, coefficients: dict[str, float] | None = None) -> ReMax:
    """Without discount and clip; with the coefficients given it uses them, whatever it has learned."""
    algorithm = ReMax(gamma=1.0, clip_reward_value=0.0, kl=replace(kl), baseline=baseline, samples_per_prompt=k)
    if coefficients is not None:
        past = coefficients["past"] if kl.reach == "full_step" else 0.0  # as is always learned
        algorithm.calibration.coefficients = lambda: coefficients | {"past": past}
    return algorithm


BASELINED = [  # the last two: a KL that charges nothing before the update, and none
    KLPenalty(BETA),
    KLPenalty(BETA, reach="one_step"),
    KLPenalty(BETA, normalize=True),
    KLPenalty(BETA, "full", "loss", "full_step"),
    KLPenalty(BETA, "k3", "loss", "one_step"),
    NO_KL,
]


def baselined_objective(w: World, kl: KLPenalty) -> Tensor:
    if not kl.active:
        return (w.probability * w.rewards).sum()
    return kl_objective(w, w.k1.sum(1) / w.sequences.answer_lengths) if kl.normalize else stated_objective(w, kl)


@pytest.mark.parametrize("kl", BASELINED, ids=lambda kl: f"{kl.coefficient}-{kl.estimator}-{kl.where}-{kl.reach}")
def test_any_coefficients_of_a_baseline_leave_the_expectation_alone(kl):
    for k, w_key in ((1, key()), (2, key(length=2)), (3, key(vocabulary=3, length=2))):
        w = world(*w_key)
        exact = w.gradient(baselined_objective(w, kl))
        for name, coefficients in (("greedy", None), ("greedy_kl", None), ("calibrated", ANY)):
            algorithm = remax(name, kl, k, coefficients)
            assert close(expected_estimate(algorithm, w_key, groups=all_groups(w, k)), exact), (k, name)


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=["tempered", "top-p", "all"])
def test_any_coefficients_under_another_distribution(sampling):
    w_key = key(sampling)
    exact = world(*w_key).gradient(stated_objective(world(*w_key), KLPenalty(BETA)))
    assert close(expected_estimate(remax("calibrated", KLPenalty(BETA), 1, ANY), w_key), exact)


@pytest.mark.parametrize("k", [1, 2])
def test_coefficients_of_earlier_rollouts_leave_the_expectation_alone_and_take_the_noise_away(k):
    # Some earlier rollouts, then every answer there is, in one step.
    w_key = key(length=3 - (k > 1))
    w = world(*w_key)
    groups, draws = all_groups(w, k), torch.Generator().manual_seed(9)
    algorithm = remax("calibrated", KLPenalty(BETA), k)
    for _ in range(4):
        chosen = w.fixed[groups].prod(1).multinomial(200, replacement=True, generator=draws)
        algorithm.prepare(drawn(algorithm, w_key, groups[chosen].flatten()))
    estimate = expected_estimate(deepcopy(algorithm), w_key, groups=groups)
    assert max(abs(c - PAPER[name]) for name, c in algorithm.calibration.coefficients().items()) > 0.1
    assert close(estimate, w.gradient(stated_objective(w, KLPenalty(BETA))))

    def noise(learned: ReMax) -> float:
        """E sum_t w_t A_t^2: what the coefficients are to make small, from its definition."""
        rows = groups.flatten()
        batch = learned.prepare(drawn(learned, w_key, rows))
        logprobs, reference = outputs(w_key)[0].logprobs.detach()[rows], outputs(w_key)[1][rows]
        penalty = learned.kl.in_advantage(logprobs - reference, batch.sequences.answer_mask)
        squares = learned.token_advantages(batch, penalty).square() * w.score_square[rows]
        return float((squares.sum(1) * w.fixed[groups].prod(1).repeat_interleave(k)).sum())

    fixed = [remax("greedy", KLPenalty(BETA), k), remax("calibrated", KLPenalty(BETA), k, dict.fromkeys(ANY, 0.0))]
    fixed = [remax("greedy", KLPenalty(BETA), k), remax("calibrated", KLPenalty(BETA), k, dict.fromkeys(ANY, 0.0))]
    most = {1: 0.95, 2: 1.01}[k]  # with answers of two tokens the greedy one is as good a baseline as any of these
    assert noise(algorithm) < most * min(map(noise, fixed))


def test_the_paper_s_baseline_is_one_of_the_calibrated_ones():
    rows = torch.arange(len(world().rewards))
    fixed = {"constant": 0.0, "greedy": 1.0, "kl": 0.0, "others": 0.0, "past": 0.0}
    for kl in BASELINED:
        first, paper, named = remax("calibrated", kl), remax("greedy", kl), remax("calibrated", kl, 1, fixed)
        expected = paper.prepare(drawn(paper, key(), rows)).expected
        assert torch.equal(expected, world().greedy_rewards)
        for algorithm in (first, named):  # an uncalibrated one begins as the paper's
            assert torch.equal(algorithm.prepare(drawn(algorithm, key(), rows)).expected, expected)


def test_the_weight_of_an_answer_has_the_mean_of_its_score_s_square():
    # sum_y pi(y) (1 - pi(y)) = sum_y pi(y) (1 - 2 pi(y) + sum_v pi(v)^2)
    w = world()
    weights = token_weights(w.logq.detach(), w.sequences.answer_mask)
    assert (w.fixed @ weights.sum(1)).item() == pytest.approx((w.fixed @ w.score_square.sum(1)).item(), abs=1e-12)
    assert (weights - w.score_square).abs().max() > 0.1


# ---- log-probs of the model for answers of the sampling distribution


def test_log_probs_of_the_model_bias_the_gradient_and_a_baseline_hides_most_of_it():
    w_key = key(Sampling(top_p=0.8))
    w = world(*w_key)
    exact = w.gradient((w.probability * w.rewards).sum())

    def error(algorithm, replay: bool) -> float:
        estimate = expected_estimate(algorithm, w_key, replay=replay)
        return ((estimate - exact).norm() / exact.norm()).item()

    plain, greedy = (
        Reinforce(gamma=1.0, kl=NO_KL, clip_reward_value=0.0),
        ReMax(gamma=1.0, kl=NO_KL, clip_reward_value=0.0),
    )
    assert error(plain, replay=True) < 1e-9 and error(greedy, replay=True) < 1e-9
    assert error(plain, replay=False) > 2 * error(greedy, replay=False) > 0.02  # 1.72 and 0.50 of the gradient's norm

    # The bias is E[ sum_t (grad log pi - grad log q) (r - b) ]: E_q[grad log pi] is not zero, so b does not drop out.
    model = outputs(w_key, False)[0].logprobs
    for algorithm, b in [(plain, 0.0), (greedy, w.greedy_rewards)]:
        bias = w.gradient((w.fixed * (w.rewards - b) * (model - w.logq).sum(1)).sum())
        assert close(expected_estimate(algorithm, w_key, replay=False) - exact, bias)


# ---- several answers a prompt


@pytest.mark.parametrize("k, vocabulary", [(2, 5), (3, 3)])
@pytest.mark.parametrize("sampling", SAMPLINGS[::2], ids=["plain", "top-p"])
def test_rloo_is_exact_with_the_kl_in_its_return(k, vocabulary, sampling):
    w_key = key(sampling, vocabulary, 2)
    w = world(*w_key)
    for kl, cost in [
        (NO_KL, 0.0),
        (KLPenalty(BETA), w.k1.sum(1)),
        (KLPenalty(BETA, normalize=True), w.k1.sum(1) / w.sequences.answer_lengths),
    ]:
        algorithm = RLOO(kl=kl, samples_per_prompt=k, clip_reward_value=0.0)
        estimate = expected_estimate(algorithm, w_key, groups=all_groups(w, k))
        beta = BETA if kl.active else 0.0
        assert close(estimate, w.gradient((w.probability * (w.rewards - beta * cost)).sum()))


@pytest.mark.parametrize("baseline", ["length_weighted", "token_weighted"])
@pytest.mark.parametrize("k, vocabulary", [(2, 5), (3, 3)])
def test_rloo_is_exact_however_the_others_are_weighted(k, vocabulary, baseline):
    w_key = key(vocabulary=vocabulary, length=2)
    w = world(*w_key)
    algorithm = RLOO(kl=KLPenalty(BETA), samples_per_prompt=k, clip_reward_value=0.0, baseline=baseline)
    estimate = expected_estimate(algorithm, w_key, groups=all_groups(w, k))
    assert close(estimate, w.gradient(kl_objective(w, w.k1.sum(1))))


def test_a_mean_over_all_k_answers_is_biased_by_the_answer_s_own_weight():
    # As in OPO's paper: b = sum_j T_j r_j / sum_j T_j over all, so b - b_others = T_i (r_i - b_others) / sum_j T_j, and
    # with two answers A_i = T_j (r_i - r_j) / (T_i + T_j): each answer's gain counts by the other's share of tokens.
    w_key = key(length=2)
    w = world(*w_key)
    i, j = all_groups(w, 2).T
    lengths = w.sequences.answer_lengths.double()
    objective = (
        w.probability[i] * w.fixed[j] * lengths[j] / (lengths[i] + lengths[j]) * (w.rewards[i] - w.rewards[j])
    ).sum()

    class OverAll(RLOO):
        def prepare(self, rollout: Rollout) -> Rollout:
            r, t = rollout.rewards.view(-1, 2), rollout.sequences.answer_lengths.view(-1, 2)
            return replace(rollout, advantages=(r - (r * t).sum(1, keepdim=True) / t.sum(1, keepdim=True)).view(-1, 1))

    estimate = expected_estimate(OverAll(kl=NO_KL, samples_per_prompt=2), w_key, groups=all_groups(w, 2))
    exact = w.gradient((w.probability * w.rewards).sum())
    assert close(estimate, w.gradient(objective))
    assert (estimate / 0.5 - exact).norm() > 0.02 * exact.norm()  # not even the direction


@pytest.mark.parametrize("algorithm", [Reinforce, RLOO, GRPO])
def test_scaling_over_a_large_batch_divides_the_gradient_by_a_deviation(algorithm):
    # Every answer there is in one batch: its mean is a constant, and so is what it is divided by.
    w_key = key(length=2)
    w = world(*w_key)
    k = 1 if algorithm is Reinforce else 2
    groups = all_groups(w, k)
    settings = {"kl": NO_KL, "clip_reward_value": 0.0, "loss_aggregation": "sequence", "gamma": 1.0}
    settings |= {"samples_per_prompt": 2} if k > 1 else {}
    plain, scaled = (algorithm(advantage_scaling=scaling, **settings) for scaling in ("none", "batch"))
    rows = groups.flatten()
    tokens = w.sequences.select(rows).answer_mask
    advantages = plain.prepare(drawn(plain, w_key, rows)).advantages.expand(tokens.shape)[tokens]
    estimate = expected_estimate(scaled, w_key, groups=groups)
    assert close(estimate, expected_estimate(plain, w_key, groups=groups) / (advantages.std(correction=0) + 1e-8))


@pytest.mark.parametrize(
    "kl",
    [kl for kl in penalties() if kl.estimator in ("k1", "k3", "js")],
    ids=lambda kl: f"{kl.estimator}-{kl.where}-{kl.reach}",
)
def test_rloo_with_every_other_kl(kl):
    w_key = key(length=2)
    w = world(*w_key)
    algorithm = RLOO(kl=replace(kl), samples_per_prompt=2, clip_reward_value=0.0)
    assert close(expected_estimate(algorithm, w_key, groups=all_groups(w, 2)), w.gradient(stated_objective(w, kl)))


@pytest.mark.parametrize("k, vocabulary", [(2, 5), (3, 3)])
def test_grpo_without_std_is_the_gradient_shrunk_by_its_own_mean(k, vocabulary):
    # E = (k-1)/k grad E[r] - beta grad E_sg[ KL_t(rho || pi) ]
    w_key = key(vocabulary=vocabulary, length=2)
    w = world(*w_key)
    kl = KLPenalty(BETA, "k3", "loss", "one_step")
    algorithm = GRPO(
        kl=kl, samples_per_prompt=k, advantage_scaling="none", clip_reward_value=0.0, loss_aggregation="sequence"
    )
    objective = (k - 1) / k * (w.probability * w.rewards).sum() - BETA * (w.fixed * w.reverse_kl.sum(1)).sum()
    assert close(expected_estimate(algorithm, w_key, groups=all_groups(w, k)), w.gradient(objective))


def test_grpo_with_std_and_two_answers_maximises_the_chance_to_win():
    # A_i = sign(r_i - r_j) / sqrt(2)
    w_key = key(length=2)
    w = world(*w_key)
    algorithm = GRPO(kl=NO_KL, samples_per_prompt=2, clip_reward_value=0.0, loss_aggregation="sequence", eps=1e-14)
    i, j = all_groups(w, 2).T
    sign = (w.rewards[i] - w.rewards[j]).sign()
    objective = (w.probability[i] * w.fixed[j] * sign).sum() / 2**0.5
    assert close(expected_estimate(algorithm, w_key, groups=all_groups(w, 2)), w.gradient(objective))


# ---- the best and the worst of k


def chance_to_be_the_best(w: World, k: int) -> Tensor:
    """(N,) of an answer among k to its prompt: F(r)^k - F(r-)^k, F the distribution of the reward."""
    chances = torch.zeros_like(w.rewards)
    for i in range(w.prompts):
        rows = [row for row, prompt in enumerate(w.prompt_of) if prompt == i]
        order = torch.tensor(rows)[w.rewards[rows].argsort()]
        up_to = w.fixed[order].cumsum(0)
        chances[order] = up_to**k - (up_to - w.fixed[order]) ** k
    return chances


@pytest.mark.parametrize("k, vocabulary", [(2, 5), (3, 3)])
@pytest.mark.parametrize("penalty", [0.0, 0.35])
def test_the_best_of_k_is_learned_as_often_as_it_comes(k, vocabulary, penalty, sampling=SAMPLINGS[2]):
    w_key = key(sampling, vocabulary)
    w, settings = world(*w_key), {"loss_aggregation": "sequence", "samples_per_prompt": k}
    algorithm = RAFT(**settings)
    if penalty:
        algorithm = SuperHF(**settings)
        assert algorithm.kl.coefficient == penalty
    estimate = expected_estimate(algorithm, w_key, groups=all_groups(w, k))
    of_answer = (w.logq - penalty * w.kl).sum(1)
    assert close(estimate, w.gradient((chance_to_be_the_best(w, k) * of_answer).sum()))


@pytest.mark.parametrize("k, vocabulary", [(2, 5), (3, 3)])
@pytest.mark.parametrize("share", [1 / 3, 0.8])
def test_inpo_is_the_square_of_its_margin(k, vocabulary, share):
    w_key, eta = key(vocabulary=vocabulary), 0.2
    w = world(*w_key)
    groups = all_groups(w, k)
    better, worse = (
        groups.gather(1, at(w.rewards[groups], 1, keepdim=True))[:, 0] for at in (torch.argmax, torch.argmin)
    )
    policy, reference = w.logq.sum(1), (w.logq - w.k1).sum(1).detach()  # (N,) of whole answers

    def margin(of_answers: Tensor) -> Tensor:
        return of_answers[better] - of_answers[worse]

    h = margin(policy) - share * margin(reference) - (1 - share) * margin(policy.detach())
    square = (h - 1 / (2 * eta)).square() * (better != worse)
    algorithm = INPO(samples_per_prompt=k, eta=eta, tau=share * eta)
    estimate = expected_estimate(algorithm, w_key, groups=groups)
    assert close(estimate, w.gradient(-(w.fixed[groups].prod(1) * square).sum()))


def test_first_step_of_the_moving_average_leaves_the_expectation_alone():
    # The step holds one answer to each of the two prompts; each is compared with the other's reward.
    w_key = key(vocabulary=3, length=2)
    w = world(*w_key)
    first, second = ([n for n, p in enumerate(w.prompt_of) if p == i] for i in (0, 1))

    class EachPair(Reinforce):
        def prepare(self, rollout: Rollout) -> Rollout:
            parts = [
                Reinforce(kl=NO_KL, baseline_decay=0.9, clip_reward_value=0.0).prepare(
                    rollout.select(torch.tensor([n, n + 1]))
                )
                for n in range(0, len(rollout), 2)
            ]
            return replace(rollout, advantages=torch.cat([part.advantages for part in parts]))

    pairs = torch.tensor(list(product(first, second)))
    # A step's loss is a mean over its 2 answers, one to each prompt, and `gradient` divides by the 2 prompts again.
    estimate = 2 * expected_estimate(EachPair(gamma=1.0, kl=NO_KL), w_key, groups=pairs)
    assert close(estimate, w.gradient((w.probability * w.rewards).sum()))


# ---- PPO before its first step


def state_values(w: World, seed: int = 5) -> Tensor:
    """(N, A) arbitrary values before each token, equal for equal states; what stands behind answers must not matter."""
    noise, table = torch.Generator().manual_seed(seed), {}
    values = torch.full(w.logq.shape, 77.0, dtype=torch.float64)
    for n, answer in enumerate(w.answers):
        for t in range(len(answer)):
            state = (w.prompt_of[n], answer[:t])
            if state not in table:
                table[state] = 2 * torch.randn(1, generator=noise).item()
            values[n, t] = table[state]
    return values


def true_values(w: World, beta: float) -> Tensor:
    """(N, A) V_pi(s_t) = E[ sum_{h>=t} r_h | s_t ], r_h = -beta k_h, + r at the end."""
    sums, mass = defaultdict(float), defaultdict(float)
    for n, answer in enumerate(w.answers):
        for t in range(len(answer)):
            state = (w.prompt_of[n], answer[:t])
            sums[state] += (w.fixed[n] * (w.rewards[n] - beta * w.k1[n, t:].sum())).item()
            mass[state] += w.fixed[n].item()
    values = torch.zeros_like(w.logq)
    for n, answer in enumerate(w.answers):
        for t in range(len(answer)):
            values[n, t] = sums[w.prompt_of[n], answer[:t]] / mass[w.prompt_of[n], answer[:t]]
    return values


def ppo(**settings) -> PPO:
    return PPO(
        **{"clip_reward_value": 0.0, "loss_aggregation": "sequence", "lam": 1.0, "kl": KLPenalty(BETA), **settings}
    )


def kl_objective(w: World, cost: Tensor) -> Tensor:
    return (w.probability * (w.rewards - BETA * cost)).sum()


def test_ppo_with_lambda_one_is_exact_whatever_the_critic_says(w_key):
    w = world(*w_key)
    exact = w.gradient(kl_objective(w, w.k1.sum(1)))
    assert close(expected_estimate(ppo(), w_key, values=state_values(w)), exact)


def test_ppo_normalized_kl_and_kl_in_the_loss(w_key):
    w = world(*w_key)
    values, lengths = state_values(w), w.sequences.answer_lengths
    for kl, objective in [
        (KLPenalty(BETA, normalize=True), kl_objective(w, w.k1.sum(1) / lengths)),
        (KLPenalty(BETA, "k3", "loss", "full_step", normalize=True), kl_objective(w, w.costs("k3").sum(1) / lengths)),
        (KLPenalty(BETA, "k3", "loss", "full_step"), kl_objective(w, w.expected_k3.sum(1))),
        (KLPenalty(BETA, "full", "loss", "one_step"), stated_objective(w, KLPenalty(BETA, "full", "loss", "one_step"))),
        (KLPenalty(BETA, "k3", "loss", "one_step"), stated_objective(w, KLPenalty(BETA, "k3", "loss", "one_step"))),
        (
            KLPenalty(BETA, "k2", "reward", "full_step"),
            stated_objective(w, KLPenalty(BETA, "k2", "reward", "full_step")),
        ),
        *(  # as in arXiv 2309.09055
            (penalty, stated_objective(w, penalty))
            for penalty in (KLPenalty(BETA, name, "reward", "full_step") for name in ("bregman", "clamped_js"))
        ),
    ]:
        assert close(expected_estimate(ppo(kl=kl), w_key, values=values), w.gradient(objective)), kl


@pytest.mark.parametrize("lam", [0.0, 0.6, 0.95])
def test_ppo_with_lambda_below_one_has_the_known_bias(lam):
    # (1-lam) E[ sum_t grad log pi(y_t) sum_{n>=1} lam^(n-1) (V - V_pi)(s_{t+n}) ]
    w = world()
    exact = w.gradient(kl_objective(w, w.k1.sum(1)))
    values, truth = state_values(w), true_values(w, BETA)
    assert close(expected_estimate(ppo(lam=lam), key(), values=truth), exact)  # a perfect critic has no bias

    error = (values - truth).masked_fill(~w.sequences.answer_mask, 0.0).detach()
    tail = torch.zeros_like(error)
    for t in range(3):
        for n in range(1, 3 - t):
            tail[:, t] += lam ** (n - 1) * error[:, t + n]
    bias = (1 - lam) * w.gradient((w.fixed * (w.logq * tail).sum(1)).sum())
    assert close(expected_estimate(ppo(lam=lam), key(), values=values) - exact, bias)
