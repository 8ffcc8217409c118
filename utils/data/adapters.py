"""Data sets known by name, in the table ADAPTERS: one small function each, from a row to its texts or messages.

To add one, write a function and name it in that table.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.data import shapes
from utils.data.shapes import (
    Conversation,
    Example,
    Row,
    RowRefused,
    RowSkipped,
    ask,
    margin,
    numbers,
    pair,
    ranked,
    text,
)


def rm_static(row: Row) -> Example:
    """Finished prompts and two answers."""
    return pair(text(row, "prompt"), text(row, "chosen"), text(row, "rejected"), margin=margin(row))


def answered(
    question: str | None, chosen: str | None, rejected: str | None = None, margin: float | None = None
) -> Conversation:
    """As `ask`; rows of public sets without a question or an answer are skipped."""
    if not question or not chosen:
        raise RowSkipped("no question or no answer")
    return ask(question, chosen, rejected, margin=margin)


def bare(row: Row, *, columns: Sequence[str]) -> Conversation:
    """Bare questions and one or two answers."""
    return answered(*(row[column] for column in columns))


def rlhf_reward_datasets(row: Row) -> Example:
    """Dialogues without their last "Assistant:"; the answers may repeat the dialogue."""
    prompt = text(row, "prompt").removesuffix("Assistant:") + "Assistant:"
    chosen, rejected = (text(row, column).split("Assistant:")[-1] for column in ("chosen", "rejected"))
    return pair(prompt, chosen, rejected)


def webgpt(row: Row) -> Conversation:
    """Two scored answers with marks of the passages they cite."""
    scores = numbers({"scores": [row["score_0"], row["score_1"]]}, "scores", 2)
    # Without the passages they cite, marks such as " [1, 2]" mean nothing.
    answers = [re.sub(r" ?\[[^\]]*\]", "", answer) for answer in (row["answer_0"], row["answer_1"])]
    (worse, rejected), (better, chosen) = sorted(zip(scores, answers, strict=True), key=lambda scored: scored[0])
    return answered(row["question"]["full_text"], chosen, rejected if better > worse else None, better - worse)


def shp(row: Row) -> Conversation:
    """Two answers of people, and a label for the better one."""
    a, b = row["human_ref_A"], row["human_ref_B"]
    return answered(row["history"], *((a, b) if int(row["labels"]) == 1 else (b, a)))


def sharegpt_vicuna(row: Row) -> Example:
    """USER/ASSISTANT dialogues and one answer."""
    if not row["prompt"] or not row["label"]:
        raise RowSkipped("no question or no answer")
    return pair(row["prompt"].replace("USER", "Human").replace("ASSISTANT", "Assistant"), row["label"])


def miracl(row: Row) -> Conversation:
    """Queries and passages that answer them, or do not."""
    passages = (row["positive_passages"], row["negative_passages"])
    return answered(row["query"], *(found[0]["text"] if found else None for found in passages))


def hc3(row: Row) -> Conversation:
    """Questions and answers of people."""
    return answered(row["question"], next(iter(row["human_answers"] or []), None))


def mkqa(row: Row, *, language: str) -> Conversation:
    """Questions and answers in several languages, of which one is taken."""
    answers = row["answers"][language]
    return answered(row["queries"][language], answers[0]["text"] if answers else None)


def qag_jaquad(row: Row) -> Conversation:
    """Several questions, of which the first is taken, and the paragraph that answers them."""
    return answered(next(iter(row["questions"] or []), None), row["paragraph"])


def ultrafeedback(row: Row) -> Conversation:
    """Two whole dialogues with a score each."""
    better, worse = numbers({"scores": [row["score_chosen"], row["score_rejected"]]}, "scores", 2)
    return replace(shapes.conversation(row, ["chosen", "rejected"]), margin=better - worse)


def nectar(row: Row) -> Example:
    """Finished prompts and several ranked answers."""
    answers = row["answers"] or []
    ranks = numbers({"ranks": [found["rank"] for found in answers]}, "ranks", len(answers))
    return ranked(text(row, "prompt").rstrip(" "), [found["answer"] or "" for found in answers], ranks)


def ultrafeedback_completions(row: Row) -> Conversation:
    """Bare questions and several scored answers."""
    found = row["completions"] or []
    scores = numbers({"scores": [completion["overall_score"] for completion in found]}, "scores", len(found))
    answers = [completion["response"] or "" for completion in found]
    return replace(ask(text(row, "instruction")), answers=answers, ranks=[-score for score in scores])


ADAPTERS: dict[str, Callable[[Row], Example | Conversation]] = {
    "Dahoas/rm-static": rm_static,
    "Dahoas/full-hh-rlhf": rm_static,
    "Dahoas/synthetic-instruct-gptj-pairwise": partial(bare, columns=("prompt", "chosen", "rejected")),
    "yitingxie/rlhf-reward-datasets": rlhf_reward_datasets,
    "openai/webgpt_comparisons": webgpt,
    "stanfordnlp/SHP": shp,
    "pvduy/sharegpt_alpaca_oa_vicuna_format": sharegpt_vicuna,
    "local/jsonfile": rm_static,
    "wangrui6/Zhihu-KOL": partial(bare, columns=("INSTRUCTION", "RESPONSE")),
    "Cohere/miracl-zh-queries-22-12": miracl,
    "Cohere/miracl-ja-queries-22-12": miracl,
    "Hello-SimpleAI/HC3-Chinese": hc3,
    "mkqa-Chinese": partial(mkqa, language="zh_cn"),
    "mkqa-Japanese": partial(mkqa, language="ja"),
    "lmqg/qg_jaquad": partial(bare, columns=("question", "sentence")),
    "lmqg/qag_jaquad": qag_jaquad,
    "Anthropic/hh-rlhf": shapes.dialogues,
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback,
    "berkeley-nest/Nectar": nectar,
    "openbmb/UltraFeedback": ultrafeedback_completions,
}


def fits(adapter: Callable[[Row], Example | Conversation], row: Row) -> bool:
    """Whether a row of a folder with a known data set's name also has that data set's columns and values."""
    try:
        adapter(row)
    except RowSkipped:
        return True
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RowRefused):
        return False
    return True


def known_name(name: str) -> str | None:
    """The data set of ADAPTERS that `name` means: the name itself, or a folder with that name."""
    path = Path(name)
    if name in ADAPTERS:
        return name
    if not path.is_dir():
        return None
    ends = {"/".join(path.resolve().parts[-2:]), path.resolve().name}
    return next((known for known in ADAPTERS if known in ends or known.split("/")[-1] in ends), None)
