"""The known ways in which such trainings go wrong: figures, limits, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from remax.core.rollout import Rollout
from remax.core.sequences import Sequences
from remax.core.sums import Figure, Figures
from utils.present import present

COMPARED = ("entropy", "length", "ended", "distinct_trigrams")  # with the run's start


@dataclass(frozen=True)
class Thresholds:
    """When the sentinel speaks. "Recent" is the mean of the last `window` steps, "start" that of the first `first`."""

    window: int = 10  # steps
    first: int = 5  # steps
    kl_after: int = 3  # steps before a recent KL is judged; the others wait for a whole window
    repeat_after: int = 100  # steps before the same warning is given again
    overflow_warning: int = 5  # steps in a row skipped by overflow; fp16's loss scaling needs a few at first
    overflow_limit: int = 20  # the same, fatal: by then the loss scale has gone from 2^16 to 1
    nonfinite_limit: int = 3  # steps in a row whose loss, reward or applied gradient is not finite: fatal
    kl_warning: float = 0.5  # nats per token above the first step's, recent
    kl_limit: float = 5.0  # nats per token above the first step's, in any one step: fatal; 0 for none
    kl_negative: float = -0.02  # nats per token, recent: a KL below 0 is no KL of these answers
    entropy_share: float = 0.1  # of the start's entropy, recent
    noise_share: float = 0.5  # of the way from the start's entropy to ln(vocabulary), recent
    length_factor: float = 2.0  # recent length over the start's, or the reverse
    ended_drop: float = 0.2  # share of answers that end by themselves: start minus recent
    ended_low: float = 0.5  # that share at the start
    distinct_share: float = 0.7  # of the start's share of distinct trigrams, recent
    length_correlation: float = 0.7  # of reward and length, recent, either sign
    zero_advantages: float = 0.9  # share of answers that teach nothing, recent


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong.

    Attributes:
        kind: For counting.
        figure: What was seen.
        cause: What it usually is.
        remedy: What usually helps.
        fatal: Whether going on is pointless.
    """

    kind: str
    figure: str
    cause: str
    remedy: str
    fatal: bool = False

    def message(self, step: int) -> str:
        """One line for people."""
        return f"step {step}: {self.figure}. Likely cause: {self.cause}. Remedy: {self.remedy}"


# -------------------------------------------------------------------------------------------------------------- figures


def distinct_ngrams(sequences: Sequences, n: int = 3) -> tuple[Tensor, Tensor]:
    """Counts n-grams, n <= 3, for vocabularies below 2^20. An answer that repeats itself has few different ones.

    Returns:
        The number of different n-grams within each answer and the number of n-grams, both summed over the B answers.
    """
    ids, mask = sequences.answer_ids, sequences.answer_mask  # (B, A)
    if ids.shape[1] < n:
        return torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    code = torch.zeros_like(ids[:, n - 1 :])  # (B, A - n + 1)
    for j in range(n):
        code = (code << 20) + ids[:, j : ids.shape[1] - n + 1 + j]
    whole = mask[:, n - 1 :]  # the n-gram's last token belongs to the answer
    code = code.masked_fill(~whole, -1).sort(1).values
    first_of_its_kind = torch.cat([code[:, :1] >= 0, (code[:, 1:] != code[:, :-1]) & (code[:, 1:] >= 0)], 1)
    return first_of_its_kind.sum(), whole.sum()


def rollout_tallies(rollout: Rollout) -> Figures:
    """What `rollout_figures` needs of the answers of this rank."""
    distinct, trigrams = distinct_ngrams(rollout.sequences)
    rows, r, n = len(rollout), rollout.rewards.double(), rollout.sequences.answer_lengths.double()  # (B,)
    advantages = present(rollout.advantages, "Rollout.advantages")  # (B, A) or (B, 1)
    if advantages.shape[1] > 1:
        advantages = advantages.masked_fill(~rollout.sequences.answer_mask, 0.0)
    return {
        "repeated_trigrams": Figure(trigrams - distinct, trigrams),
        "reward": Figure(r.sum(), rows),
        "reward_square": Figure(r.square().sum(), rows),
        "length": Figure(n.sum(), rows),
        "length_square": Figure(n.square().sum(), rows),
        "reward_length": Figure((r * n).sum(), rows),
        "zero_advantages": Figure((advantages.abs() <= 1e-5).all(1).sum(), rows),
    }


