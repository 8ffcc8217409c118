"""One text -> token ids.

The prompt is encoded with the tokenizer's own beginning (BOS or none, never two). The answer has the tokens that it has
in the joint text; where a token of the joint text spans the end of the prompt, the answer is encoded alone.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.data.chat import template_of

# Texts after which a new token begins whatever follows; tried in turn.
SEAMS = ("\n", ":", "x", "é")


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
    """Puts `first` before each of `heads`, except where it is there already."""
    return [head if head[: len(first)] == first else first + head for head in heads]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], heads: list[list[int]], answers: list[str]
) -> list[list[int]]:
    """Ids of the answers as they follow their prompts, without an end token.

    The joint text decides wherever it keeps the prompt's tokens: prompt ids + answer ids are then what the tokenizer
    makes of prompt + answer. `heads` are the prompts' `plain_ids`.
    """
    joint = plain_ids(tokenizer, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    return [
        ids[len(head) :] if ids[: len(head)] == head else answer_alone(tokenizer, answer)
        for head, ids, answer in zip(heads, joint, answers, strict=True)
    ]


def answer_alone(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Ids of a text in the middle of a line: at the start of a text, sentencepiece would put a space before it."""
    for seam in SEAMS:
        before, whole = plain_ids(tokenizer, [seam, seam + answer])
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return plain_ids(tokenizer, [answer])[0]


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer in training, scoring and generation: EOS, and the chat template's end of a turn.

    Many chat models have a template that ends a turn by another special token than EOS. Answers that the template has
    written end in that one, all others in EOS.
    """
    template = template_of(tokenizer)
    turn = [tokenizer.convert_tokens_to_ids(template.end_token)] if template and template.end_token else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *turn]))


def join(prompt_ids: list[int], answer_ids: list[int], max_len: int, ends: Sequence[int]) -> list[int]:
    """Joins prompt, answer and its end, which is the first of `ends` unless one is there already; cut at `max_len`."""
    ids = prompt_ids + answer_ids
    if not answer_ids or answer_ids[-1] not in ends:
        ids.append(ends[0])
    return ids[:max_len]


def keep_end(ids: list[int], max_len: int, first: list[int]) -> list[int]:
    """Keeps a long prompt's end, where the question is, after the tokenizer's beginning."""
    if len(ids) <= max_len:
        return ids
    first = first[:max_len] if ids[: len(first)] == first else []
    return first + ids[len(ids) - (max_len - len(first)) :]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that encode alike, in every process."""
    state: dict[str, Any] = {
        "kind": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "beginning": beginning(tokenizer),
        "ends": end_ids(tokenizer),
        "probe": plain_ids(tokenizer, ["\n\nHuman: One, two;  THREE?\n\nAssistant: été 1234 x"])[0],
    }
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        parts = ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")  # not: padding, truncation
        state["rules"] = {part: rules[part] for part in parts}
        state["merges"] = rules["model"].get("merges")
    return hashlib.blake2b(json.dumps(state, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()
