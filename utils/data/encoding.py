"""Text rows -> token ids, for each of the three stages.

The prompt is encoded with the tokenizer's own beginning (BOS or none, never two). The answer's tokens are those it has
in the joint text; where the joint text merges a token across the seam, the answer is encoded alone. An end token
follows, unless the answer was cut: a cut answer must not teach the model to stop there.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from utils.data.preferences import cache_file, fingerprint_of, report_dropped
from utils.distributed import print0
from utils.run import UserError

IDS = List(Value("int32"))
FEATURES = {
    "supervised": Features({"input_ids": IDS, "prompt_length": Value("int32")}),
    "ranking": Features({"chosen_ids": IDS, "rejected_ids": IDS, "prompt_length": Value("int32")}),
    "prompts": Features({"input_ids": IDS, "prompt": Value("string")}),
}
# What happened to a row, and the length that it would have had: read again from the cache at every start.
FATE = Features({"dropped": Value("string"), "cut": Value("bool"), "full_length": Value("int32")})
NEEDS = {
    "supervised": ("chosen", "step 1 learns from answers: expected a column chosen or completion"),
    "ranking": ("rejected", "step 2 learns from pairs: expected the columns chosen and rejected"),
}
TOO_LONG = "whose prompt alone fills --max_seq_len"
# Texts whose end stays a token border whatever follows, tried in turn.
SEAMS = ("\n", ":", "x", "é")


# ----------------------------------------------------------------------------------------------------------------------
# One text


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids without the tokenizer's beginning and end."""
    # verbose=False: lengths are cut here, a warning about the model's maximum would mislead
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text: BOS, OPT's </s>, or none."""
    (bare,), whole = plain_ids(tokenizer, ["a"]), tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Ids of the prompts with the tokenizer's beginning; a text that already begins with it gets no second one."""
    return with_beginning(beginning(tokenizer), plain_ids(tokenizer, prompts))


