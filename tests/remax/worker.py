"""What the tests let real DeepSpeed ranks do: `python worker.py JOB.json`, once per rank.

A job is {"folder": where results go, "checks": [{"check": function below, "name": ..., further arguments}, ...]}. The
checks run one after the other in the same processes; rank 0 writes what they return into results.json, and weights
into NAME.pt.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from remax.algorithms import build_algorithm, build_penalty
from remax.checkpoint.checkpoints import Checkpoints, Saving, newest
from remax.checkpoint.ema import WeightAverage
from remax.checkpoint.export import export, full_state_dict
from remax.checkpoint.state import RunState
from remax.cli.validate import make_algorithm, parse_step3
from remax.core.batches import First
from remax.core.losses import ranking_losses, supervised_loss
from remax.core.rollout import Rollout
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import EngineConfig, training_config
from remax.engines.optimizer import OptimizerConfig
from remax.engines.policy import Actor, Reference, TrainedHydra
from remax.engines.scorer import Reward, TrainedReward
from remax.engines.zero import gathered, loading
from remax.evaluation.policy import evaluate_policy, perplexity
from remax.evaluation.ranking import ranking_accuracy
from remax.generation.decoder import GenerationSettings
from remax.models.hydra import load_hydra
from remax.models.loading import evaluating, quiet_libraries
from remax.models.lora import add_lora
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model, prepare_pad_token
from remax.models.saved_adapters import add_saved
from remax.models.weights import held_part
from remax.rewards.composite import CompositeReward, FunctionReward, Part
from remax.rewards.functions import RewardFunction
from remax.stages.models import build_models, check_models
from remax.stages.settings import trainer_settings
from remax.training.finetune import finetune
from remax.training.loop import Cadence
from remax.training.tasks import DirectPreference, Hydra, Ranking, Supervised
from remax.training.trainer import Trainer, TrainerSettings
from utils.adapter_folder import is_adapter
from utils.data.batches import PromptBatch, SupervisedBatch
from utils.data.collate import pad
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.distributed import gather_objects, init_distributed, is_main, rank, set_seed, sum_across_ranks, world_size
from utils.metrics import MetricsLogger
from utils.run import UserError
from utils.tokenizer import load_tokenizer

RATE = 3e-3
EPSILON = 1e-3  # Adam's: with 1e-8 it divides noise by noise where a gradient is zero but for rounding


CHECKS: dict[str, Callable[..., dict]] = {}


def check(function: Callable[..., dict]) -> Callable[..., dict]:
    """Makes a function callable by its name from a job."""
    CHECKS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Spread:
    """How a model is loaded and spread: what the checks have in common."""

    model: str
    zero_stage: int = 0
    offload: bool = False
    offload_parameters: bool = False
    dtype: str = "fp32"
    micro_batch: int = 8
    gradient_checkpointing: bool = False
    lora: str | None = None  # name of the layers with adapters, or whether those of a PEFT folder stay apart
    new_pad: bool = False  # a pad token is added to the tokenizer, as in step 2
    new_head: bool = False
    packing: bool = False
    overlap: bool = False  # DeepSpeed reduces gradients during the backward pass, as on a GPU

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            self.zero_stage, self.offload, self.offload_parameters, self.dtype, self.micro_batch, gradient_clipping=1.0
        )

    @property
    def tokenizer(self):
        tokenizer = load_tokenizer(self.model)
        if self.new_pad:
            prepare_pad_token(tokenizer)
        return tokenizer

    def policy(self):
        options = {"gradient_checkpointing": self.gradient_checkpointing, "tokenizer": self.tokenizer}
        options |= {"packing": self.packing, "merged": not self.lora}
        with loading(self.config):
            model = load_policy(self.model, "--model", dtype=self.config.torch_dtype, **options)
        if self.lora and is_adapter(self.model):
            add_saved(model.hf, self.model, "--model")
        elif self.lora:
            add_lora(model.hf, 3, self.lora, True, "--lora_module_name")
        return model

    def scorer(self):
        options = {"tokenizer": self.tokenizer, "new_head": self.new_head, "packing": self.packing}
        with loading(self.config):
            return load_reward_model(self.model, "--model", dtype=self.config.torch_dtype, **options)

    def hydra(self):
        options = {"tokenizer": self.tokenizer, "new_head": True, "packing": self.packing}
        options |= {"gradient_checkpointing": self.gradient_checkpointing}
        with loading(self.config):
            model = load_hydra(self.model, "--model", dtype=self.config.torch_dtype, **options)
        if self.lora:
            add_lora(model.hf, 3, self.lora, True, "--lora_module_name")
        return model

    def trained_hydra(self, **options) -> TrainedHydra:
        return with_epsilon(TrainedHydra(self.trained(self.hydra()), **options))

    def actor(self, **options) -> Actor:
        return with_epsilon(Actor(self.trained(self.policy()), **options))

    def trained_reward(self) -> TrainedReward:
        return with_epsilon(TrainedReward(self.trained(self.scorer())))

    def trained(self, model) -> TrainedEngine:
        settings = training_config(self.config)
        settings["zero_optimization"]["overlap_comm"] = self.overlap
        with patch("remax.engines.base.training_config", return_value=settings):
            return TrainedEngine(model, self.config, optimizer())


def optimizer() -> OptimizerConfig:
    return OptimizerConfig(RATE, total_steps=10, warmup_steps=2, schedule="cosine", weight_decay=0.1)


def with_epsilon(trained):
    for group in trained.engine.wrapped.optimizer.param_groups:
        group["eps"] = EPSILON
    return trained


def load_rows(path: str) -> Sequences:
    return Sequences(**torch.load(path))


def mine(rows: torch.Tensor | list[int] | range) -> torch.Tensor:
    """This rank's share of the rows."""
    return torch.as_tensor(list(rows))[rank() :: world_size()]


