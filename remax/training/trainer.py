"""The reinforcement learning of step 3. `Trainer.step` is Algorithm 1 of the ReMax paper (arXiv 2310.10505)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from remax.algorithms import Algorithm
from remax.checkpoint.checkpoints import Checkpoints
from remax.checkpoint.ema import WeightAverage
from remax.checkpoint.state import Stateful
from remax.core.batches import to_device
from remax.core.losses import supervised_loss
from remax.core.rollout import Rollout
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.core.sums import Figure, Figures, add, reduce
from remax.engines.base import StepResult, TrainedEngine
from remax.engines.policy import Actor, Judge, Reference
from remax.engines.scorer import Reward, TrainedReward
from remax.evaluation.policy import PolicyEvaluation
from remax.models.packing import shares_prompts
from remax.rewards.composite import CompositeReward
from remax.training.alarms import rollout_figures, rollout_tallies, start_again
from remax.training.loop import Cadence, TrainState, train
from remax.training.sentinel import Sentinel
from remax.training.suspects import Decode, Part, suspects
from utils.data.batches import PromptBatch, SupervisedBatch
from utils.distributed import largest_of_ranks, print0, sum_across_ranks, world_size
from utils.metrics import MetricsLogger
from utils.present import present
from utils.run import NotFinite
from utils.whereabouts import at

# Of a rollout, one for each row.
OF_ROWS = ("rewards", "baseline", "greedy_cost", "reference_logprobs", "old_logprobs", "values")
FULL_FORWARD = 8192  # tokens of a forward without gradient that keep a processor busy
SCORED_TOGETHER = 8  # micro-batches of the update that such a forward may hold
Watcher = Callable[[int, Rollout, dict[str, float]], dict[str, float]]


@dataclass(frozen=True)
class TrainerSettings:
    """How the trainer cuts its work, and what it prefers.

    Attributes:
        cadence: Epochs, steps and evaluations; its batches are collected before an update.
        micro_batch_size: Rows per training forward on one rank.
        mini_batches: Optimizer steps per pass over a rollout (PPO; 1 for on-policy algorithms).
        target_kl: Evaluation KL, nats per token, at which training stops; 0 for never.
        best_by: The evaluation figure whose highest value makes the best model, `reward` or `objective`.
        unsupervised_coefficient: Weight of the language-modelling loss on plain text, mixed in as in InstructGPT.
        critic_warmup_steps: First steps in which the critic alone learns.
    """

    cadence: Cadence = Cadence()
    micro_batch_size: int = 16
    mini_batches: int = 1
    target_kl: float = 0.0
    best_by: str = "reward"
    unsupervised_coefficient: float = 0.0
    critic_warmup_steps: int = 0

    def optimizer_steps(self, algorithm: Algorithm) -> int:
        """Optimizer steps per step of the loop."""
        return algorithm.epochs * self.mini_batches


class Timer:
    """Seconds spent in the named parts of a step, and the tokens that were generated in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures what happens inside."""
        begin = time.perf_counter()
        with at(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass
class Trainer:
    """Everything that learns, scores and measures, put together.

    Attributes:
        measure: Evaluates the policy, reduced over ranks.
        pad_id: What rows of token ids are filled up with.
        judge: Of a reference and reward that share one trunk; the scores of both come from one forward.
        unsupervised: Endless batches of plain text for the language-modelling mix, or None.
        average: A moving average of the actor's weights, or None.
        on_evaluation: (step, evaluation, best), called on every rank.
        sentinel: Warns of a training that goes wrong, or ends it.
        watchers: (step, rollout, figures) -> further figures to log, equal on every rank.
        decode: Token ids as text, for messages.
        trusts_decode: The decode's log-probs are those of the update's forward but for rounding, so that they serve as
            old log-probs without another forward.
    """

    actor: Actor
    reference: Reference
    reward: Reward | CompositeReward
    algorithm: Algorithm
    settings: TrainerSettings
    measure: Callable[[], PolicyEvaluation]
    metrics: MetricsLogger
    pad_id: int
    critic: TrainedReward | None = None
    judge: Judge | None = None
    unsupervised: Iterator[SupervisedBatch] | None = None
    average: WeightAverage | None = None
    on_evaluation: Callable[[int, PolicyEvaluation, bool], None] = lambda step, evaluation, best: None
    sentinel: Sentinel | None = None
    watchers: list[Watcher] = field(default_factory=list)
    decode: Decode = str
    trusts_decode: bool = False
    losses: list[Part] = field(default_factory=list, init=False)  # of the present step's micro-batches
    suspects: str = field(default="", init=False)  # what was not finite in it
    critic_alone: bool = field(default=False, init=False)  # the actor does not learn in it

    def __post_init__(self) -> None:
        self.reference_head = self.reference.head() if self.algorithm.kl.needs_full_kl else None

    # ------------------------------------------------------------------------------------------------------ Algorithm 1

    def step(self, batches: list[PromptBatch]) -> tuple[Rollout, dict[str, float]]:
        """Collects answers to the batches of prompts x and learns from them.

        Returns:
            The rollout, and figures reduced over ranks.
        """
        timer, figures, collected = Timer(), Figures(), []
        self.losses.clear()
        self.actor.train()
        if self.critic is not None:
            self.critic.train()
        for batch in batches:
            with timer("generation"):
                sampled, greedy, drawn = self.answer(batch)  # y ~ pi(.|x), ybar, the greedy answer, and log pi(y|x)
            with timer("scoring"):
                reward, baseline, reference, parts = self.score(sampled, greedy, batch.columns)  # r(x, y), r(x, ybar)
                scored = Rollout(sampled, reward, baseline, reference, drawn, greedy_cost=self.greedy_cost(greedy))
                collected.append(self.annotate(scored) if self.algorithm.kept is None else scored)
            timer.tokens += sum(x.answer_tokens for x in (sampled, greedy) if x is not None)
            figures = add(figures, parts)
        rollout = Rollout.concatenate(collected, self.pad_id)
        rollout = self.algorithm.prepare(rollout)  # advantages: for ReMax r(x, y) - r(x, ybar)
        rows = self.algorithm.learned(rollout)
        if self.algorithm.kept is not None:
            with timer("scoring"):
                rows = self.annotate(rows)
        with timer("update"):
            for _ in range(self.algorithm.epochs):
                for part in self.mini_batches(rows):
                    result, learned = self.update(part)  # loss, gradient, one optimizer step
                    figures = add(figures, learned)
            if self.average is not None:
                self.average.update()
        return rollout, self.summarise(rollout, figures, timer, result)

    def answer(self, batch: PromptBatch) -> tuple[Sequences, Sequences | None, Tensor | None]:
        """Sampled answers to a batch of prompts, greedy ones where the algorithm needs them, and old log-probs.

        The last are (B, A) and of the sampled answers, as the decode found them, where they serve: see
        `trusts_decode`.
        """
        batch = to_device(batch)
        prompts = Prompts(batch.input_ids, batch.lengths)
        samples, greedy = self.algorithm.samples_per_prompt, self.algorithm.greedy
        logprobs = self.algorithm.needs_old_logprobs and self.trusts_decode
        answers = self.actor.rollout(prompts, samples=samples, greedy=greedy, logprobs=logprobs)
        return present(answers.sampled, "the sampled rollout"), answers.greedy, answers.logprobs

    def forwards(self, rows: Sequences) -> int:
        """Micro-batches of the update that rows make: as many on every rank, since ZeRO-3 needs all in each forward."""
        return math.ceil(len(rows) / self.settings.micro_batch_size)

    def scoring_forwards(self, rows: Sequences) -> int:
        """Forwards without gradient in which rows are read.

        They keep no activations, so each takes more rows than a micro-batch of the update, and full ones save nothing
        further. Where a model is at ZeRO-3 there are as many on every rank.
        """
        fewest = math.ceil(self.forwards(rows) / SCORED_TOGETHER)
        forwards = min(max(fewest, math.ceil(rows.tokens / FULL_FORWARD)), len(rows))
        roles = (self.actor, self.reference, self.reward, self.critic)
        return largest_of_ranks(forwards) if any(role is not None and role.zero3 for role in roles) else forwards

    @torch.no_grad()
    def score(
        self, sampled: Sequences, greedy: Sequences | None, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Figures]:
        """Rewards of the sampled and of the greedy answers, both from the same forwards.

        So a ZeRO-3 reward model moves its weights only once for both.

        Args:
            columns: Of the data, a value for each prompt.

        Returns:
            (B,) rewards, (B,) rewards of the prompts' greedy answers, (B, A) log-probs of the sampled answers under the
            reference where the same forwards gave them, and the sampled answers' scores by each part of the reward.
        """
        both = sampled if greedy is None else Sequences.concatenate([sampled, greedy], self.pad_id)
        samples = self.algorithm.samples_per_prompt
        of_both = {
            name: [value for value in values for _ in range(samples)] + ([] if greedy is None else list(values))
            for name, values in (columns or {}).items()
        }
        forwards, reference, of_trunk = self.scoring_forwards(both), None, None
        if self.judge is not None and self.needs_reference:
            reference, of_trunk = self.judge.read(both, len(sampled), forwards)
        rewards, parts = self.reward.score_parts(both, forwards, of_both, of_trunk)
        figures = {f"reward/{k}": Figure(scores[: len(sampled)].sum(), len(sampled)) for k, scores in parts.items()}
        baseline = None if greedy is None else rewards[len(sampled) :].repeat_interleave(samples)
        return rewards[: len(sampled)], baseline, reference, figures

    @torch.no_grad()
    def annotate(self, scored: Rollout) -> Rollout:
        """Scored answers with what the models know of them at the time of the rollout, if it is not there yet."""
        rows, forwards = scored.sequences, self.scoring_forwards(scored.sequences)
        reference, old_logprobs = scored.reference_logprobs, scored.old_logprobs
        hidden = self.reference.hidden(rows, forwards) if self.reference_head else None
        if reference is None and self.needs_reference:
            reference = self.reference.logprobs(rows, forwards, hidden)
        if old_logprobs is None and self.algorithm.needs_old_logprobs:
            old_logprobs = self.actor.old_logprobs(rows, forwards)
        return replace(
            scored,
            reference_logprobs=reference,
            old_logprobs=old_logprobs,
            values=self.critic.old_values(rows, forwards) if self.critic else None,
            reference_hidden=hidden,
        )

    @torch.no_grad()
    def greedy_cost(self, greedy: Sequences | None) -> Tensor | None:
        """(B,) for the rows of the sampled answers: what the greedy ones would be charged for their KL, where asked."""
        if greedy is None or not self.algorithm.needs_greedy_cost:
            return None
        forwards = self.scoring_forwards(greedy)
        logprobs, reference = self.actor.old_logprobs(greedy, forwards), self.reference.logprobs(greedy, forwards)
        cost = self.algorithm.cost(logprobs, reference, greedy.answer_mask)
        return cost.repeat_interleave(self.algorithm.samples_per_prompt)

    def mini_batches(self, rollout: Rollout) -> Iterator[Rollout]:
        """The rollout in `mini_batches` parts of equal size, as its rows follow one another.

        They come in the random order of the data, of which the ranks take turns: so a part of all ranks together is the
        same rows on any number of ranks. A permutation of a rank's own rows would not leave it so.
        """
        if self.settings.mini_batches == 1:
            yield rollout
            return
        size = len(rollout) // self.settings.mini_batches
        for start in range(0, len(rollout), size):
            yield rollout.select(slice(start, start + size))

    def update(self, rollout: Rollout) -> tuple[StepResult, Figures]:
        """One optimizer step: the gradients of all micro-batches, and the algorithm's figures.

        The loss of a micro-batch is divided by one denominator over all micro-batches and ranks. A critic on the
        actor's engine learns in the same step, by the sum of both losses: where they share no trained parameter, these
        are two steps in one, but for the gradient's norm, which is clipped as a whole.
        """
        denominator = sum_across_ranks({"count": self.algorithm.count(rollout.sequences)})["count"]
        packed, kl = self.actor.model.packing, self.algorithm.kl
        parts = list(rollout.split(self.settings.micro_batch_size, group=self.rows_together, packed=packed))
        figures: Figures = {}
        # A backward pass before a step reaches all that the engine learns, or ZeRO 1 would keep a part of the gradient.
        text_follows = self.unsupervised is not None and not self.one_engine and not self.critic_alone
        if self.unsupervised is not None and self.one_engine:
            figures = add(figures, self.learn_plain_text(next(self.unsupervised), last=False))
        for i, batch in enumerate(parts):
            with torch.set_grad_enabled(not self.critic_alone):
                output = self.actor.logprobs(
                    batch.sequences,
                    entropy=True,
                    stats_grad=self.algorithm.needs_entropy or (kl.needs_full_kl and kl.where == "loss"),
                    reference_hidden=batch.reference_hidden,
                    reference_head=self.reference_head,
                )
                loss, of_batch = self.algorithm.loss(batch, output, denominator)
            if self.critic is not None and self.one_engine:
                values = self.critic.values(batch.sequences)
                value_loss, of_values = self.algorithm.value_loss(batch, values, denominator)
                loss, of_batch = loss + value_loss, of_batch | of_values
            self.losses.append((batch.sequences, {"loss": loss.detach()}))
            if not self.critic_alone:
                self.actor.backward(loss, last=i == len(parts) - 1 and not text_follows)
            figures = add(figures, of_batch)
        if self.unsupervised is not None and text_follows:
            figures = add(figures, self.learn_plain_text(next(self.unsupervised)))
        result = None if self.critic_alone else self.actor.step()
        if self.critic is not None and not self.one_engine:
            for i, batch in enumerate(parts):
                loss, of_batch = self.algorithm.value_loss(batch, self.critic.values(batch.sequences), denominator)
                self.critic.backward(loss, last=i == len(parts) - 1)
                figures = add(figures, of_batch)
            of_critic = self.critic.step()
            result = result or of_critic
        return present(result, "an optimizer step"), figures

    def learn_plain_text(self, batch: SupervisedBatch, last: bool = True) -> Figures:
        """Adds the gradient of coefficient * (mean negative log-likelihood per token of a batch of plain text)."""
        rows = Sequences.from_batch(to_device(batch))
        tokens = sum_across_ranks({"tokens": rows.answer_tokens})["tokens"]
        parts, figures = rows.in_parts(self.forwards(rows)), Figures()
        for i, part in enumerate(parts):
            logprobs = self.actor.logprobs(part, sampling=Sampling()).logprobs  # the model's, at any temperature
            loss = supervised_loss(logprobs, part.answer_mask, tokens)
            self.actor.backward(self.settings.unsupervised_coefficient * loss, last=last and i == len(parts) - 1)
            figures = add(figures, {"unsupervised_loss": Figure(loss.detach())})
        return figures

    def summarise(self, rollout: Rollout, figures: Figures, timer: Timer, result: StepResult) -> dict[str, float]:
        """The figures of a step over all ranks; an adaptive KL coefficient moves by them."""
        rows, ended = len(rollout), rollout.sequences.ended(self.actor.model.hf.generation_config.eos_token_id)
        tallies = rollout_tallies(rollout)
        local = figures | tallies | {"ended": Figure(ended.sum(), rows)}
        if rollout.baseline is not None:
            local["baseline"] = Figure(rollout.baseline.sum(), len(rollout.baseline))
        local |= {f"seconds_{name}": Figure(value, 1) for name, value in timer.seconds.items()}
        local |= {"tokens of a rank": Figure(timer.tokens, 1), "answers of a rank": Figure(rows, 1)}
        means = reduce(local, self.settings.optimizer_steps(self.algorithm))
        tokens, answers = (means.pop(f"{name} of a rank") * world_size() for name in ("tokens", "answers"))
        if "kl" in means and not self.critic_alone:
            self.algorithm.update(means["kl"], answers)
        of_rollout = rollout_figures({name: means.pop(name) for name in tallies})
        return of_rollout | means | {"tokens": tokens} | self.algorithm.figures() | result.figures

    # --------------------------------------------------------------------------------------------------------- the loop

    def train(self, loader: DataLoader, checkpoints: Checkpoints | None = None) -> TrainState:
        """The whole training, see `loop.train`.

        Raises:
            TrainingStopped: On every rank at the same step, when the sentinel sees no point in going on.
        """
        cadence = self.settings.cadence
        print0(f"{cadence.total_steps(len(loader))} steps; answers come from {self.actor.backend}")
        return train(self, loader, cadence, self.metrics, checkpoints)

    @property
    def label(self) -> str:
        """The algorithm's name, for the progress bar."""
        return type(self.algorithm).__name__

    @property
    def headline(self) -> str:
        """The figure that the best model is chosen by."""
        return self.settings.best_by

    @property
    def sign(self) -> int:
        """A higher reward, or objective, is better."""
        return 1

    @property
    def rows_together(self) -> int:
        """How many adjacent answers to a prompt stay in one micro-batch of the update.

        All that the loss compares; else as many as fit, where the actor computes what they share once.
        """
        samples = self.algorithm.kept or self.algorithm.samples_per_prompt
        if self.algorithm.compares_answers:
            return samples
        return math.gcd(samples, self.settings.micro_batch_size) if shares_prompts(self.actor.model) else 1

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is read in a step. Evaluations measure the KL all the same."""
        return self.algorithm.needs_reference

    @property
    def one_engine(self) -> bool:
        """Whether actor and critic are trained by one engine, since they share a trunk."""
        return self.critic is not None and self.critic.engine is self.actor.engine

    @property
    def engines(self) -> dict[str, TrainedEngine]:
        """The actor's, and the critic's where it has one of its own."""
        critic = {"critic": self.critic.engine} if self.critic is not None and not self.one_engine else {}
        return {"actor": self.actor.engine} | critic

    @property
    def values(self) -> dict[str, Stateful]:
        """The algorithm, those who watch, and the position in the plain text."""
        found: dict[str, Any] = {
            "algorithm": self.algorithm,
            "sentinel": self.sentinel,
            "plain text": self.unsupervised,
        }
        found |= {type(watcher).__name__: watcher for watcher in self.watchers}
        return {name: value for name, value in found.items() if hasattr(value, "state_dict")}

    def learn(self, step: int, batches: list[PromptBatch]) -> dict[str, float]:
        """A step, and what those who watch make of it."""
        self.critic_alone = step <= self.settings.critic_warmup_steps
        rollout, figures = self.step(batches)
        watchers: list[Watcher] = [*self.watchers, *([self.sentinel] if self.sentinel else [])]
        for watch in watchers:
            figures |= watch(step, rollout, figures)
        if not (math.isfinite(figures["loss"]) and math.isfinite(figures["reward"])):
            of_rows = {name.replace("_", " "): getattr(rollout, name) for name in OF_ROWS}
            self.suspects = suspects([(rollout.sequences, of_rows), *self.losses], self.decode)
        return figures

    def check(self, step: int, figures: dict[str, float]) -> None:
        """Asks the sentinel."""
        if self.sentinel:
            self.sentinel.stop_if_fatal(self.suspects)

    def evaluate(self) -> PolicyEvaluation:
        """Measures the policy; its `objective` is the reward minus the price of its KL."""
        evaluation = self.measure()
        figures = evaluation.figures
        figures["objective"] = figures["reward"] - self.algorithm.price_of_kl * figures["kl"]
        return evaluation

    def evaluated(self, state: TrainState, evaluation: PolicyEvaluation, best: bool) -> str | None:
        """Hands the evaluation on; a reason to stop where the policy is too far from its reference.

        Raises:
            NotFinite: The policy's log-probs are no numbers: it has lost its weights.
        """
        if not math.isfinite(evaluation.figures["kl_per_token"]):
            raise NotFinite(
                f"step {state.step}: evaluation KL is {evaluation.figures['kl_per_token']}. Likely cause: the weights "
                f"are lost, by a learning rate that is too high. Remedy: {start_again(self.critic is not None)}"
            )
        self.on_evaluation(state.step, evaluation, best)
        kl = evaluation.figures["kl_per_token"]
        if state.step and self.settings.target_kl and kl >= self.settings.target_kl:
            return f"evaluation KL {kl:.3g} nats per token >= --target_kl"
        return None
