"""The roles of a policy: the actor, which answers and may learn, and the reference that it is held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from remax.core.linear import linear_in_float32
from remax.core.logprobs import Head, PolicyOutput, in_one_call
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.engines.base import Engine
from remax.engines.roles import Learner, Role
from remax.engines.zero import gathered
from remax.generation.decoder import Answers, Decoder, GenerationSettings
from remax.generation.rollout import DEFAULT_DECODER, rollout
from remax.models.packing import shares_prompts, unpacked
from remax.models.trunk import REFERENCE_AND_REWARD, REWARD, Use
from utils.distributed import device, largest_of_ranks
from utils.present import present


class _Policy(Role):
    """What actor and reference share: the log-probs of given answers.

    Attributes:
        sampling: The distribution that log-probs are evaluated in.
        chunk_size: Answer tokens whose logits are in memory at once.
    """

    def __init__(self, engine: Engine, sampling: Sampling, chunk_size: int, use: Use | None):
        super().__init__(engine, use)
        self.sampling, self.chunk_size = sampling, chunk_size

    def _chunks(self, sequences: Sequences, sampling: Sampling, **wanted: Any) -> int:
        """Pieces of at most `chunk_size` answer tokens, for what `in_one_call` asks about.

        At ZeRO-3 the ranks must call the head equally often: the largest number among them, where it is called for each
        piece.
        """
        chunks = max(math.ceil(sequences.answer_tokens / self.chunk_size), 1)
        once = not self.zero3 or (self.model.fused and in_one_call(sampling, **wanted))
        return chunks if once else largest_of_ranks(chunks)

    @torch.no_grad()
    def _frozen_logprobs(self, sequences: Sequences, forwards: int, hidden: Tensor | None = None) -> Tensor:
        """(B, A) log-probs without gradient, in eval mode; of the rows' `hidden` states, where they are known."""

        def read(part: Sequences) -> Tensor:
            chunks = self._chunks(part, self.sampling)
            return self.ask(part, chunks=chunks, sampling=self.sampling, hidden=hidden)[0]

        with self.reading():
            return self.in_forwards(sequences, forwards if hidden is None else 1, read)