def save_weights(folder: Path, name: str, trained) -> None:
    state = full_state_dict(trained.model.hf, trained.zero3)
    if is_main():
        torch.save(state, folder / f"{name}.pt")


def take_steps(trained, steps: int, loss_of, rows: int, micro_batch: int) -> dict:
    """Optimizer steps over this rank's share of all rows; loss_of(step, rows) is the rows' share of the loss.

    In fp16 a step that overflows is taken again, with a lower loss scale.
    """
    losses, norms, rates, skipped, scales = [], [], [], [], []
    trained.train()
    while len(losses) < steps:
        step = len(losses)
        total, parts = torch.zeros(()), mine(range(rows)).split(micro_batch)
        for i, part in enumerate(parts):
            loss = loss_of(step, part)
            trained.backward(loss, last=i == len(parts) - 1)
            total += loss.detach().float()
        result = trained.step()
        skipped.append(result.skipped)
        scales.append(result.loss_scale)
        if result.skipped:
            assert trained.engine.config.dtype == "fp16" and len(skipped) < 20
            continue
        losses.append(sum_across_ranks({"loss": total})["loss"])
        norms.append(result.grad_norm)
        rates.append(result.learning_rate)
    return {"losses": losses, "grad_norms": norms, "learning_rates": rates, "skipped": skipped, "scales": scales}


# --- training


@check
def train_policy(folder: Path, name: str, rows: list[str], steps: int, chunk_size: int = 1024, **spread) -> dict:
    """Steps on files of sequences: minus their mean log-prob per token."""
    spread = Spread(**spread)
    actor = spread.actor(chunk_size=chunk_size)
    files = [load_rows(path) for path in rows]

    def loss_of(step: int, part: torch.Tensor) -> torch.Tensor:
        everything = files[step % len(files)]
        sequences = everything.select(part)
        tokens = int(everything.answer_lengths.sum())
        return supervised_loss(actor.logprobs(sequences).logprobs, sequences.answer_mask, tokens)

    figures = take_steps(actor, steps, loss_of, len(files[0]), spread.micro_batch)
    save_weights(folder, name, actor)
    frozen_copy = Reference(FrozenEngine(spread.policy(), spread.config))
    buffers = [buffer for engine in (actor, frozen_copy) for buffer in engine.model.buffers()]
    figures["buffers"] = sorted({str(buffer.dtype) for buffer in buffers if buffer.is_floating_point()})
    return figures