def rollout_figures(means: Mapping[str, float]) -> dict[str, float]:
    """Figures over the answers of all ranks, from the means of their tallies.

    Returns:
        - `reward` and `length`, and `reward_std`, the reward's standard deviation;
        - `distinct_trigrams`: different trigrams of an answer over its trigrams, 1 where nothing is repeated;
        - `reward_length_correlation`: Pearson's, 0 where either does not vary;
        - `zero_advantages`: share of answers whose advantages are all 0: they leave the policy as it is.
    """
    reward, length = means["reward"], means["length"]
    of_reward, of_length = means["reward_square"] - reward**2, means["length_square"] - length**2
    # A difference of two squares is rounded to some 1e-16 of them.
    varies = of_reward > 1e-13 * means["reward_square"] and of_length > 1e-13 * means["length_square"]
    covariance = means["reward_length"] - reward * length
    return {
        "reward": reward,
        "reward_std": math.sqrt(max(of_reward, 0.0)),
        "length": length,
        "distinct_trigrams": 1 - means["repeated_trigrams"],
        "reward_length_correlation": covariance / math.sqrt(of_reward * of_length) if varies else 0.0,
        "zero_advantages": means["zero_advantages"],
    }


# ------------------------------------------------------------------------------------------------------------ judgement


def start_again(critic: bool) -> str:
    """The remedy where weights are lost; a critic's estimates, where there is one, may have done it."""
    rates = "--actor_learning_rate" + " and --critic_learning_rate" * critic
    return f"start again from the last good model with a tenth of {rates}; bf16 instead of fp16"


def fatal_alarms(
    figures: dict[str, float], overflows: int, nonfinite: int, kl_excess: float, limits: Thresholds
) -> Iterator[Alarm]:
    """From one step's figures and streaks."""
    loss, reward, norm = (figures.get(name, 0.0) for name in ("loss", "reward", "grad_norm"))
    numbers = f"loss {loss:.3g}, reward {reward:.3g}, gradient norm {norm:.3g}"
    lost = not (math.isfinite(loss) and math.isfinite(reward) or figures.get("skipped"))
    if lost or nonfinite >= limits.nonfinite_limit:
        yield Alarm(
            "not finite",
            numbers + (": the update was applied, the weights are lost" if lost else f", {nonfinite} steps in a row"),
            "a reward that is not finite (--reward_dtype), or a learning rate that is too high",
            start_again("value_loss" in figures),
            fatal=True,
        )
    if overflows >= limits.overflow_warning:
        fatal = overflows >= limits.overflow_limit
        yield Alarm(
            "stuck in overflow" if fatal else "overflow",
            f"{overflows} steps in a row skipped, as their gradients overflowed",
            "numbers beyond the range of the number format",
            "--actor_dtype bf16 (or fp32), a lower --actor_learning_rate",
            fatal,
        )
    if limits.kl_limit and kl_excess > limits.kl_limit:
        yield Alarm(
            "KL beyond the limit",
            f"KL {kl_excess:.3g} nats per token to the reference, the limit is {limits.kl_limit:g}",
            "the policy writes what the reference would never write, and the reward model has never seen",
            "a lower --actor_learning_rate, a higher --kl_ctl, and another start from a good model",
            fatal=True,
        )


