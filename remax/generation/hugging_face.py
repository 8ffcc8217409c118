"""Decoding by Hugging Face's `generate`: for models that our own loop cannot serve, and for beam search.

The rows of a decode are the prompts to sample from, then the same prompts again for their greedy answers. Each step
serves both, while two decodes would pay for the steps twice. Tokens are chosen here, by the sampler of our own loop and
with the same random numbers: a logits processor leaves only the one that was drawn, so that `generate` has no choice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from remax.core.sequences import Prompts, Sequences
from remax.generation.decoder import Answers, GenerationSettings
from remax.generation.sampler import draw, logprobs_of, mend, most_probable, uniform_numbers


class Choice(LogitsProcessor):
    """Chooses every row's next token, and leaves nothing else to choose.

    Greedy rows are ended (EOS) after their cap, so that they keep no other waiting.

    Attributes:
        logprobs: Of each step the (rows,) log-probs of the tokens, where they are kept.
    """

    def __init__(self, settings: GenerationSettings, noise: Tensor, prompt_width: int, end_id: int, keep: bool):
        """Takes a (sampled rows, steps) uniform number for each token; the rows behind those are greedy."""
        self.settings, self.noise, self.prompt_width, self.end_id = settings, noise, prompt_width, end_id
        self.keep = keep
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, T) tokens so far, (rows, V) logits -> (rows, V) logits."""
        step, sampled, logits = input_ids.shape[1] - self.prompt_width, len(self.noise), mend(scores)
        drawn, logprobs = draw(logits[:sampled], self.settings.sampling, self.noise[:, step])
        best = most_probable(logits[sampled:])
        if self.keep:
            self.logprobs.append(torch.cat([logprobs, logprobs_of(logits[sampled:], best)]))
        if step >= self.settings.greedy_cap:
            best.fill_(self.end_id)
        ids = torch.cat([drawn, best])
        return torch.full_like(logits, -torch.inf).scatter_(-1, ids[:, None], 0.0)


def _generate(model: PreTrainedModel, prompts: Prompts, config: GenerationConfig, **options: Any) -> Any:
    """Hugging Face's `generate`, whose declared types leave out its own models."""
    return cast(Any, model).generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=config, **options
    )


@torch.no_grad()
def generate_with(
    model: PreTrainedModel, prompt: Prompts, settings: GenerationSettings, *, greedy: bool, streamer: Any
) -> None:
    """Answers one prompt, greedily or by sampling, and hands each token to `streamer.put`."""
    _decode(model, prompt, settings, sampled=0 if greedy else len(prompt), streamer=streamer)


def _decode(
    model: PreTrainedModel,
    rows: Prompts,
    settings: GenerationSettings,
    *,
    sampled: int,
    keep: bool = False,
    **options: Any,
) -> tuple[Tensor, Choice]:
    """Continues every row, of which the first `sampled` are drawn; what `generate` gives, and how it was chosen."""
    end_ids, width = model.generation_config.eos_token_id, rows.input_ids.shape[1]
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens if sampled else settings.greedy_cap,
        do_sample=False,
        eos_token_id=end_ids,
        pad_token_id=settings.pad_id,
        use_cache=True,
    )
    noise = uniform_numbers(sampled, settings.max_new_tokens, rows.input_ids.device)
    choice = Choice(settings, noise, width, end_ids[0], keep=keep)
    return _generate(model, rows, config, logits_processor=LogitsProcessorList([choice]), **options), choice


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
        samples: int,
        greedy: bool,
        logprobs: bool = False,
        synced_gpus: bool = False,
    ) -> Answers:
        """See `Decoder`."""
        drawn = prompts.repeat(samples)
        rows = drawn
        if greedy:
            rows = Prompts(torch.cat([drawn.input_ids, prompts.input_ids]), torch.cat([drawn.lengths, prompts.lengths]))
        end_ids, width = model.generation_config.eos_token_id, prompts.input_ids.shape[1]
        tokens, choice = _decode(model, rows, settings, sampled=len(drawn), keep=logprobs, synced_gpus=synced_gpus)
        found = torch.stack(choice.logprobs, 1) if logprobs else None
        return Answers.of_rows(prompts, tokens[:, width:], found, settings, end_ids, samples=samples, greedy=greedy)


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
