"""The reinforcement learning loop of step 3. `step` is Algorithm 1 of the ReMax paper (arXiv 2310.10505) on one screen;
`train` is cadence: evaluate, save the best, log, stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from remax.algorithms import Algorithm, mean_metrics
from remax.ema import WeightAverage
from remax.engines import Actor, Reference, Reward, StepResult, TrainedReward
from remax.evaluation import PolicyEvaluation, to_device
from remax.finetune import batches_of_steps, ended_early, steps_per_epoch
from remax.logprobs import Sampling
from remax.losses import supervised_loss
from remax.rewards import CompositeReward
from remax.sentinel import Sentinel
from remax.sequences import Prompts, Rollout, Sequences
from utils.data.batches import PromptBatch, SupervisedBatch
from utils.distributed import print0, sum_across_ranks, world_size
from utils.metrics import MetricsLogger, progress
from utils.run import UserError


@dataclass(frozen=True)
class TrainerSettings:
    """micro_batch_size: rows per training forward on one rank.   rollouts_per_step: prompt batches collected before an
    update.
    mini_batches: optimizer steps per pass over a rollout (PPO; 1 for on-policy algorithms).
    evaluate_every: in steps, 0 for once per epoch.   target_kl: evaluation KL, nats per token, at which training stops;
    0 for never.
    best_by: the evaluation figure whose highest value makes the best model, `reward` or `objective`.
    unsupervised_coefficient: weight of the language-modelling loss on plain text, mixed in as in InstructGPT.
    """

    epochs: int = 1
    max_steps: int = 0
    micro_batch_size: int = 16
    rollouts_per_step: int = 1
    mini_batches: int = 1
    evaluate_every: int = 0
    target_kl: float = 0.0
    best_by: str = "reward"
    unsupervised_coefficient: float = 0.0

    def total_steps(self, batches: int) -> int:
        """Steps of the loop in a whole training with so many prompt batches per epoch."""
        total = self.epochs * steps_per_epoch(batches, self.rollouts_per_step)
        return min(total, self.max_steps) if self.max_steps else total

    def optimizer_steps(self, algorithm: Algorithm) -> int:
        """Optimizer steps per step of the loop."""
        return algorithm.epochs * self.mini_batches


class Timer:
    """Seconds spent in the named parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass
