"""Actor, reference, reward and critic: thin wrappers round DeepSpeed engines that speak in sequences, log-probs and
scores.

The algorithm above them knows no DeepSpeed, and these know no algorithm. A trained model is always a DeepSpeed engine.
A frozen one at ZeRO-0 is a plain module on the device (an engine would add nothing), at ZeRO-3 a DeepSpeed inference
engine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from remax.deepspeed_config import EngineConfig, inference_config, training_config
from remax.logprobs import Head, PolicyOutput, Sampling
from remax.modeling import PolicyModel, evaluating, optimizer_groups
from remax.packing import token_slots, unpacked
from remax.reward_model import RewardModel
from remax.rollout import GenerationSettings, rollout
from remax.sequences import Prompts, Sequences
from utils.distributed import device, world_size
from utils.run import UserError


@contextlib.contextmanager
def loading(config: EngineConfig) -> Iterator[None]:
    """Hugging Face models loaded inside are partitioned over the ranks as they are read when `config` is ZeRO-3.

    transformers keeps that switch process-wide. It is dropped on leaving, so that the next model loads by its own
    configuration.
    """
    if config.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    switch = HfDeepSpeedConfig(training_config(config))
    try:
        yield
    finally:
        del switch
        unset_hf_deepspeed_config()


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. total_steps and warmup_steps count optimizer steps, not micro-batches."""

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    lora_learning_rate: float | None = None


