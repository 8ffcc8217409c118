"""Answers as text: read from token ids, written as files, asked of a policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from remax.core.batches import groups
from remax.core.sequences import Prompts, Sequences
from remax.engines.policy import Actor
from remax.generation.hugging_face import beam_search
from utils.data.collate import pad
from utils.data.tokens import encode_prompts
from utils.distributed import device, is_main
from utils.files import write_rows
from utils.metrics import progress, warn
from utils.present import present
from utils.run import DISK_FULL


@dataclass(frozen=True)
class Answer:
    """An answer as text; its length counts EOS, and it has `ended` when it reached EOS within the limit."""

    text: str
    tokens: int
    ended: bool


def read_answers(sequences: Sequences, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> list[Answer]:
    """The answers of B sequences."""
    found = []
    for ids, start, length in zip(sequences.input_ids.tolist(), *sequences.counts, strict=True):
        answer = ids[start : start + length]
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        found.append(Answer(text, length, answer[-1] in eos_ids))
    return found


def write_answers(path: Path, answers: Iterable[Mapping[str, Any]]) -> None:
    """One json object a line, on rank 0; on a full disk none of them, with a warning, as a training goes on."""
    if is_main():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, answers)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            warn(f"warning: no space left for {path}; make room: these answers are not kept")


def as_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Prompts:
    """B texts as generation takes them."""
    return Prompts(*pad(encode_prompts(tokenizer, list(texts)), tokenizer.pad_token_id, left=True))


def answer_prompts(
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    samples: int = 1,
    beams: int = 1,
) -> list[dict[str, list[Answer]]]:
    """For each prompt its greedy answer, `samples` sampled ones, and with `beams` above 1 the best of a beam search.

    Returns:
        For each prompt {"greedy": 1 answer, "sampled": `samples` of them, "beam": min(samples, beams) of them, the most
        probable first}; what was not asked for is left out.
    """
    eos_ids = actor.model.hf.generation_config.eos_token_id
    results: list[dict[str, list[Answer]]] = []
    with progress(len(prompts), "answering", "prompts") as bar:
        for texts in groups(prompts, batch_size):
            batch = as_prompts(tokenizer, texts)
            found = actor.rollout(batch, samples=samples, greedy=True)
            kinds = {"greedy": present(found.greedy, "the greedy rollout")}
            if found.sampled is not None:
                kinds["sampled"] = found.sampled
            if samples and beams > 1:
                kinds["beam"] = beam_search(
                    actor.model.hf, batch.to(device()), actor.generation, beams=beams, best=min(samples, beams)
                )
            answers = {kind: read_answers(rows, tokenizer, eos_ids) for kind, rows in kinds.items()}
            each = {kind: len(rows) // len(texts) for kind, rows in answers.items()}
            for i in range(len(texts)):
                results.append({kind: rows[i * each[kind] :][: each[kind]] for kind, rows in answers.items()})
            bar.update(len(texts))
    return results
