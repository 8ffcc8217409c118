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
from utils.data.chat import ChatTemplate, Messages, TemplateRefuses
from utils.data.collate import pad
from utils.data.shapes import Conversation, RowSkipped, as_answer, finish
from utils.data.tokens import beginning, encode_prompts, keep_end
from utils.distributed import device, is_main
from utils.files import write_rows
from utils.metrics import progress, warn
from utils.present import present
from utils.run import DISK_FULL, UserError


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


def write_prompt(messages: Messages, template: ChatTemplate | None, flag: str) -> str:
    """Messages as a prompt, as training writes it: by the chat template, or as Human/Assistant dialogue.

    Raises:
        UserError: The template refuses them; `flag` names whose it is.
    """
    try:
        return present(finish(Conversation(messages), template).prompt, "the prompt of messages")
    except RowSkipped as error:
        raise UserError(f"{flag}: the prompt {messages[-1]['content']!r} is one {error}") from error


def write_question(question: str, template: ChatTemplate | None, flag: str) -> str:
    """A bare question as a prompt, as `write_prompt`; a Human/Assistant dialogue is one already."""
    if question.endswith("Assistant:"):
        return question
    return write_prompt([{"role": "user", "content": question}], template, flag)


def write_answer(question: str, answer: str, template: ChatTemplate | None, flag: str) -> tuple[str, str]:
    """A question as by `write_question`, and an answer as it follows."""
    prompt = write_question(question, template, flag)
    if template is None or prompt == question:
        return prompt, as_answer(prompt, answer)
    messages = [{"role": "user", "content": question}]
    try:
        return prompt, template.answer(messages, prompt, answer)
    except TemplateRefuses as error:
        raise UserError(f"{flag}: the chat template refuses an answer to {question[:100]!r} ({error})") from error


def as_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None) -> Prompts:
    """B texts as generation takes them; of those with more than `longest` tokens the end."""
    first, ids = beginning(tokenizer), encode_prompts(tokenizer, list(texts))
    if longest is not None:
        ids = [keep_end(row, longest, first) for row in ids]
    return Prompts(*pad(ids, tokenizer.pad_token_id, left=True))


def one_answer_each(
    actor: Actor, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, greedy: bool, longest: int | None
) -> list[Answer]:
    """An answer to each of B prompts: the greedy one, or one that is drawn; `longest` as for `as_prompts`."""
    batch = as_prompts(tokenizer, prompts, longest)
    answers = actor.rollout(batch, samples=0 if greedy else 1, greedy=greedy)
    found = present(answers.greedy if greedy else answers.sampled, "the rollout")
    return read_answers(found, tokenizer, actor.model.hf.generation_config.eos_token_id)


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