@check
def go_on(folder: Path, name: str, rows: str, place: str, steps: list[int], **spread) -> dict:
    """Steps, a checkpoint in `place`, and further steps; where there is a checkpoint already, the latter alone.

    Weights are kept as they are at the checkpoint (NAME.pt) and at the end (NAME-end.pt).
    """
    spread = Spread(**spread)
    actor, everything, before = spread.actor(), load_rows(rows), 0
    average = WeightAverage(actor.model.hf, zero3=actor.zero3)
    tokens = int(everything.answer_lengths.sum())

    def loss_of(step: int, part: torch.Tensor) -> torch.Tensor:
        part = everything.select(part)
        return supervised_loss(actor.logprobs(part).logprobs, part.answer_mask, tokens)

    found = newest(Path(place))
    checkpoints = Checkpoints(Path(place), Saving(), {"test": name}, found=found)
    checkpoints.begin(RunState({"actor": actor.engine}, average=average))
    noise = torch.rand(3).tolist()
    if not found:
        before = steps[0]
        take_steps(actor, before, loss_of, len(everything), spread.micro_batch)
        average.update()
        torch.rand(rank() + 1)
        if spread.dtype == "fp16":  # another scale than that of a start
            actor.engine.wrapped.optimizer.loss_scaler.cur_scale = 2.0**9
        checkpoints.save(before)
        checkpoints.finish()
        noise = torch.rand(3).tolist()
    save_weights(folder, name, actor)
    state = average.state()
    if is_main():
        torch.save(state, folder / f"{name}-average.pt")
    figures = take_steps(actor, steps[1], loss_of, len(everything), spread.micro_batch)
    save_weights(folder, f"{name}-end", actor)
    return figures | {"noise": gather_objects(noise), "step": found.step if found else 0}


@check
def not_finite(folder: Path, name: str, rows: str, **spread) -> dict:
    """Four steps; in the second one the loss of one micro-batch on rank 0 is not a number."""
    spread = Spread(**spread)
    actor = spread.actor()
    everything, skipped, norms = load_rows(rows), [], []
    tokens = int(everything.answer_lengths.sum())
    actor.train()
    for step in range(4):
        parts = mine(range(len(everything))).split(spread.micro_batch)
        for i, part in enumerate(parts):
            sequences = everything.select(part)
            loss = supervised_loss(actor.logprobs(sequences).logprobs, sequences.answer_mask, tokens)
            broken = step == 1 and i == 0 and is_main()
            actor.backward(loss * (float("nan") if broken else 1.0), last=i == len(parts) - 1)
        result = actor.step()
        skipped.append(result.skipped)
        norms.append(result.grad_norm)
    save_weights(folder, name, actor)
    return {"skipped": gather_objects(skipped), "finite": [math.isfinite(norm) for norm in norms]}


@check
def add_up(folder: Path, name: str, rows: str, times: int, **spread) -> dict:
    """The gradient norm of the same micro-batch once, and of the sum of many."""
    spread, norms = Spread(**spread), []
    actor = spread.actor()
    part = load_rows(rows).select(mine(range(8))[:2])
    for n in (1, times):  # at a learning rate of 0: the warm-up has not begun
        for i in range(n):
            loss = supervised_loss(actor.logprobs(part).logprobs, part.answer_mask, 100)
            actor.backward(loss, last=i == n - 1)
        norms.append(actor.step().grad_norm)
    return {"norms": norms}


@check
def train_reward(folder: Path, name: str, rows: list[str], steps: int, **spread) -> dict:
    """Steps on pairs: even rows of a file are chosen over odd ones."""
    spread = Spread(**spread)
    reward = spread.trained_reward()
    files = [load_rows(path) for path in rows]
    pairs = len(files[0]) // 2

    def loss_of(step: int, part: torch.Tensor) -> torch.Tensor:
        scores = reward.score(files[step % len(files)].select(torch.cat([2 * part, 2 * part + 1])))
        chosen, rejected = scores.chunk(2)
        return ranking_losses(chosen, rejected).sum() / pairs

    figures = take_steps(reward, steps, loss_of, pairs, spread.micro_batch)
    save_weights(folder, name, reward)
    return figures


@check
def train_hydra(folder: Path, name: str, rows: list[str], steps: int, **spread) -> dict:
    """Steps on both heads: even rows of a file are learned, and chosen over odd ones."""
    spread = Spread(**spread)
    hydra = spread.trained_hydra(chunk_size=16)
    files = [load_rows(path) for path in rows]
    pairs = len(files[0]) // 2

    def loss_of(step: int, part: torch.Tensor) -> torch.Tensor:
        everything = files[step % len(files)]
        tokens = int(everything.answer_lengths[::2].sum())
        logprobs, scores = hydra.logprobs_and_scores(everything.select(torch.cat([2 * part, 2 * part + 1])), len(part))
        chosen, rejected = scores.chunk(2)
        likelihood = supervised_loss(logprobs, everything.select(2 * part).answer_mask, tokens)
        return likelihood + 0.3 * ranking_losses(chosen, rejected).sum() / pairs

    figures = take_steps(hydra, steps, loss_of, pairs, spread.micro_batch)
    save_weights(folder, name, hydra)
    return figures


