"""The training runs: of the estimators, which generate what they learn from, and of the methods that read pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from experiment import (
    ESTIMATORS,
    OFFLINE,
    Offline,
    Run,
    Setting,
    UnevenReward,
    batches_for_ever,
    load_scorer,
    make_algorithm,
    prompt_loaders,
    write_json,
)

from remax.checkpoint.export import export
from remax.core.sequences import Prompts
from remax.demo.corpus import ease, true_reward
from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import TrainedReward
from remax.evaluation.policy import evaluate_policy
from remax.generation.decoder import Answers, GenerationSettings
from remax.models.loading import quiet_libraries
from remax.models.policy import PolicyModel, load_policy
from remax.training.finetune import optimizer_step
from remax.training.tasks import DirectPreference, Supervised
from remax.training.trainer import Trainer, TrainerSettings
from utils.data.batches import PairBatch, PromptBatch
from utils.distributed import init_distributed, set_seed
from utils.metrics import MetricsLogger
from utils.tokenizer import load_tokenizer

FURTHER_DRAWS = (1, 2, 3, 4)  # seeds of the supervised policy's answers; the trained ones' evaluations have seed 0


class CountingActor(Actor):
    """An actor that counts the tokens it generates."""

    generated = 0

    def rollout(self, prompts: Prompts, **options) -> Answers:
        answers = super().rollout(prompts, **options)
        self.generated += sum(part.answer_tokens for part in (answers.sampled, answers.greedy) if part is not None)
        return answers


@dataclass
class Spent:
    """What a training has cost; a process of one thread takes its CPU seconds of wall-clock on a core of its own."""

    tokens: int = 0  # generated
    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.steps += 1


class Models:
    """What the runs of a setting train and measure with."""

    def __init__(self, setting: Setting):
        self.setting, self.tokenizer = setting, load_tokenizer(setting.actor)
        self.engine = EngineConfig(zero_stage=0, dtype="fp32", micro_batch_size=setting.answers_per_step)
        self.reference = Reference(FrozenEngine(self.policy(), self.engine))
        scorer = FrozenEngine(load_scorer(setting, self.tokenizer), self.engine)
        self.reward = UnevenReward(setting, self.tokenizer, scorer)

    def policy(self) -> PolicyModel:
        return load_policy(self.setting.actor, "the policy", dtype=torch.float32, tokenizer=self.tokenizer)

    def optimizer(self, rate: float) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=rate, total_steps=1, schedule="constant")

    def actor(self, rate: float) -> CountingActor:
        generation = GenerationSettings(self.setting.max_answer, self.tokenizer.pad_token_id)
        engine = TrainedEngine(self.policy(), self.engine, self.optimizer(rate))
        return CountingActor(engine, generation=generation)

    def critic(self, rate: float) -> TrainedReward:
        scorer = load_scorer(self.setting, self.tokenizer)
        return TrainedReward(TrainedEngine(scorer, self.engine, self.optimizer(rate)))

    @cached_property
    def held_out(self) -> list[PromptBatch]:
        return list(prompt_loaders(self.setting, self.tokenizer, 1, seed=0)[1])

    def measure(self, actor: Actor, seed: int = 0) -> dict[str, Any]:
        """Held-out figures, and the true reward and the length of each answer, of answers drawn with a seed."""
        evaluation = evaluate_policy(actor, self.reference, self.reward, self.held_out, self.tokenizer, seed=seed)
        true = [true_reward(row["prompt"], row["answer"]) for row in evaluation.answers]
        each = {"true_reward": true, "length": [row["length"] for row in evaluation.answers]}
        return {"true_reward": statistics.fmean(true), "answers": each} | evaluation.figures


def begin(seed: int) -> None:
    """A process of its own, of one rank."""
    quiet_libraries()
    init_distributed()
    set_seed(seed)


def build_trainer(run: Run, models: Models, folder: Path) -> tuple[Trainer, Iterator[PromptBatch]]:
    """-> trainer, endless batches of prompts. The trainer's `measure` gives the figures alone."""
    estimator, setting = ESTIMATORS[run.estimator], models.setting
    prompts = setting.answers_per_step // estimator.answers
    loader, _ = prompt_loaders(setting, models.tokenizer, prompts, run.seed)
    algorithm = make_algorithm(estimator, setting.kl)
    actor = models.actor(run.rate)
    trainer = Trainer(
        actor,
        models.reference,
        models.reward,
        algorithm,
        TrainerSettings(micro_batch_size=setting.answers_per_step),
        measure=lambda: models.measure(actor),
        metrics=MetricsLogger(folder, tensorboard_dir=None, console_every=10**9, drop_after=-1),
        pad_id=models.tokenizer.pad_token_id,
        critic=models.critic(run.critic_rate) if algorithm.critic else None,
    )
    return trainer, batches_for_ever(loader)


