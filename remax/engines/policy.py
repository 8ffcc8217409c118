"""The policy's roles: actor, frozen actor and reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from remax.core.logprobs import Head, PolicyOutput
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.engines.zero import gathered
from remax.generation.decode import GenerationSettings, rollout
from remax.models.loading import evaluating
from remax.models.policy import PolicyModel
from utils.distributed import device, world_size


class FrozenActor(FrozenEngine):
    """A policy that answers, and tells how probable answers are, but does not learn."""

    model: PolicyModel

    def __init__(
        self, model: PolicyModel, config: EngineConfig, generation: GenerationSettings, chunk_size: int = 1024
    ):
        super().__init__(model, config)
        self.generation, self.chunk_size = generation, chunk_size

    def rollout(
        self, prompts: Prompts, *, samples: int = 1, greedy: bool = True
    ) -> tuple[Sequences | None, Sequences | None]:
        """Sampled answers (`samples` adjacent rows per prompt) and greedy ones, see `remax.rollout`."""
        return rollout(self.model.hf, prompts.to(device()), self.generation, samples=samples, greedy=greedy)

    @torch.no_grad()
    def logprobs(
        self, sequences: Sequences, *, entropy: bool = False, sampling: Sampling | None = None
    ) -> PolicyOutput:
        """(B, A) log-probs of the answers, and their entropy, in the distribution that answers are sampled from, or in
        another one.
        """
        chunks = 1 + int(sequences.answer_lengths.sum()) // self.chunk_size
        sampling = sampling or self.generation.sampling
        logprobs, h, _ = self.model(sequences, chunks=chunks, sampling=sampling, entropy=entropy)
        return PolicyOutput(logprobs, h if entropy else None)

    @torch.no_grad()
    def beam_search(self, prompts: Prompts, beams: int, best: int) -> Sequences:
        """The `best` most probable answers per prompt (adjacent rows) among `beams` that are followed."""
        hf, settings, prompts = self.model.hf, self.generation, prompts.to(device())
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            num_beams=beams,
            num_return_sequences=best,
            do_sample=False,
            eos_token_id=hf.generation_config.eos_token_id,
            pad_token_id=settings.pad_id,
        )
        out = hf.generate(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=config)
        answers = out[:, prompts.input_ids.shape[1] :]  # (B * best, A)
        return Sequences.from_generation(prompts.repeat(best), answers, config.eos_token_id, settings.pad_id)


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