# --- the update of the RL loop, cut in all ways


def fixed_rollout(path: str, rows: torch.Tensor) -> Rollout:
    """The rows of a saved rollout."""
    fields = torch.load(path)
    return Rollout(Sequences(**fields.pop("sequences")), **fields).select(rows)


def plain_texts(paths: list[str]):
    """Batches of this rank's share of the rows of one file after the other."""
    for path in paths:
        rows = load_rows(path).select(mine(range(8)))
        lengths = {"lengths": rows.lengths, "prompt_lengths": rows.prompt_lengths}
        yield SupervisedBatch(input_ids=rows.input_ids, **lengths, weight=torch.ones(len(rows)))


@check
def trainer_update(
    folder: Path,
    name: str,
    rollouts: list[str],
    order: list[int] | None = None,
    rollouts_per_step: int = 1,
    extra_columns: int = 0,
    algorithm: dict | None = None,
    critic: dict | None = None,
    texts: list[str] | None = None,
    sampling: list | None = None,
    mini_batches: int = 1,
    critic_warmup_steps: int = 0,
    **spread,
) -> dict:
    """One step of the RL loop per saved rollout, with the actor's collecting replaced by the saved rows.

    texts: files of sequences that are mixed in as plain text, one per step.
    """
    spread = Spread(**spread)
    settings = {"name": "remax", **(algorithm or {})}
    if (penalty := settings.pop("penalty", None)) is not None:
        start = build_algorithm(settings["name"]).kl
        settings["kl"] = build_penalty(start, **penalty)
    actor = spread.actor(chunk_size=16, sampling=Sampling(*(sampling or ())))
    value_model = replace(spread, **critic).trained_reward() if critic else None
    reference = Reference(FrozenEngine(Spread(spread.model).policy(), EngineConfig()))
    trainer = Trainer(
        actor,
        reference,
        reward=None,
        algorithm=build_algorithm(**settings, sum_across_ranks=sum_across_ranks),
        settings=TrainerSettings(
            micro_batch_size=spread.micro_batch,
            mini_batches=mini_batches,
            critic_warmup_steps=critic_warmup_steps,
            unsupervised_coefficient=0.5,
        ),
        measure=None,
        metrics=None,
        pad_id=spread.tokenizer.pad_token_id,
        critic=value_model,
        unsupervised=plain_texts(texts) if texts else None,
    )

    saved: list[Rollout] = []

    def answer(batch: PromptBatch) -> tuple[Sequences, None, None]:
        rollout = fixed_rollout(batch.prompts[0], batch.input_ids)
        sequences = rollout.sequences
        wide = torch.nn.functional.pad(sequences.input_ids, (0, extra_columns), value=7)
        saved.append(replace(rollout, sequences=replace(sequences, input_ids=wide)))
        return saved[-1].sequences, None, None

    def score(sampled: Sequences, greedy: None, columns: dict) -> tuple[torch.Tensor, torch.Tensor, None, dict]:
        return saved[-1].rewards, saved[-1].baseline, None, {}

    def annotate(scored: Rollout) -> Rollout:
        rollout, sampled = saved[-1], scored.sequences
        if trainer.reference_head is not None:
            rollout = replace(rollout, reference_hidden=reference.hidden(sampled))
        if value_model is not None:
            old = actor.old_logprobs(sampled)
            rollout = replace(rollout, old_logprobs=old, values=value_model.old_values(sampled))
        return rollout

    trainer.answer, trainer.score, trainer.annotate = answer, score, annotate
    figures = []
    for step, path in enumerate(rollouts, start=1):
        rows = len(torch.load(path)["rewards"])
        shares = mine(order or range(rows)).tensor_split(rollouts_per_step)
        # In the place of prompts: a saved rollout, and which of its rows.
        ones = torch.ones(rows)
        batches = [PromptBatch(input_ids=part, lengths=part, weight=ones, prompts=[path]) for part in shares]
        step_figures = trainer.learn(step, batches)
        figures.append({k: v for k, v in step_figures.items() if "second" not in k})
    save_weights(folder, name, actor)
    if value_model is not None:
        save_weights(folder, f"{name}-critic", value_model)
    return {"figures": figures}