def with_beginning(first: list[int], heads: list[list[int]]) -> list[list[int]]:
    """`first` before each of `heads`, except where it stands there already."""
    return [head if head[: len(first)] == first else first + head for head in heads]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], heads: list[list[int]], answers: list[str]
) -> list[list[int]]:
    """Ids of the answers as they follow their prompts, without an end token.

    The joint text decides wherever it keeps the prompt's tokens: prompt ids + answer ids are then what the tokenizer
    makes of prompt + answer.

    Args:
        heads: the prompts' `plain_ids`.
    """
    joint = plain_ids(tokenizer, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    return [
        ids[len(head) :] if ids[: len(head)] == head else answer_alone(tokenizer, answer)
        for head, ids, answer in zip(heads, joint, answers, strict=True)
    ]


def answer_alone(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Ids of a text that starts in the middle of a line: sentencepiece would put its own space before it."""
    for seam in SEAMS:
        before, whole = plain_ids(tokenizer, [seam, seam + answer])
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return plain_ids(tokenizer, [answer])[0]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, max_len: int, add_eos: bool = True
) -> tuple[list[int], int]:
    """(ids of prompt and answer, prompt length), cut at `max_len` tokens.

    The end token follows the answer when both fit. A prompt longer than `max_len` fills it alone: prompt length and
    number of ids are then equal.
    """
    heads = plain_ids(tokenizer, [prompt])
    (prompt_ids,) = with_beginning(beginning(tokenizer), heads)
    (answer_ids,) = encode_answers(tokenizer, [prompt], heads, [answer])
    ids = join(prompt_ids, answer_ids, max_len, tokenizer.eos_token_id if add_eos else None)
    return ids, min(len(prompt_ids), max_len)


def join(prompt_ids: list[int], answer_ids: list[int], max_len: int, eos: int | None) -> list[int]:
    """Prompt, answer and end token, cut at `max_len`."""
    ends = eos is None or (answer_ids and answer_ids[-1] == eos)
    return (prompt_ids + answer_ids + ([] if ends else [eos]))[:max_len]


def keep_end(ids: list[int], max_len: int, first: list[int]) -> list[int]:
    """The last tokens of a prompt that is too long, after the tokenizer's beginning: the question stands at the end."""
    if len(ids) <= max_len:
        return ids
    first = first[:max_len] if ids[: len(first)] == first else []
    return first + ids[len(ids) - (max_len - len(first)) :]


# ----------------------------------------------------------------------------------------------------------------------
# Batches of rows, for Dataset.map


def supervised_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_len: int) -> dict[str, list]:
    """Rows with prompt and chosen -> input_ids, prompt_length and their fate."""
    rows = []
    prompts, answers = batch["prompt"], batch["chosen"]
    plain = plain_ids(tokenizer, prompts)
    heads = with_beginning(beginning(tokenizer), plain)
    tails = encode_answers(tokenizer, prompts, plain, [answer or "" for answer in answers])
    for prompt, answer, head, tail in zip(prompts, answers, heads, tails, strict=True):
        ids = join(head, tail, max_len, tokenizer.eos_token_id)
        dropped = unusable(prompt, [answer]) or too_long(head, max_len)
        rows.append(
            {
                "input_ids": [] if dropped else ids,
                "prompt_length": len(head),
                "dropped": dropped,
                "cut": len(head) + len(tail) >= max_len,
                "full_length": len(head),
            }
        )
    return columns(rows)


def ranking_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_len: int) -> dict[str, list]:
    """Rows with prompt, chosen and rejected -> chosen_ids, rejected_ids, prompt_length and their fate."""
    rows = []
    prompts = batch["prompt"]
    plain = plain_ids(tokenizer, prompts)
    heads = with_beginning(beginning(tokenizer), plain)
    tails = [
        encode_answers(tokenizer, prompts, plain, [answer or "" for answer in batch[name]])
        for name in ("chosen", "rejected")
    ]
    for prompt, chosen, rejected, head, *ends in zip(
        prompts, batch["chosen"], batch["rejected"], heads, *tails, strict=True
    ):
        ids = [join(head, tail, max_len, tokenizer.eos_token_id) for tail in ends]
        dropped = unusable(prompt, [chosen, rejected]) or too_long(head, max_len)
        if not dropped and chosen.strip() == rejected.strip():
            dropped = "with equal answers"
        if not dropped and ids[0] == ids[1]:
            dropped = "whose answers are equal after the cut"
        rows.append(
            {
                "chosen_ids": [] if dropped else ids[0],
                "rejected_ids": [] if dropped else ids[1],
                "prompt_length": len(head),
                "dropped": dropped,
                "cut": max(len(head) + len(tail) for tail in ends) >= max_len,
                "full_length": len(head),
            }
        )
    return columns(rows)


def prompts_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_len: int) -> dict[str, list]:
    """Rows with prompt -> input_ids, the text, and their fate."""
    first = beginning(tokenizer)
    rows = []
    for prompt, ids in zip(batch["prompt"], encode_prompts(tokenizer, batch["prompt"]), strict=True):
        rows.append(
            {
                "input_ids": keep_end(ids, max_len, first),
                "prompt": prompt,
                "dropped": unusable(prompt, []),
                "cut": len(ids) > max_len,
                "full_length": len(ids),
            }
        )
    return columns(rows)


def unusable(prompt: str, answers: list[str | None]) -> str | None:
    """Why the texts of a row cannot be used."""
    if not prompt.strip():
        return "with an empty prompt"
    if any(answer is None for answer in answers):
        return "without an answer"
    return "with an empty answer" if any(not answer.strip() for answer in answers) else None


def too_long(prompt_ids: list[int], max_len: int) -> str | None:
    """A prompt that leaves no room for a token of the answer."""
    return TOO_LONG if len(prompt_ids) >= max_len else None


ENCODERS = {"supervised": supervised_batch, "ranking": ranking_batch, "prompts": prompts_batch}


def columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Rows -> columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


@dataclass(frozen=True)
class Names:
    """How messages call things."""

    data: str  # "train" or "eval"
    data_flag: str = "--data_path"
    length_flag: str = "--max_seq_len"


