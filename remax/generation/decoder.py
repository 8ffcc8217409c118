"""What a decoder is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        pad_id: What generation fills the rows up with that have ended.
        sampling: The distribution that sampled answers are drawn from.
        max_greedy_tokens: Longest greedy answer, 0 for the same (ReMax-fast caps it).
    """

    max_new_tokens: int
    pad_id: int
    sampling: Sampling = Sampling()
    max_greedy_tokens: int = 0

    @property
    def greedy_cap(self) -> int:
        """Longest greedy answer, in tokens."""
        return min(self.max_greedy_tokens or self.max_new_tokens, self.max_new_tokens)


@dataclass(frozen=True)
class Answers:
    """Answers to B prompts.

    Attributes:
        sampled: `samples` adjacent rows for each prompt; None where not asked for.
        greedy: A row for each prompt; None where not asked for.
        logprobs: (B * samples, A) float32 log-probs of the sampled tokens in the distribution that they were drawn
            from, 0 beyond an answer's end; None where not asked for.
        greedy_logprobs: (B, A) the greedy tokens' in the model's own distribution, likewise.
    """

    sampled: Sequences | None = None
    greedy: Sequences | None = None
    logprobs: Tensor | None = None
    greedy_logprobs: Tensor | None = None

    @classmethod
    def of_rows(
        cls,
        prompts: Prompts,
        tokens: Tensor,
        logprobs: Tensor | None,
        settings: GenerationSettings,
        end_ids: list[int],
        *,
        samples: int,
        greedy: bool,
    ) -> Answers:
        """The answers that some rows hold.

        Args:
            tokens: (B * samples + B, at least A) ids, the greedy answers' behind the others, if there are both; what
                follows an end token, or the cap of a greedy answer, is filler.
            logprobs: Theirs.
        """
        drawn, cap = len(prompts) * samples, settings.greedy_cap

        def part(of: Prompts, rows: slice, longest: int) -> tuple[Sequences, Tensor | None]:
            found = Sequences.from_generation(of, tokens[rows, :longest], end_ids, settings.pad_id)
            return found, None if logprobs is None else found.of_answers(logprobs[rows])

        sampled, of_sampled = (
            part(prompts.repeat(samples), slice(drawn), settings.max_new_tokens) if samples else (None, None)
        )
        best, of_best = part(prompts, slice(drawn, None), cap) if greedy else (None, None)
        return cls(sampled, best, of_sampled, of_best)


class Decoder(Protocol):
    """Turns prompts into answers, token by token; the place where another decode loop plugs in."""

    name: str  # for the log

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: GenerationSettings,
        *,
        samples: int,
        greedy: bool,
        logprobs: bool = False,
        synced_gpus: bool = False,
    ) -> Answers:
        """Answers every prompt.

        Args:
            model: In eval mode; `model.generation_config.eos_token_id` lists the end tokens.
            samples: Answers to each prompt drawn from `settings.sampling`, at most `settings.max_new_tokens` long.
            greedy: Whether the greedy answers are wanted too, at most `settings.greedy_cap` long.
            logprobs: Whether the tokens' log-probs are.
            synced_gpus: The ranks decode in step (ZeRO-3 without gathered parameters).
        """
        ...