# --- ZeRO-3: generation and frozen models


@check
def generate(
    folder: Path, name: str, prompts: dict, eos_ids: list[int], gather: bool, max_new_tokens: int, rows: str, **spread
) -> dict:
    """Greedy answers, a training step, greedy answers again; rank r takes every world_size-th prompt."""
    spread = Spread(**spread)
    settings = GenerationSettings(max_new_tokens, spread.tokenizer.pad_token_id)
    actor = spread.actor(generation=settings, gather_for_generation=gather)
    actor.model.hf.generation_config.eos_token_id = eos_ids
    share = mine(range(len(prompts["lengths"])))
    batch = Prompts(torch.tensor(prompts["input_ids"])[share], torch.tensor(prompts["lengths"])[share])

    def answer() -> list[list[int]]:
        answers = actor.rollout(batch)
        greedy = answers.greedy
        assert len(answers.sampled) == len(greedy) == len(batch)
        texts = [greedy.input_ids[i, : greedy.lengths[i]].tolist() for i in range(len(greedy))]
        shares = gather_objects(texts)
        return [shares[i % world_size()][i // world_size()] for i in range(len(prompts["lengths"]))]

    before = answer()
    everything = load_rows(rows)

    def loss_of(step: int, part: torch.Tensor) -> torch.Tensor:
        sequences = everything.select(part)
        tokens = int(everything.answer_lengths.sum())
        return supervised_loss(actor.logprobs(sequences).logprobs, sequences.answer_mask, tokens)

    figures = take_steps(actor, 3, loss_of, len(everything), spread.micro_batch)
    after = answer()
    save_weights(folder, name, actor)
    return {"before": before, "after": after, "training": actor.model.training, "backend": actor.backend, **figures}


@check
def frozen(folder: Path, name: str, rows: str, scorer: str, sampling: list, chunk_size: int, **spread) -> dict:
    """Reference log-probs, reward scores, and the KL of a trained actor to the reference, over all rows in order."""
    spread = Spread(**spread)
    sampling = Sampling(*sampling)
    reference = Reference(FrozenEngine(spread.policy(), spread.config), sampling=sampling, chunk_size=chunk_size)
    reward = Reward(FrozenEngine(replace(spread, model=scorer).scorer(), spread.config))
    other = replace(spread, zero_stage=2, offload_parameters=False)
    actor = other.actor(sampling=sampling, chunk_size=chunk_size)
    everything = load_rows(rows)
    share = mine(range(len(everything)))
    if rank() == 0:
        share = share[: len(share) - 1]  # unequal numbers of rows, and of chunks, on the ranks
    sequences = everything.select(share)
    with torch.no_grad():  # the actor's weights differ from the reference's
        for parameter in actor.model.parameters():
            parameter.mul_(1.05)
    output = actor.logprobs(
        sequences, entropy=True, reference_hidden=reference.hidden(sequences), reference_head=reference.head()
    )
    values = {
        "reference_logprobs": reference.logprobs(sequences),
        "scores": reward.score(sequences),
        "full_kl": output.full_kl,
        "logprobs": output.logprobs,
    }
    table = {int(row): {k: v[i].tolist() for k, v in values.items()} for i, row in enumerate(share)}
    return {"rows": {row: values for part in gather_objects(table) for row, values in part.items()}}


# --- step 3 by its flags


@check
def training_by_flags(folder: Path, name: str, flags: list[str], prompts: list[list[int]], steps: int) -> dict:
    """Steps of step 3 from prompts on. Saved is what learned, by the names that it has on a trunk.

    prompts: the rows of all ranks, which take turns.
    """
    args = parse_step3(flags)
    tokenizers = check_models(args)
    set_seed(0)
    models = build_models(args, tokenizers, steps)
    actor, critic = models.actor, models.critic
    trainer = Trainer(
        actor,
        models.reference,
        models.reward,
        make_algorithm(args, sum_across_ranks=sum_across_ranks),
        trainer_settings(args),
        measure=None,
        metrics=None,
        pad_id=tokenizers.actor.pad_token_id,
        critic=critic,
        judge=models.judge,
    )
    engines = {id(role.engine): role.engine for role in (actor, models.reference, critic) if role is not None}
    for learner in (actor, critic):
        if learner is not None:
            with_epsilon(learner)

    def frozen() -> list[torch.Tensor]:
        parameters = [p for engine in engines.values() for p in engine.model.parameters()]
        return [held_part(p).clone() for p in parameters if not p.requires_grad]

    before, share = frozen(), [prompts[i] for i in mine(range(len(prompts)))]
    ids, lengths = pad(share, tokenizers.actor.pad_token_id, left=True)
    batch = PromptBatch(input_ids=ids, lengths=lengths, weight=torch.ones(len(share)), prompts=[""] * len(share))
    figures = [trainer.step([batch])[1] for _ in range(steps)]
    learned = {}
    for role, of_its_own in ((actor, "actor"), (critic, "critic")):
        if role is not None and (role is actor or not trainer.one_engine):
            state = full_state_dict(role.model.hf, role.zero3)
            learned |= {key.replace(".default.", f".{of_its_own}."): x for key, x in state.items() if ".lora_" in key}
    if critic is not None:
        head = critic.model.head if critic.use is None else critic.engine.model.value
        with gathered(head.parameters(), critic.zero3):
            learned["value"] = head.weight.detach().clone()
    if is_main():
        torch.save(learned, folder / f"{name}.pt")
    after = frozen()
    return {
        "figures": [{k: v for k, v in of_step.items() if "second" not in k} for of_step in figures],
        "frozen": len(before),
        "moved": sum(not torch.equal(*pair) for pair in zip(before, after, strict=True)),
        "engines": len(engines),
        "parts": [part.scorer.engine in engines.values() for part in models.reward.models],
        "active": [getattr(engine.model, "active", None) for engine in engines.values()],
    }


# --- exports


@check
def export_policy(folder: Path, name: str, rows: str, average: bool = False, **spread) -> dict:
    """A training step, then the export, and what the engine says of some rows."""
    spread = Spread(**spread)
    actor = spread.actor()
    everything = load_rows(rows)
    ema = WeightAverage(actor.model.hf, zero3=actor.zero3, decay=0.75) if average else None

    def loss_of(step: int, part: torch.Tensor) -> torch.Tensor:
        sequences = everything.select(part)
        return supervised_loss(actor.logprobs(sequences).logprobs, sequences.answer_mask, 10)

    start = full_state_dict(actor.model.hf, actor.zero3)
    losses = []
    for _ in range(2):  # exporting must not disturb the training
        losses += take_steps(actor, 1, loss_of, len(everything), spread.micro_batch)["losses"]
        export(actor.model, spread.tokenizer, folder / name, zero3=actor.zero3)
        if ema is not None:
            ema.update()
    save_weights(folder, name, actor)
    if ema is not None:
        export(actor.model, spread.tokenizer, folder / f"{name}-average", zero3=actor.zero3, state=ema.state())
        if is_main():
            torch.save(start, folder / f"{name}-start.pt")
    return {"losses": losses, "logprobs": actor.old_logprobs(everything).tolist()}


@check
def export_reward(folder: Path, name: str, texts: list[list[str]], **spread) -> dict:
    """As step 2 ends: the scores of some texts and the export."""
    spread = Spread(**spread)
    torch.manual_seed(rank())
    reward, tokenizer = spread.trained_reward(), spread.tokenizer
    rows = []
    for prompt, answer in texts:
        start, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        rows.append((start, rest + [tokenizer.eos_token_id]))
    width = max(len(start) + len(rest) for start, rest in rows)
    ids = [start + rest + [tokenizer.pad_token_id] * (width - len(start) - len(rest)) for start, rest in rows]
    lengths = [torch.tensor([len(part) for part in parts]) for parts in zip(*rows, strict=True)]
    sequences = Sequences(torch.tensor(ids), *lengths)
    chosen = mine(range(len(sequences)))

    def loss_of(step: int, part: torch.Tensor) -> torch.Tensor:
        return -reward.score(sequences.select(part)).sum() / len(sequences)

    take_steps(reward, 2, loss_of, len(sequences), spread.micro_batch)
    export(reward.model, tokenizer, folder / name, zero3=reward.zero3)
    save_weights(folder, name, reward)
    with evaluating(reward.model), torch.no_grad():
        return {"scores": reward.score(sequences).tolist(), "share": chosen.tolist()}


# --- evaluation and fine-tuning


def loaders(stage: int, spread: Spread, data: str, batch: int, cache: str):
    return build_loaders(
        DataConfig(data_path=[data], cache_dir=cache, data_split="1,1,1", seed=0),
        stage=stage,
        tokenizer=spread.tokenizer,
        max_len=96,
        train_batch_size=batch,
        eval_batch_size=2,
        rank=rank(),
        world_size=world_size(),
    )


@check
def evaluate(folder: Path, name: str, data: str, scorer: str, cache: str, **spread) -> dict:
    """All figures on an odd number of held-out rows."""
    spread = Spread(**spread)
    scores = replace(spread, model=scorer)
    actor = spread.actor(generation=GenerationSettings(8, spread.tokenizer.pad_token_id))
    reference = Reference(FrozenEngine(spread.policy(), spread.config))
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.mul_(1.02)
    _, supervised = loaders(0, spread, data, 1, cache)
    _, ranking = loaders(1, spread, data, 1, cache)
    _, prompts = loaders(2, spread, data, 1, cache)
    judge = Part("judge", Reward(FrozenEngine(scores.scorer(), spread.config)), weight=0.5, mean=0.1, std=2.0)
    length = FunctionReward(
        RewardFunction("length", lambda prompt, answer: len(answer), False, False), spread.tokenizer
    )
    reward = CompositeReward([judge, Part("length", length, weight=-0.1)])
    policy = evaluate_policy(actor, reference, reward, prompts, spread.tokenizer, greedy=True)
    return {
        "perplexity": perplexity(actor, supervised),
        "first": perplexity(actor, First(supervised, 1)),
        "ranking": ranking_accuracy(scores.trained_reward(), ranking),
        "policy": policy.figures,
        "answers": sorted(policy.answers, key=lambda row: (row["prompt"], row["answer"])),
        "training": actor.model.training,
    }


@check
def function_fails(folder: Path, name: str, **spread) -> dict:
    """What every rank is told when a reward function fails on the last one."""

    def fails(prompt: str, answer: str) -> float:
        return 1 / (world_size() - 1 - rank())

    reward = FunctionReward(RewardFunction("rules:fails", fails, False, False), tokenizer=None)
    try:
        reward.score_texts(["prompt"], ["answer"])
    except UserError as error:
        return {"errors": gather_objects(str(error))}
    return {"errors": None}


@check
def refused(folder: Path, name: str, **spread) -> dict:
    """What every rank says of a model whose weights cannot be used."""
    spread, errors = Spread(**spread), {}
    for loader in (spread.policy, spread.scorer):
        try:
            loader()
        except UserError as error:
            errors[loader.__name__] = str(error)
    return {"errors": gather_objects(errors)}


@check
def fine_tune(
    folder: Path, name: str, task: str, data: str, cache: str, batch: int, accumulation: int, max_steps: int, **spread
) -> dict:
    """A whole fine-tuning of step 1 or 2."""
    spread = Spread(**spread)
    set_seed(0)
    train_loader, eval_loader = loaders(0 if task == "supervised" else 1, spread, data, batch, cache)
    cadence = Cadence(epochs=2, batches_per_step=accumulation, max_steps=max_steps, evaluate_every=2)
    if task == "supervised":
        job = Supervised(spread.actor(), eval_loader)
    elif task == "preference":
        frozen_part = replace(spread, zero_stage=3)
        reference = Reference(FrozenEngine(frozen_part.policy(), frozen_part.config))
        job = DirectPreference(spread.actor(), reference, eval_loader, beta=0.5)
    elif task == "hydra":
        job = Hydra(spread.trained_hydra(), eval_loader, ranking_weight=0.3)
    else:
        job = Ranking(spread.trained_reward(), eval_loader)
    metrics = MetricsLogger(folder / name, drop_after=-1)
    results = finetune(job, train_loader, cadence, metrics)
    metrics.close()
    return {"results": results, "steps": cadence.total_steps(len(train_loader))}


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    faulthandler.enable()  # a rank that aborts says in its log where it was
    job = json.loads(Path(sys.argv[1]).read_text())
    quiet_libraries()
    init_distributed()
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses fp16 on most CPUs, where torch computes it
    folder, results = Path(job["folder"]), {}
    for arguments in job["checks"]:
        function, name = CHECKS[arguments.pop("check")], arguments["name"]
        results[name] = function(folder, **arguments)
        gc.collect()
        if is_main():
            (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