def encode_rows(
    rows: Dataset,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    cache_dir: str | None,
    names: Names,
    num_proc: int | None = None,
) -> Dataset:
    """Text rows -> the token ids of one stage; through the cache, with what was dropped and cut reported in one line.

    Args:
        rows: columns prompt, chosen, rejected.
        kind: "supervised" {input_ids, prompt_length}, "ranking" {chosen_ids, rejected_ids, prompt_length}, or
            "prompts" {input_ids, prompt}.
        max_len: in tokens; of prompt and answer together, or of the prompt for "prompts".

    Raises:
        UserError: the rows lack what this stage needs, or no row is left.
    """
    check_serves(rows, kind, names)
    fingerprint = fingerprint_of(
        rows._fingerprint, Path(__file__).read_bytes(), tokenizer_fingerprint(tokenizer), kind, max_len
    )
    encoded = rows.map(
        partial(ENCODERS[kind], tokenizer=tokenizer, max_len=max_len),
        batched=True,
        remove_columns=rows.column_names,
        features=Features({**FEATURES[kind], **FATE}),
        num_proc=num_proc if num_proc and len(rows) > 10_000 else None,
        new_fingerprint=fingerprint,
        cache_file_name=cache_file(cache_dir, kind, fingerprint),
        desc=f"Encoding {names.data}",
    )
    table = encoded.with_format("arrow")
    fate = {name: table[name][:] for name in FATE}
    kept = np.asarray(fate["dropped"].is_null())
    cut = np.asarray(fate["cut"]) & kept
    longest = int(np.asarray(fate["full_length"]).max())
    if kind == "prompts" and cut.all() and names.data == "train":
        raise UserError(
            f"{names.length_flag} {max_len}: every prompt of {names.data_flag} is longer (up to {longest} tokens); "
            "raise it, or shorten the prompts"
        )
    reasons = Counter(fate["dropped"].drop_null().to_pylist())
    if not kept.any():
        if set(reasons) == {TOO_LONG}:
            raise UserError(
                f"{names.length_flag} {max_len}: every prompt of {names.data_flag} alone is as long (up to {longest} "
                "tokens), so that no answer fits; raise it, or shorten the prompts"
            )
        listed = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        raise UserError(f"{names.data_flag}: no usable row is left for {names.data}: {listed}")
    report_dropped(f"{names.data_flag} ({names.data})", reasons, len(encoded))
    report_cut(kind, int(cut.sum()), len(encoded), max_len, longest, names)
    encoded = encoded.remove_columns(list(FATE))
    return encoded if kept.all() else encoded.select(np.flatnonzero(kept))


def report_cut(kind: str, cut: int, total: int, max_len: int, longest: int, names: Names) -> None:
    """One line for all rows that were cut; none where nothing was."""
    if not cut:
        return
    how = (
        f"longer prompts, up to {longest} tokens, keep their end"
        if kind == "prompts"
        else "longer answers are cut, and without an end token"
    )
    print0(
        f"{names.length_flag} {max_len}: {cut} of {total} rows of {names.data_flag} ({names.data}) are too long: {how}"
    )


def check_serves(rows: Dataset, kind: str, names: Names) -> None:
    """Refuses a data set without the column that the stage learns from."""
    if kind not in NEEDS:
        return
    column, need = NEEDS[kind]
    if len(rows) and rows.with_format("arrow")[column][:].null_count == len(rows):
        raise UserError(f"{names.data_flag}: no row has an answer `{column}`; {need}")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that encode alike, in every process."""
    digest = hashlib.blake2b(digest_size=12)
    state: dict[str, Any] = {
        "kind": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "beginning": beginning(tokenizer),
        "eos": tokenizer.eos_token_id,
        "probe": plain_ids(tokenizer, ["\n\nHuman: One, two;  THREE?\n\nAssistant: été 1234 x"])[0],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        parts = ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")  # not: padding, truncation
        state["rules"] = {part: rules[part] for part in parts}
        state["merges"] = rules["model"].get("merges")
    digest.update(json.dumps(state, sort_keys=True, default=str).encode())
    return digest.hexdigest()