class Actor(_Policy, Learner):
    """The policy: it answers, says how probable answers are, and on a `TrainedEngine` learns."""

    def __init__(
        self,
        engine: Engine,
        *,
        generation: GenerationSettings | None = None,
        sampling: Sampling | None = None,
        chunk_size: int = 1024,
        gather_for_generation: bool = True,
        decoder: Decoder = DEFAULT_DECODER,
        use: Use | None = None,
    ):
        """Gives an engine the role.

        Args:
            generation: How it answers; None: it is not asked to.
            sampling: The distribution that log-probs are evaluated in; by default the one that answers are drawn from.
            chunk_size: Answer tokens whose logits are in memory at once.
            gather_for_generation: See `Engine.generating`.
            use: See `Role`.
        """
        if sampling is None:
            sampling = generation.sampling if generation is not None else Sampling()
        super().__init__(engine, sampling, chunk_size, use)
        self._generation, self.gather_for_generation, self.decoder = generation, gather_for_generation, decoder

    @property
    def generation(self) -> GenerationSettings:
        """How it answers."""
        return present(self._generation, "Actor.generation")

    @generation.setter
    def generation(self, settings: GenerationSettings) -> None:
        self._generation = settings

    @property
    def backend(self) -> str:
        """Which code generates, for the log."""
        how = ""
        if self.zero3:
            gathers = self.gather_for_generation
            how = ", ZeRO-3 parameters gathered once per rollout" if gathers else ", ZeRO-3 ranks in step"
        return f"{self.decoder.name}{how}"

    @contextmanager
    def generating(self) -> Iterator[bool]:
        """See `Engine.generating`; inside, the model itself is the actor, and reads rows that are not packed."""
        with self.switched(), unpacked(self.model), self.engine.generating(self.gather_for_generation) as synced:
            yield synced

    def rollout(self, prompts: Prompts, *, samples: int = 1, greedy: bool = True, logprobs: bool = False) -> Answers:
        """Sampled answers (`samples` adjacent rows per prompt), greedy ones, and their tokens' log-probs if wanted."""
        with self.generating() as synced:
            return rollout(
                self.model.hf,
                prompts.to(device()),
                self.generation,
                samples=samples,
                greedy=greedy,
                logprobs=logprobs,
                synced_gpus=synced,
                decoder=self.decoder,
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

        Args:
            stats_grad: Entropy and KL carry a gradient too.
            reference_hidden: (B, A, H), from `Reference.hidden`, for the KL.
            reference_head: From `Reference.head`, for the KL.
            sampling: Another distribution than the actor's own, for texts that it did not draw.
        """
        sampling = sampling or self.sampling
        wanted = {"entropy": entropy, "stats_grad": stats_grad, "reference_hidden": reference_hidden}
        chunks = self._chunks(sequences, sampling, **wanted)
        logprobs, h, kl = self.ask(sequences, chunks=chunks, sampling=sampling, reference_head=reference_head, **wanted)
        return PolicyOutput(logprobs, h if entropy else None, kl if reference_hidden is not None else None)

    def old_logprobs(self, sequences: Sequences, forwards: int = 1) -> Tensor:
        """(B, A) log-probs without gradient, in eval mode; see `Role.in_forwards`."""
        return self._frozen_logprobs(sequences, forwards)


class TrainedHydra(Actor):
    """A policy and a reward model in one while both learn (step 2), on the engine of a `HydraModel`."""

    def score(self, sequences: Sequences) -> Tensor:
        """(B,) float32 with gradient."""
        return self.engine(sequences, head="score")

    def logprobs_and_scores(self, sequences: Sequences, rows: int) -> tuple[Tensor, Tensor]:
        """(rows, A) log-probs of the first rows' answers, and (B,) scores of all, with gradient."""
        chunks = self._chunks(sequences.select(slice(0, rows)), self.sampling)
        return self.engine(sequences, head="both", rows=rows, chunks=chunks, sampling=self.sampling)


class Reference(_Policy):
    """The frozen policy that KL is measured against."""

    def __init__(
        self, engine: Engine, *, sampling: Sampling | None = None, chunk_size: int = 1024, use: Use | None = None
    ):
        # The reference needs support wherever the policy has some, so it is tempered like the policy but never
        # truncated.
        super().__init__(engine, (sampling or Sampling()).without_truncation(), chunk_size, use)

    def logprobs(self, sequences: Sequences, forwards: int = 1, hidden: Tensor | None = None) -> Tensor:
        """(B, A) log-probs of the answers; see `Role.in_forwards`.

        Args:
            hidden: What `hidden` gave of them: the rows are not read once more.
        """
        return self._frozen_logprobs(sequences, forwards, hidden)

    @torch.no_grad()
    def hidden(self, sequences: Sequences, forwards: int = 1) -> Tensor:
        """(B, A, H) hidden states, from which `head` makes the reference's full distribution chunk by chunk."""
        with self.reading():
            return self.in_forwards(sequences, forwards, partial(self.ask, hidden_only=True))

    @torch.no_grad()
    def head(self) -> Head:
        """The output embedding as a plain function.

        At ZeRO-3 it holds a whole copy of the weight on this rank (V * H numbers).
        """
        if not self.zero3:
            return self.model.head
        layer = self.model.hf.get_output_embeddings()
        with gathered(layer.parameters(), zero3=True):
            weight = layer.weight.detach().clone()
            bias = layer.bias.detach().clone() if getattr(layer, "bias", None) is not None else None
        return lambda hidden: self.model.scale_logits(linear_in_float32(hidden, weight, bias))


class Judge(_Policy):
    """Reference and reward in one, where a `Trunk` is both: what each says of an answer, by a single forward."""

    def __init__(self, reference: Reference):
        super().__init__(reference.engine, reference.sampling, reference.chunk_size, REFERENCE_AND_REWARD)

    @torch.no_grad()
    def read(self, sequences: Sequences, first: int, forwards: int = 1) -> tuple[Tensor, Tensor]:
        """The reference's log-probs of the first rows' answers, and the scores of all.

        Args:
            forwards: See `Role.in_forwards`.

        Returns:
            (first, A), where A is the width of these rows' answers alone, and (B,) float32.
        """
        width, where = sequences.select(slice(0, first)).answer_width, sequences.input_ids.device
        logprobs, scores = torch.zeros(first, width, device=where), torch.zeros(len(sequences), device=where)
        with self.reading():
            for rows in map(sorted, sequences.balanced(forwards, together=shares_prompts(self.model))):
                part, of_part = sequences.select(rows), sum(i < first for i in rows)
                places = torch.tensor(rows, device=where)
                if of_part:
                    chunks = self._chunks(part.select(slice(0, of_part)), self.sampling)
                    found, score = self.ask(part, rows=of_part, chunks=chunks, sampling=self.sampling)
                    logprobs[places[:of_part], : found.shape[1]] = found
                else:
                    score = self.engine(part, use=REWARD)
                scores[places] = score
        return logprobs, scores