class Trainer:
    """Everything that learns, scores and measures, put together.

    watchers(step, rollout, figures) -> further figures to log, equal on every rank; the sentinel is one that may stop.
    evaluate() -> PolicyEvaluation, reduced over ranks.   on_evaluation(step, evaluation, best): called on every rank.
    unsupervised: endless batches of plain text for the language-modelling mix, or None.
    """

    actor: Actor
    reference: Reference
    reward: Reward | CompositeReward
    algorithm: Algorithm
    settings: TrainerSettings
    evaluate: Callable[[], PolicyEvaluation]
    metrics: MetricsLogger
    pad_id: int
    critic: TrainedReward | None = None
    unsupervised: Iterator[SupervisedBatch] | None = None
    average: WeightAverage | None = None
    on_evaluation: Callable[[int, PolicyEvaluation, bool], None] = lambda step, evaluation, best: None
    sentinel: Sentinel | None = None
    watchers: list[Callable[[int, Rollout, dict[str, float]], dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reference_head = self.reference.head() if self.algorithm.kl.needs_full_kl else None

    def step(self, batches: list[PromptBatch]) -> tuple[Rollout, dict[str, float]]:
        """Collects answers to the batches of prompts and learns from them once; the rollout, and figures reduced over
        ranks.
        """
        timer = Timer()
        self.actor.train()
        if self.critic is not None:
            self.critic.train()
        tally: dict[str, float | Tensor] = {"generated_tokens": 0.0}
        rollout = Rollout.concatenate([self.collect(batch, timer, tally) for batch in batches], self.pad_id)
        rollout = self.algorithm.prepare(rollout)
        sums: dict[str, Tensor] = {}
        with timer("update"):
            for _ in range(self.algorithm.epochs):
                for part in self.mini_batches(rollout):
                    result = self.update(part, sums)
            if self.average is not None:
                self.average.update()
        total, means = self.totals(rollout, tally, sums, timer)
        self.algorithm.update(means)
        return rollout, self.figures(total, means, result)

    @torch.no_grad()
    def collect(self, batch: PromptBatch, timer: Timer, tally: dict[str, float | Tensor]) -> Rollout:
        """Samples answers, and greedy ones where the algorithm needs them, and scores them in micro-batches.

        Adds to `tally` the tokens that were generated, and the sampled answers' scores by each part of the reward.
        """
        batch = to_device(batch)
        with timer("generation"):
            sampled, greedy = self.actor.rollout(
                Prompts(batch.input_ids, batch.lengths),
                samples=self.algorithm.samples_per_prompt,
                greedy=self.algorithm.greedy,
            )
        add(tally, {"generated_tokens": sum(x.answer_lengths.sum() for x in (sampled, greedy) if x is not None)})
        with timer("scoring"):
            # As many micro-batches on every rank: a model at ZeRO-3 needs all ranks in each forward.
            forwards = math.ceil(len(sampled) / self.settings.micro_batch_size)
            rewards, baseline = self.score(sampled, greedy, forwards, tally)
            parts = zip(sampled.in_parts(forwards), rewards.tensor_split(forwards), strict=True)
            rollout = Rollout.concatenate([self.look_back(*part) for part in parts], self.pad_id)
            return replace(rollout, baseline=baseline)

    def look_back(self, sampled: Sequences, rewards: Tensor) -> Rollout:
        """What the models know of the answers at the time of the rollout, by one forward of each."""
        return Rollout(
            sampled,
            rewards,
            reference_logprobs=self.reference.logprobs(sampled),
            old_logprobs=self.actor.old_logprobs(sampled) if self.algorithm.needs_old_logprobs else None,
            values=self.critic.old_values(sampled) if self.critic else None,
            reference_hidden=self.reference.hidden(sampled) if self.reference_head else None,
        )

    def score(
        self, sampled: Sequences, greedy: Sequences | None, forwards: int, tally: dict[str, float | Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Rewards of the sampled and of the greedy answers, both from the same forwards: a ZeRO-3 reward model moves
        its weights only once for both.
        """
        both = sampled if greedy is None else Sequences.concatenate([sampled, greedy], self.pad_id)
        rewards, parts = self.reward.score_parts(both, forwards)
        add(tally, {f"reward/{name}": scores[: len(sampled)].sum() for name, scores in parts.items()})
        return rewards[: len(sampled)], None if greedy is None else rewards[len(sampled) :]

    def mini_batches(self, rollout: Rollout) -> Iterator[Rollout]:
        """The rollout in `mini_batches` parts of equal size, drawn at random when there are several."""
        if self.settings.mini_batches == 1:
            yield rollout
            return
        order = torch.randperm(len(rollout)).to(rollout.rewards.device)
        for rows in order.tensor_split(self.settings.mini_batches):
            yield rollout.select(rows)

    def update(self, rollout: Rollout, sums: dict[str, Tensor]) -> StepResult:
        """One optimizer step: gradients of all micro-batches, normalised by one denominator over micro-batches and
        ranks. Adds the algorithm's figures to `sums`.
        """
        denominator = sum_across_ranks({"count": self.algorithm.count(rollout.sequences)})["count"]
        parts, kl = list(rollout.split(self.settings.micro_batch_size)), self.algorithm.kl
        for i, batch in enumerate(parts):
            output = self.actor.logprobs(
                batch.sequences,
                entropy=True,
                stats_grad=self.algorithm.needs_entropy or (kl.needs_full_kl and kl.where == "loss"),
                reference_hidden=batch.reference_hidden,
                reference_head=self.reference_head,
            )
            loss, figures = self.algorithm.loss(batch, output, denominator)
            self.actor.backward(loss, last=i == len(parts) - 1 and self.unsupervised is None)
            add(sums, figures)
        if self.unsupervised is not None:
            add(sums, self.learn_plain_text())
        result = self.actor.step()
        if self.critic is not None:
            for i, batch in enumerate(parts):
                loss, figures = self.algorithm.value_loss(batch, self.critic.values(batch.sequences), denominator)
                self.critic.backward(loss, last=i == len(parts) - 1)
                add(sums, {k: v for k, v in figures.items() if k != "tokens"})  # the policy's loss counted them
            self.critic.step()
        return result

    def learn_plain_text(self) -> dict[str, Tensor]:
        """Adds the gradient of coefficient * (mean negative log-likelihood per token of a batch of plain text)."""
        sequences = Sequences.from_batch(to_device(next(self.unsupervised)))
        tokens = sum_across_ranks({"tokens": sequences.answer_lengths.sum()})["tokens"]
        logprobs = self.actor.logprobs(sequences, sampling=Sampling()).logprobs  # the model's, at any temperature
        loss = supervised_loss(logprobs, sequences.answer_mask, tokens)
        self.actor.backward(self.settings.unsupervised_coefficient * loss, last=True)
        return {"unsupervised_loss": loss.detach()}

    def totals(
        self, rollout: Rollout, tally: dict[str, float | Tensor], sums: dict[str, Tensor], timer: Timer
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Over the ranks: sums over the step's answers (and their number `answers`), and the algorithm's means."""
        last = rollout.sequences.input_ids.gather(1, rollout.sequences.end_index[:, None]).squeeze(1)
        eos_ids = torch.tensor(self.actor.model.hf.generation_config.eos_token_id, device=last.device)
        local = tally | {
            "answers": float(len(rollout)),
            "reward": rollout.rewards.sum(),
            "reward_square": rollout.rewards.square().sum(),
            "length": rollout.sequences.answer_lengths.sum(),
            "ended": torch.isin(last, eos_ids).sum(),
        }
        if rollout.baseline is not None:
            local["baseline"] = rollout.baseline.sum() * (len(rollout) / len(rollout.baseline))
        local |= {f"seconds_{name}": value / world_size() for name, value in timer.seconds.items()}
        total = sum_across_ranks(local | {f"algorithm/{k}": v for k, v in sums.items()})
        means = mean_metrics({k.removeprefix("algorithm/"): v for k, v in total.items() if k.startswith("algorithm/")})
        return {name: total[name] for name in local}, means | {"rows": total["answers"]}

    def figures(self, total: dict[str, float], means: dict[str, float], result: StepResult) -> dict[str, float]:
        """Means over the step's answers of all ranks."""
        seconds = {name: value for name, value in total.items() if name.startswith("seconds_")}
        sums = total.keys() - seconds.keys() - {"answers", "reward_square", "generated_tokens"}
        figures = {name: total[name] / total["answers"] for name in total if name in sums}
        figures["reward_std"] = math.sqrt(max(total["reward_square"] / total["answers"] - figures["reward"] ** 2, 0.0))
        steps = self.settings.optimizer_steps(self.algorithm)
        complete = {name for name in means if name.endswith("loss")}  # one sum per optimizer step
        figures |= {name: value / steps if name in complete else value for name, value in means.items()}
        del figures["rows"], figures["tokens"]
        figures |= seconds
        figures["seconds_per_step"] = sum(seconds.values())
        figures["tokens_per_second"] = total["generated_tokens"] / figures["seconds_per_step"]
        figures |= {
            "kl_coefficient": self.algorithm.kl.coefficient,
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
        }
        return figures | ({"skipped": 1.0} if result.skipped else {})

    def train(self, loader: DataLoader) -> dict[str, dict[str, float]]:
        """The whole training -> {"before": evaluation, "after": evaluation, "best": evaluation}.

        Raises TrainingStopped, on every rank at the same step, when the sentinel sees no point in going on.
        """
        settings = self.settings
        watchers = [*self.watchers, *([self.sentinel] if self.sentinel else [])]
        epoch_steps = steps_per_epoch(len(loader), settings.rollouts_per_step)
        total = settings.total_steps(len(loader))
        print0(f"{total} steps; answers come from {self.actor.backend}")
        before = self.measure(0, epoch_steps, best_so_far=math.inf)  # the untrained policy is no candidate for the best
        results = {"before": before, "after": before, "best": {settings.best_by: -math.inf}}
        step = evaluated = 0

        def evaluate(step: int) -> None:
            nonlocal evaluated
            after = self.measure(step, epoch_steps, best_so_far=results["best"][settings.best_by])
            results["after"], evaluated = after, step
            if after[settings.best_by] > results["best"][settings.best_by]:
                results["best"] = after

        with progress(total, desc=type(self.algorithm).__name__, unit="steps") as bar:
            for step, batches in enumerate(self.epochs(loader), start=1):
                with naming(f"step {step}"):
                    rollout, figures = self.step(batches)
                for watch in watchers:
                    figures |= watch(step, rollout, figures)
                self.metrics.log(step, {f"train/{k}": v for k, v in figures.items()}, epoch=step / epoch_steps)
                bar.update(1)
                if self.sentinel:
                    self.sentinel.stop_if_fatal()
                if step % (settings.evaluate_every or epoch_steps) and step != total:
                    continue
                evaluate(step)
                kl = results["after"]["kl_per_token"]  # reduced: every rank stops at the same step
                if settings.target_kl and kl >= settings.target_kl:
                    print0(f"stopped at step {step}: evaluation KL {kl:.3g} nats per token >= --target_kl")
                    break
                if step == total:
                    break
        if evaluated < step:  # of a stream nobody knew that it would end here
            print0(f"{step} steps{ended_early(step, total, settings.epochs)}")
            evaluate(step)
        return results

    def epochs(self, loader: DataLoader) -> Iterator[list[PromptBatch]]:
        """The prompt batches of one step after the other, epoch by epoch."""
        for epoch in range(self.settings.epochs):
            loader.sampler.set_epoch(epoch)
            yield from batches_of_steps(loader, self.settings.rollouts_per_step)

    def measure(self, step: int, epoch_steps: int, best_so_far: float) -> dict[str, float]:
        """Evaluates, logs, and hands the answers on; the figures."""
        with naming(f"evaluation at step {step}"):
            evaluation = self.evaluate()
        figures = evaluation.figures
        figures["objective"] = figures["reward"] - self.algorithm.kl.coefficient * figures["kl"]
        self.metrics.log(step, {f"eval/{k}": v for k, v in figures.items()}, epoch=step / epoch_steps)
        self.on_evaluation(step, evaluation, figures[self.settings.best_by] > best_so_far)
        return figures


def add(sums: dict[str, float | Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


@contextmanager
def naming(when: str) -> Iterator[None]:
    """A UserError raised inside, such as a reward function's, says when it happened."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{when}: {error}") from error