def train(path: Path, run: Run, setting: Setting) -> None:
    """Trains and writes the record {run, points} to `path`.

    points: held-out figures, and true reward and length of each answer, after so much is spent; evaluation is not
    counted.
    """
    begin(run.seed)
    models, folder, spent = Models(setting), path.parent, Spent()
    trainer, batches = build_trainer(run, models, folder)
    points = [asdict(spent) | trainer.measure()]
    for mark in range(1, setting.evaluations + 1):
        while spent.tokens < setting.tokens * mark / setting.evaluations:
            batch, before = next(batches), trainer.actor.generated
            with spent.step():
                _, figures = trainer.step([batch])
            spent.tokens += trainer.actor.generated - before
            trainer.metrics.log(spent.steps, figures | {f"spent/{k}": v for k, v in asdict(spent).items()})
        points.append(asdict(spent) | trainer.measure())
        snapshot = {max(1, setting.evaluations // 2): "policy_half", setting.evaluations: "policy_end"}.get(mark)
        if run.snapshots and snapshot:
            export(trainer.actor.model, models.tokenizer, folder / snapshot, zero3=False)
    trainer.metrics.close()
    write_json(path, {"run": asdict(run), "points": points})


# ---------------------------------------------------------------------------------------------------------- from pairs


def build_task(method: Offline, actor: Actor, models: Models) -> Supervised | DirectPreference:
    """What steps 1 and 2 learn by this method's loss."""
    if method.loss == "supervised":
        return Supervised(actor, [])
    return DirectPreference(actor, models.reference, [], beta=models.setting.kl, alpha=method.alpha)


def train_offline(path: Path, run: Run, setting: Setting) -> None:
    """As `train`, for a method of `OFFLINE`: steps of step 2's program, the figures as they are for the estimators.

    The record has also the mean `ease` of the held-out prompts: by so much another task's rewards differ.
    """
    begin(run.seed)
    models, spent, method = Models(setting), Spent(), OFFLINE[run.estimator]
    actor, supervised = models.actor(run.rate), method.loss == "supervised"
    task = build_task(method, actor, models)
    rows = setting.answers_per_step // (1 if supervised else 2)
    batches: Iterator[PairBatch] = batches_for_ever(
        prompt_loaders(setting, models.tokenizer, rows, run.seed, pairs=True)[0]
    )
    points = [asdict(spent) | models.measure(actor)]
    for mark in range(1, setting.evaluations + 1):
        while spent.steps < setting.tokens / 1000 * method.steps * mark / setting.evaluations:
            batch = next(batches)
            with spent.step():
                actor.train()
                optimizer_step(task, [batch.of_chosen if supervised else batch])
        points.append(asdict(spent) | models.measure(actor))
    eases = [ease(prompt) for batch in models.held_out for prompt in batch.prompts]
    write_json(path, {"run": asdict(run), "ease": statistics.fmean(eases), "points": points})


def with_unevenness(record: dict, unevenness: float) -> dict:
    """A record of `train_offline` as another task has it: its rewards, which these methods do not see, alone differ."""
    more = unevenness * record["ease"]
    return record | {"points": [point | {"reward": point["reward"] + more} for point in record["points"]]}


def draw_supervised(path: Path, setting: Setting) -> None:
    """Writes to `path` {draws}: true reward and length of the supervised policy's answers, what win rates are over.

    The random numbers of the policies' evaluations are all the same, and so their answers would not be independent.
    """
    begin(0)
    models = Models(replace(setting, unevenness=0.0))
    actor = models.actor(rate=1.0)
    write_json(path, {"draws": [models.measure(actor, seed)["answers"] for seed in FURTHER_DRAWS]})