def build_optimizer(model: nn.Module, config: OptimizerConfig, offload: bool) -> torch.optim.Optimizer:
    """DeepSpeed's CPU Adam when the optimizer states live in CPU memory, else torch's AdamW (fused on a GPU), which
    needs no compiler.
    """
    groups = optimizer_groups(model, config.weight_decay, config.lora_learning_rate)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=config.learning_rate, betas=config.betas, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=torch.cuda.is_available())


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Floating-point buffers keep the number format they were loaded in, whatever a cast of the model inside does.

    transformers holds rotary frequencies in float32 in a bfloat16 model too. Casting the whole module, as DeepSpeed
    does, rounds them to three digits, and the angle at position 1000 is then off by a radian or two.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    yield
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to(device())


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step reports: learning rate used, gradient norm before clipping, and whether fp16 overflow
    skipped it.
    """

    learning_rate: float
    grad_norm: float
    skipped: bool


class TrainedEngine:
    """A model that learns. The loss given to `backward` is this rank's share of one global objective: the ranks' shares
    add up to it.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, optimizer: OptimizerConfig):
        import deepspeed
        from transformers import get_scheduler  # brings transformers' own trainer along: seconds

        self.config = config
        adam = build_optimizer(model, optimizer, config.offload)
        schedule = get_scheduler(optimizer.schedule, adam, optimizer.warmup_steps, max(optimizer.total_steps, 1))
        with buffers_kept(model):
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=adam,
                lr_scheduler=schedule,
                config=training_config(config),
                dist_init_required=False,
            )
        self.model: nn.Module = self.engine.module

    @property
    def zero3(self) -> bool:
        return self.config.zero_stage == 3

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def slots(self, sequences: Sequences) -> int:
        """Tokens that a forward over these sequences computes, padding included."""
        return token_slots(sequences, self.model.packing)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradient of `loss`, a scalar; `last` on the micro-batch before `step`.

        DeepSpeed averages gradients over the ranks; times the number of ranks makes that the sum. It must know which
        micro-batch is the last, since at ZeRO-1 and 2 it reduces inside backward and would otherwise keep the last
        micro-batch's gradient only.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world_size())

    def step(self) -> StepResult:
        """One optimizer step and one step of the schedule; none where the gradient is not finite."""
        rate = float(self.engine.get_lr()[0])
        norm = self._grad_norm_without_zero() if self.config.zero_stage == 0 and self.config.dtype == "fp32" else None
        if norm is not None and not math.isfinite(norm):  # ZeRO 1 to 3 skip such a step by themselves
            self.engine.zero_grad()
            return StepResult(rate, norm, skipped=True)
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return StepResult(rate, float(norm) if norm is not None else math.nan, not self.engine.was_step_applied())

    def _grad_norm_without_zero(self) -> float:
        """At ZeRO-0 in fp32 the gradients are whole on each rank, and DeepSpeed clips them without telling their
        norm.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


class FrozenEngine:
    """A model that only evaluates."""

    def __init__(self, model: nn.Module, config: EngineConfig):
        self.config = config
        model.requires_grad_(False).eval()
        if config.zero_stage == 3:
            import deepspeed

            with buffers_kept(model):
                self.engine, *_ = deepspeed.initialize(
                    model=model, config=inference_config(config), dist_init_required=False
                )
            self.engine.eval()
            self.model: nn.Module = self.engine.module
        else:
            with buffers_kept(model):
                self.engine = self.model = model.to(device=device(), dtype=config.torch_dtype)

    @property
    def zero3(self) -> bool:
        return self.config.zero_stage == 3


def _chunks(sequences: Sequences, chunk_size: int, same_on_all_ranks: bool) -> int:
    """Pieces of at most `chunk_size` answer tokens; the largest number among the ranks where they must call the head
    equally often.
    """
    chunks = torch.ceil(sequences.answer_lengths.sum() / chunk_size).long().clamp(min=1).to(device())
    if same_on_all_ranks and world_size() > 1:
        dist.all_reduce(chunks, op=dist.ReduceOp.MAX)
    return int(chunks)


@torch.no_grad()
def _frozen_logprobs(
    engine: FrozenEngine | TrainedEngine, sequences: Sequences, sampling: Sampling, chunk_size: int
) -> Tensor:
    chunks = _chunks(sequences, chunk_size, engine.zero3)
    with evaluating(engine.model):
        return engine.engine(sequences, chunks=chunks, sampling=sampling)[0]


class Actor(TrainedEngine):
    """The policy: it answers, says how probable answers are, and learns."""

    model: PolicyModel

    def __init__(
        self,
        model: PolicyModel,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        generation: GenerationSettings | None = None,
        sampling: Sampling = Sampling(),
        chunk_size: int = 1024,
        gather_for_generation: bool = True,
    ):
        """`sampling`: the distribution that log-probs are evaluated in: the sampling distribution, or the plain
        softmax.
        """
        super().__init__(model, config, optimizer)
        self.generation, self.sampling, self.chunk_size = generation, sampling, chunk_size
        self.gather_for_generation = gather_for_generation

    @property
    def backend(self) -> str:
        """Which code generates, for the log."""
        how = ""
        if self.zero3:
            how = (
                ", ZeRO-3 parameters gathered once per rollout"
                if self.gather_for_generation
                else ", ZeRO-3 ranks in step"
            )
        decodes = "two decodes" if self.generation.two_pass else "sampled and greedy rows in one decode"
        return f"transformers generate ({decodes}{how})"

    @contextlib.contextmanager
    def generating(self) -> Iterator[bool]:
        """Inside, `self.model.hf.generate` may be called many times; yields whether it needs `synced_gpus`.

        Under ZeRO-3 the parameters are gathered and DeepSpeed's hooks taken off meanwhile: gathering alone gains
        nothing.
        """
        with evaluating(self.model):
            if self.zero3 and self.gather_for_generation:
                from deepspeed.runtime.zero import unwrap_model_for_generation

                with unwrap_model_for_generation(self.engine):
                    yield False
            else:
                yield self.zero3

    def rollout(
        self, prompts: Prompts, *, samples: int = 1, greedy: bool = True
    ) -> tuple[Sequences | None, Sequences | None]:
        """Sampled answers (`samples` adjacent rows per prompt) and greedy ones, see `remax.rollout`."""
        with self.generating() as synced:
            return rollout(
                self.model.hf, prompts.to(device()), self.generation, samples=samples, greedy=greedy, synced_gpus=synced
            )

    def logprobs(
        self,
        sequences: Sequences,
        *,
        entropy: bool = False,
        stats_grad: bool = False,
        reference_hidden: Tensor | None = None,
        reference_head: Head | None = None,
        sampling: Sampling | None = None,
    ) -> PolicyOutput:
        """Log-probs of the answers with gradient, (B, A); entropy and full-vocabulary KL where asked for.

        `sampling`: another distribution than the actor's own, for texts that it did not draw.
        """
        logprobs, h, kl = self.engine(
            sequences,
            chunks=_chunks(sequences, self.chunk_size, self.zero3),
            sampling=sampling or self.sampling,
            entropy=entropy,
            stats_grad=stats_grad,
            reference_hidden=reference_hidden,
            reference_head=reference_head,
        )
        return PolicyOutput(logprobs, h if entropy else None, kl if reference_hidden is not None else None)

    def old_logprobs(self, sequences: Sequences) -> Tensor:
        """(B, A) log-probs without gradient, in eval mode."""
        return _frozen_logprobs(self, sequences, self.sampling, self.chunk_size)


class Reference(FrozenEngine):
    """The frozen policy that KL is measured against."""

    model: PolicyModel

    def __init__(
        self, model: PolicyModel, config: EngineConfig, *, sampling: Sampling = Sampling(), chunk_size: int = 1024
    ):  # noqa: B008
        super().__init__(model, config)
        # The reference needs support wherever the policy has some, so it is tempered like the policy but never
        # truncated.
        self.sampling, self.chunk_size = sampling.without_truncation(), chunk_size

    def logprobs(self, sequences: Sequences) -> Tensor:
        """(B, A) log-probs of the answers."""
        return _frozen_logprobs(self, sequences, self.sampling, self.chunk_size)

    @torch.no_grad()
    def hidden(self, sequences: Sequences) -> Tensor:
        """(B, A, H) hidden states, from which `head` makes the reference's full distribution chunk by chunk."""
        return self.engine(sequences, hidden_only=True)

    @torch.no_grad()
    def head(self) -> Head:
        """The output embedding as a plain function, with a whole copy of its weight on this rank (V * H numbers) at any
        ZeRO stage.
        """
        layer = self.model.hf.get_output_embeddings()
        with gathered(layer.parameters(), self.zero3):
            weight = layer.weight.detach().clone()
            bias = layer.bias.detach().clone() if getattr(layer, "bias", None) is not None else None
        return lambda hidden: self.model.scale_logits(F.linear(hidden.to(weight.dtype), weight, bias))


