"""Decoding by Hugging Face's `generate`, with every setting explicit: left alone it would apply top_k=50.

The rows of a decode are the prompts to sample from, then the same prompts again for their greedy answers, where a
logits processor leaves only the most probable token. Each step of the decode then serves both, while two decodes would
pay for the steps twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from remax.core.sequences import Prompts, Sequences
from remax.generation.decoder import Answers, GenerationSettings


class GreedyRows(LogitsProcessor):
    """Leaves only the argmax in the rows from `first` on.

    They are ended (EOS) after `cap` tokens, so that they cost nothing further.

    Attributes:
        logprobs: Of each step the (rows,) log-probs of the greedy tokens, where they are kept.
    """

    def __init__(self, first: int, prompt_width: int, cap: int, eos_id: int, keep_logprobs: bool = False):
        self.first, self.last_column, self.eos_id = first, prompt_width + cap, eos_id
        self.keep_logprobs = keep_logprobs
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, T) tokens so far, (rows, V) logits -> (rows, V) logits."""
        greedy = scores[self.first :]
        if self.keep_logprobs:
            self.logprobs.append(greedy.amax(-1).float() - greedy.float().logsumexp(-1))
        best = torch.full_like(greedy[:, 0], self.eos_id, dtype=torch.long)
        if input_ids.shape[1] < self.last_column:
            best = self.best(greedy)
        only_best = torch.full_like(greedy, -torch.inf).scatter_(-1, best[:, None], 0.0)
        return torch.cat([scores[: self.first], only_best])

    def best(self, logits: Tensor) -> Tensor:
        """(rows, V) logits -> (rows,) ids of the most probable tokens."""
        return logits.argmax(-1)


class LostLogits(LogitsProcessor):
    """Lets a policy whose logits are not numbers answer at random instead of ending the process.

    Its log-probs are no numbers either, which the training sees and reports with a cause and a remedy.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=0.0, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)


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
        samples: int,
        greedy: bool,
        logprobs: bool = False,
        synced_gpus: bool = False,
    ) -> Answers:
        """See `Decoder`. While it runs, `logprobs` keeps the logits of all steps and sampled rows."""
        drawn = prompts.repeat(samples)
        rows, first_greedy = drawn, len(drawn)
        if greedy:
            rows = Prompts(torch.cat([drawn.input_ids, prompts.input_ids]), torch.cat([drawn.lengths, prompts.lengths]))
        eos_ids, sampling, width = model.generation_config.eos_token_id, settings.sampling, prompts.input_ids.shape[1]
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens if samples else settings.greedy_cap,
            do_sample=samples > 0,
            temperature=sampling.temperature if samples else None,
            top_p=sampling.top_p if samples else None,
            top_k=sampling.top_k if samples else None,
            eos_token_id=eos_ids,
            pad_token_id=settings.pad_id,
            use_cache=True,
            return_dict_in_generate=True,
            output_scores=logprobs and samples > 0,
        )
        processors = LogitsProcessorList([LostLogits()])
        best = GreedyRows(first_greedy, width, settings.greedy_cap, eos_ids[0], keep_logprobs=logprobs)
        if greedy:
            processors.append(best)
        out = _generate(model, rows, config, logits_processor=processors, synced_gpus=synced_gpus)
        tokens = out.sequences[:, width:]

        def sequences(of: Prompts, tokens: Tensor) -> Sequences:
            return Sequences.from_generation(of, tokens, eos_ids, settings.pad_id)

        sampled = sequences(drawn, tokens[:first_greedy]) if samples else None
        most_probable = sequences(prompts, tokens[first_greedy:, : settings.greedy_cap]) if greedy else None
        found, of_greedy = None, None
        if logprobs and sampled is not None:
            steps = (
                step[:first_greedy].float().log_softmax(-1).gather(-1, ids[:first_greedy, None])
                for step, ids in zip(out.scores, tokens.T, strict=True)
            )
            found = sampled.of_answers(torch.cat(list(steps), 1))
        if logprobs and most_probable is not None:
            of_greedy = most_probable.of_answers(torch.stack(best.logprobs, 1))
        return Answers(sampled, most_probable, found, of_greedy)


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
