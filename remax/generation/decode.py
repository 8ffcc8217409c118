"""Answers from a policy: sampled and greedy rows in one decode.

The rows of a decode are the prompts to sample from, then the same prompts again for their greedy answers, where a
logits processor leaves only the most probable token. Each step of the decode then serves both, while two decodes would
pay for the steps twice.
Generation is Hugging Face `generate`, with every setting explicit: it would apply top_k=50 by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences


@dataclass(frozen=True)
class GenerationSettings:
    """max_new_tokens: longest answer, in tokens.   max_greedy_tokens: longest greedy answer, 0 for the same (ReMax-fast
    caps it).
    two_pass: two decodes instead of one (faster for large batches of small models).
    """

    max_new_tokens: int
    pad_id: int
    sampling: Sampling = Sampling()
    max_greedy_tokens: int = 0
    two_pass: bool = False

    @property
    def greedy_cap(self) -> int:
        return min(self.max_greedy_tokens or self.max_new_tokens, self.max_new_tokens)


class GreedyRows(LogitsProcessor):
    """Leaves only the argmax in the rows from `first` on, and ends them (EOS) after `cap` tokens so that they cost
    nothing further.
    """

    def __init__(self, first: int, prompt_width: int, cap: int, eos_id: int):
        self.first, self.last_column, self.eos_id = first, prompt_width + cap, eos_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        greedy = scores[self.first :]
        best = torch.full_like(greedy[:, 0], self.eos_id, dtype=torch.long)
        if input_ids.shape[1] < self.last_column:
            best = greedy.argmax(-1)
        only_best = torch.full_like(greedy, -torch.inf).scatter_(-1, best[:, None], 0.0)
        return torch.cat([scores[: self.first], only_best])


def rollout(
    model: PreTrainedModel,
    prompts: Prompts,
    settings: GenerationSettings,
    *,
    samples: int = 1,
    greedy: bool = True,
    synced_gpus: bool = False,
    scores: list[Tensor] | None = None,
) -> tuple[Sequences | None, Sequences | None]:
    """`samples` sampled answers per prompt (adjacent rows) and one greedy answer -> (B * samples rows or None, B rows
    or None).

    The model must be in eval mode. `synced_gpus`: the ranks decode in step (ZeRO-3 without gathered parameters).
    `scores`: an empty list, to be filled with the logits of every step of the decode as its tokens were drawn from
    them: (rows, V) each, sampled rows first.
    """
    if samples and greedy and settings.two_pass:
        sampled, _ = rollout(
            model, prompts, settings, samples=samples, greedy=False, synced_gpus=synced_gpus, scores=scores
        )
        _, best = rollout(model, prompts, settings, samples=0, greedy=True, synced_gpus=synced_gpus)
        return sampled, best
    drawn = prompts.repeat(samples)
    rows = drawn
    if greedy:
        rows = Prompts(torch.cat([drawn.input_ids, prompts.input_ids]), torch.cat([drawn.lengths, prompts.lengths]))
    answers = _decode(model, rows, settings, len(drawn), synced_gpus, scores)  # (rows, A)
    eos_ids = model.generation_config.eos_token_id

    def sequences(of: Prompts, tokens: Tensor) -> Sequences:
        return Sequences.from_generation(of, tokens, eos_ids, settings.pad_id)

    return (
        sequences(drawn, answers[: len(drawn)]) if samples else None,
        sequences(prompts, answers[len(drawn) :, : settings.greedy_cap]) if greedy else None,
    )


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    rows: Prompts,
    settings: GenerationSettings,
    first_greedy: int,
    synced_gpus: bool,
    scores: list[Tensor] | None,
) -> Tensor:
    """(rows, A) generated ids; rows from `first_greedy` on are greedy."""
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
        output_scores=scores is not None,
    )
    processors = LogitsProcessorList()
    if 0 < first_greedy < len(rows):
        processors.append(GreedyRows(first_greedy, rows.input_ids.shape[1], settings.greedy_cap, eos_ids[0]))
    out = model.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        generation_config=config,
        logits_processor=processors,
        synced_gpus=synced_gpus,
    )
    if scores is not None:
        scores.extend(out.scores)
    return out.sequences[:, rows.input_ids.shape[1] :]
