"""Answers from a policy: sampled and greedy rows in one decode.

The rows of a decode are the prompts to sample from, then the same prompts again for their greedy answers, where a
logits processor leaves only the most probable token. Each step of the decode then serves both, while two decodes would
pay for the steps twice.

A `Decoder` does the decoding. The one there is calls Hugging Face `generate` with every setting explicit: left alone it
would apply top_k=50.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

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
        two_pass: Two decodes instead of one (faster for large batches of small models).
    """

    max_new_tokens: int
    pad_id: int
    sampling: Sampling = Sampling()
    max_greedy_tokens: int = 0
    two_pass: bool = False

    @property
    def greedy_cap(self) -> int:
        """Longest greedy answer, in tokens."""
        return min(self.max_greedy_tokens or self.max_new_tokens, self.max_new_tokens)


class GreedyRows(LogitsProcessor):
    """Leaves only the argmax in the rows from `first` on.

    They are ended (EOS) after `cap` tokens, so that they cost nothing further.
    """

    def __init__(self, first: int, prompt_width: int, cap: int, eos_id: int):
        self.first, self.last_column, self.eos_id = first, prompt_width + cap, eos_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, T) tokens so far, (rows, V) logits -> (rows, V) logits."""
        greedy = scores[self.first :]
        best = torch.full_like(greedy[:, 0], self.eos_id, dtype=torch.long)
        if input_ids.shape[1] < self.last_column:
            best = greedy.argmax(-1)
        only_best = torch.full_like(greedy, -torch.inf).scatter_(-1, best[:, None], 0.0)
        return torch.cat([scores[: self.first], only_best])


class LostLogits(LogitsProcessor):
    """Lets a policy whose logits are not numbers answer at random instead of ending the process.

    Its log-probs are no numbers either, which the training sees and reports with a cause and a remedy.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=0.0, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)


@dataclass(frozen=True)
class Decoded:
    """What a decode gives.

    Attributes:
        tokens: (rows, A) ids; what follows a row's first end token is filler.
        scores: Of each of the A steps the (rows, V) logits that its tokens were drawn from; empty where not asked for.
    """

    tokens: Tensor
    scores: list[Tensor]


class Decoder(Protocol):
    """Turns prompts into answers, token by token; the place where another decode loop plugs in."""

    name: str  # for the log

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: GenerationSettings,
        *,
        first_greedy: int,
        synced_gpus: bool = False,
        keep_scores: bool = False,
    ) -> Decoded:
        """Decodes every row until all have ended.

        Args:
            model: In eval mode; `model.generation_config.eos_token_id` lists the end tokens.
            first_greedy: The rows before it are sampled by `settings.sampling`, the others are greedy and take at most
                `settings.greedy_cap` tokens.
            synced_gpus: The ranks decode in step (ZeRO-3 without gathered parameters).
        """
        ...


def _generate(model: PreTrainedModel, prompts: Prompts, config: GenerationConfig, **options: Any) -> Any:
    """Hugging Face's `generate`, whose declared types leave out its own models."""
    return cast(Any, model).generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=config, **options
    )


class HuggingFaceDecoder:
    """The model's own `generate`."""

    name = "transformers generate"

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: GenerationSettings,
        *,
        first_greedy: int,
        synced_gpus: bool = False,
        keep_scores: bool = False,
    ) -> Decoded:
        """See `Decoder`."""
        eos_ids = model.generation_config.eos_token_id
        sampling = settings.sampling
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens if first_greedy else settings.greedy_cap,
            do_sample=first_greedy > 0,
            temperature=sampling.temperature if first_greedy else None,
            top_p=sampling.top_p if first_greedy else None,
            top_k=sampling.top_k if first_greedy else None,
            eos_token_id=eos_ids,
            pad_token_id=settings.pad_id,
            use_cache=True,
            return_dict_in_generate=True,
            output_scores=keep_scores,
        )
        processors = LogitsProcessorList([LostLogits()])
        width = prompts.input_ids.shape[1]
        if 0 < first_greedy < len(prompts):
            processors.append(GreedyRows(first_greedy, width, settings.greedy_cap, eos_ids[0]))
        out = _generate(model, prompts, config, logits_processor=processors, synced_gpus=synced_gpus)
        return Decoded(out.sequences[:, width:], list(out.scores) if keep_scores else [])


HUGGING_FACE = HuggingFaceDecoder()


def rollout(
    model: PreTrainedModel,
    prompts: Prompts,
    settings: GenerationSettings,
    *,
    samples: int = 1,
    greedy: bool = True,
    synced_gpus: bool = False,
    decoder: Decoder = HUGGING_FACE,
) -> tuple[Sequences | None, Sequences | None]:
    """Answers every prompt `samples` times by sampling (adjacent rows) and once greedily.

    The model must be in eval mode. See `Decoder` for `synced_gpus`.

    Returns:
        B * samples sampled answers, and B greedy ones; None for what was not asked for.
    """
    if samples and greedy and settings.two_pass:
        sampled, _ = rollout(
            model, prompts, settings, samples=samples, greedy=False, synced_gpus=synced_gpus, decoder=decoder
        )
        _, best = rollout(model, prompts, settings, samples=0, synced_gpus=synced_gpus, decoder=decoder)
        return sampled, best
    return rollout_with_scores(
        model, prompts, settings, samples=samples, greedy=greedy, synced_gpus=synced_gpus, decoder=decoder, keep=False
    )[:2]


def rollout_with_scores(
    model: PreTrainedModel,
    prompts: Prompts,
    settings: GenerationSettings,
    *,
    samples: int = 1,
    greedy: bool = True,
    synced_gpus: bool = False,
    decoder: Decoder = HUGGING_FACE,
    keep: bool = True,
) -> tuple[Sequences | None, Sequences | None, list[Tensor]]:
    """As `rollout`, always in one decode, and with its scores: see `Decoded`; sampled rows first."""
    drawn = prompts.repeat(samples)
    rows = drawn
    if greedy:
        rows = Prompts(torch.cat([drawn.input_ids, prompts.input_ids]), torch.cat([drawn.lengths, prompts.lengths]))
    first_greedy = len(drawn)
    decoded = decoder(model, rows, settings, first_greedy=first_greedy, synced_gpus=synced_gpus, keep_scores=keep)
    eos_ids = model.generation_config.eos_token_id

    def sequences(of: Prompts, tokens: Tensor) -> Sequences:
        return Sequences.from_generation(of, tokens, eos_ids, settings.pad_id)

    return (
        sequences(drawn, decoded.tokens[:first_greedy]) if samples else None,
        sequences(prompts, decoded.tokens[first_greedy:, : settings.greedy_cap]) if greedy else None,
        decoded.scores,
    )


@torch.no_grad()
def beam_search(
    model: PreTrainedModel, prompts: Prompts, settings: GenerationSettings, *, beams: int, best: int
) -> Sequences:
    """The `best` most probable answers per prompt (adjacent rows) among `beams` that are followed."""
    eos_ids = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=beams,
        num_return_sequences=best,
        do_sample=False,
        eos_token_id=eos_ids,
        pad_token_id=settings.pad_id,
    )
    answers = _generate(model, prompts, config)[:, prompts.input_ids.shape[1] :]  # (B * best, A)
    return Sequences.from_generation(prompts.repeat(best), answers, eos_ids, settings.pad_id)