class Reward(FrozenEngine):
    """The frozen reward model."""

    model: RewardModel
    part_names = ()  # see `CompositeReward`

    @torch.no_grad()
    def score(self, sequences: Sequences, forwards: int = 1) -> Tensor:
        """(B,) float32 reward of each answer, read at its last token.

        forwards: how many micro-batches the rows are cut into, at most B; at ZeRO-3 the same number on every rank.
        """
        return torch.cat([self.engine(part) for part in sequences.in_parts(forwards)])

    def score_parts(self, sequences: Sequences, forwards: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
        """As `score`, and the scores of the parts that it is made of: none."""
        return self.score(sequences, forwards), {}


class TrainedReward(TrainedEngine):
    """The reward model while it learns (step 2), or a critic (PPO)."""

    model: RewardModel

    def score(self, sequences: Sequences) -> Tensor:
        """(B,) float32 with gradient."""
        return self.engine(sequences)

    def values(self, sequences: Sequences) -> Tensor:
        """(B, A) float32 with gradient: the value before each answer token."""
        return self.engine(sequences, every_token=True)

    @torch.no_grad()
    def old_values(self, sequences: Sequences) -> Tensor:
        """(B, A) values at rollout time: without gradient, in eval mode."""
        with evaluating(self.model):
            return self.values(sequences)


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], zero3: bool) -> Iterator[None]:
    """Inside, ZeRO-3 partitioned parameters are whole on every rank (read-only)."""
    if not zero3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}  # of two ways to compute the same values


@torch.no_grad()
def check_packing(engine: TrainedEngine, max_len: int, **read: bool) -> None:
    """Refuses a packing model that does not keep its rows apart. Every rank must call it: parameters may be spread.

    Four rows, one longer than the sliding window if training has such, are read padded by transformers' own attention
    and packed; what comes out must agree as well as the number format allows. A model that leaks differs by as much as
    its context matters to a token.

    max_len: tokens of the longest row in training.   read: what makes forward return a value of every answer token.

    Raises:
        UserError: naming the flag and the model's type.
    """
    model, hf = engine.model, engine.model.hf
    window = getattr(hf.config.get_text_config(), "sliding_window", None) or max_len
    # The last token of a row predicts nothing, and the one before it must lie beyond its window's first.
    longest = window + 2 if window < max_len else min(7, max_len)
    lengths = torch.tensor([longest, 3, 5, 2], device=device()).clamp(max=longest)
    ids = 7919 * torch.arange(4 * longest, device=device()) % hf.get_input_embeddings().num_embeddings
    rows = Sequences(ids.view(4, -1), torch.ones_like(lengths), lengths - 1)
    with evaluating(model):
        packed = engine.engine(rows, **read)[rows.answer_mask].float()  # (tokens, ...)
        with unpacked(model):
            padded = engine.engine(rows, **read)[rows.answer_mask].float()
    difference = float((packed - padded).abs().max() / padded.abs().max())
    if not difference <= TOLERANCE[engine.config.dtype]:
        raise UserError(
            f"--packing: cannot be used with models of the type {hf.config.model_type!r}: packed rows change each "
            f"other's values, by {difference:.1g} of the largest; leave the flag out"
        )