def drift_alarms(
    recent: dict[str, float], start: dict[str, float], vocabulary: int, limits: Thresholds
) -> Iterator[Alarm]:
    """From recent means and the means of the run's first steps, as far as there are any yet."""
    excess, kl, entropy = (recent.get(name, 0.0) for name in ("kl_excess", "kl_per_token", "entropy"))
    if excess > limits.kl_warning:
        yield Alarm(
            "KL",
            f"KL {excess:.3g} nats per token to the reference",
            "the policy leaves the region where the reward model can be trusted",
            "a higher --kl_ctl, --adaptive_kl, or a lower --actor_learning_rate",
        )
    if kl < limits.kl_negative:
        yield Alarm(
            "negative KL",
            f"KL {kl:.3g} nats per token to the reference, below 0",
            "the answers do not come from the distribution that the update evaluates",
            "--logprobs_of sampling, --disable_actor_dropout, and `python -m remax.doctor`",
        )
    if recent.get("reward_length_correlation") is not None:
        correlation = recent["reward_length_correlation"]
        if abs(correlation) > limits.length_correlation:
            yield Alarm(
                "length reward",
                f"correlation {correlation:.2f} between reward and length",
                f"the reward model mostly likes {'long' if correlation > 0 else 'short'} answers",
                "a reward model trained on pairs of balanced length, a higher --kl_ctl",
            )
    if recent.get("zero_advantages", 0.0) > limits.zero_advantages:
        yield Alarm(
            "no signal",
            f"{recent['zero_advantages']:.0%} of the answers have advantage 0",
            "all answers to a prompt are the same or score the same",
            "a higher --temperature or --entropy_coef, harder prompts, and a look at the answers (--print_answers)",
        )
    if not all(name in start for name in COMPARED):
        return
    top, first = math.log(vocabulary), start["entropy"]
    if entropy < limits.entropy_share * first:
        yield Alarm(
            "entropy collapse",
            f"entropy {entropy:.3g} nats per token, {first:.3g} at the start",
            "the policy has settled on one answer per prompt",
            "a higher --kl_ctl or --entropy_coef, a lower --actor_learning_rate",
        )
    if first < 0.8 * top and entropy > first + limits.noise_share * (top - first):
        yield Alarm(
            "entropy rising",
            f"entropy {entropy:.3g} nats per token, {first:.3g} at the start, {top:.3g} is noise",
            "the reward model scores noise well, and the policy is dissolving into it",
            "a higher --kl_ctl, --entropy_coef 0, and a better reward model",
        )
    longer = recent["length"] / max(start["length"], 1e-9)
    if not 1 / limits.length_factor < longer < limits.length_factor:
        yield Alarm(
            "length drift",
            f"answers of {recent['length']:.0f} tokens, {start['length']:.0f} at the start",
            f"the reward prefers {'long' if longer > 1 else 'short'} answers, whatever they say",
            "a higher --kl_ctl, and a reward model trained on pairs of balanced length",
        )
    if start["ended"] - recent["ended"] > limits.ended_drop:
        yield Alarm(
            "end tokens vanish",
            f"{recent['ended']:.0%} of the answers end by themselves, {start['ended']:.0%} at the start",
            "unfinished answers score as well as finished ones",
            "a longer --max_answer_seq_len, a higher --kl_ctl, a reward model that has seen cut answers",
        )
    elif start["ended"] < limits.ended_low:
        yield Alarm(
            "few end tokens",
            f"only {start['ended']:.0%} of the first answers ended by themselves",
            "the policy was not taught to stop, or --max_answer_seq_len cuts it off",
            "a longer --max_answer_seq_len, or step 1 on answers that end with the end token",
        )
    if recent["distinct_trigrams"] < limits.distinct_share * start["distinct_trigrams"]:
        yield Alarm(
            "repetition",
            f"{recent['distinct_trigrams']:.0%} of an answer's trigrams are different, "
            f"{start['distinct_trigrams']:.0%} at the start",
            "the policy repeats what the reward model likes",
            "a higher --kl_ctl, a lower --actor_learning_rate, and a look at the answers (--print_answers)",
        )
