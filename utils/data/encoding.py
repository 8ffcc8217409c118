"""Text rows -> token ids, for each of the three stages.

An answer is followed by the end token unless it was cut: a cut answer must not teach the model to stop there. From a
dialogue of several turns step 1 learns the last answer or all of them: a `loss_mask` then marks the learned ones among
the tokens after the first prompt.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from utils.data import tokens
from utils.data.cache import cache_file, fingerprint_of
from utils.data.config import Overlong, TrainOn
from utils.data.preferences import KEPT
from utils.data.report import SHOWN_ROWS, as_record, as_words, cut_record, report_dropped, report_encoding, tally
from utils.data.shapes import Row, dense, unranked, usable_answers, usable_texts
from utils.run import UserError

INT, BOOL = Value("int32"), Value("bool")
IDS = List(INT)
FEATURES = {
    "supervised": Features({"input_ids": IDS, "prompt_length": INT, "loss_mask": List(BOOL)}),
    "ranking": Features({"chosen_ids": IDS, "rejected_ids": IDS, "prompt_length": INT, "margin": Value("float32")}),
    "ranked": Features({"answers_ids": List(IDS), "ranks": IDS, "prompt_length": INT, "left_out": INT}),
    "prompts": Features({"input_ids": IDS, "prompt": Value("string")}),
}
ENCODING_VERSION = 2  # of the tokens: to be raised with every change, see tests/utils/data/test_golden.py
OPTIONAL = ("loss_mask", "margin")  # columns that are left out where no row has them
# What became of a row, and how long its prompt was before the cut: read from the cache at every start.
FATE = Features({"dropped": Value("string"), "cut": BOOL, "prompt_cut": BOOL, "full_length": INT})
PAIRS_NEEDED = "step 2 learns from pairs: expected the columns chosen and rejected, or answers in an order"
NEEDS = {
    "supervised": ("chosen", "step 1 learns from answers: expected a column chosen or completion"),
    "ranking": ("rejected", PAIRS_NEEDED),
    "ranked": ("rejected", PAIRS_NEEDED),
    "prompts": ("prompt", "step 3 starts from prompts; plain text serves step 1 and --unsupervised_dataset_name"),
}
TOO_LONG = "whose prompt alone fills --max_seq_len"


@dataclass(frozen=True)
class Encoder:
    """How one stage makes token ids of text rows.

    Attributes:
        kind: "supervised" {input_ids, prompt_length, loss_mask}, "ranking" {chosen_ids, rejected_ids, prompt_length,
            margin}, "ranked" {answers_ids, ranks, prompt_length}, or "prompts" {input_ids, prompt} and
            the columns that are kept.
        max_len: In tokens; of prompt and answer together, or of the prompt for "prompts".
        overlong: What becomes of longer prompts: "cut", they keep their end, or "drop". None: "cut" for "prompts",
            "drop" for the others.
        train_on: The "last" answer of a dialogue or "all"; for "supervised".
    """

    kind: str
    tokenizer: PreTrainedTokenizerBase
    max_len: int
    overlong: Overlong | None = None
    train_on: TrainOn = "last"

    @property
    def drops_overlong(self) -> bool:
        return self.kind != "prompts" if self.overlong is None else self.overlong == "drop"

    @property
    def options(self) -> dict[str, str]:
        """What decides about the tokens beside the length, for the cache and data.json."""
        options = {"overlong": "drop" if self.drops_overlong else "cut"}
        return options | ({"train_on": self.train_on} if self.kind == "supervised" else {})

    def encode(self, batch: dict[str, list]) -> dict[str, list]:
        """Columns of text -> columns of FEATURES[kind] and FATE."""
        return to_columns(list(ENCODERS[self.kind](batch, self)))


def supervised_batch(batch: dict[str, list], encoder: Encoder) -> Iterator[Row]:
    """Rows with prompt and chosen -> input_ids, prompt_length, loss_mask and their fate.

    The loss_mask covers the tokens after the prompt; it is None where all of them are learned.
    """
    tokenizer, max_len = encoder.tokenizer, encoder.max_len
    prompts, answers = batch["prompt"], batch["chosen"]
    texts, first = [prompt or "" for prompt in prompts], tokens.beginning(tokenizer)
    plain = tokens.plain_ids(tokenizer, texts)
    heads = tokens.with_beginning(first, plain)
    tails = tokens.encode_answers(tokenizer, texts, plain, [answer or "" for answer in answers])
    places, ends = batch.get("earlier") or [[]] * len(prompts), tokens.end_ids(tokenizer)
    for prompt, answer, head, tail, earlier in zip(prompts, answers, heads, tails, places, strict=True):
        mask, dropped = None, unusable(prompt, [answer])
        if not dropped and encoder.train_on == "all" and earlier is None:
            dropped = "whose earlier answers the chat template rewrites (--train_on last takes such rows)"
        elif not dropped and encoder.train_on == "all" and earlier:
            start, mask = split_turns(tokenizer, prompt, earlier, head)
            head, tail, mask = head[:start], head[start:] + tail, mask[start:] + [True] * len(tail)
        elif not dropped and prompt is None:  # plain text: its first token, or what precedes every text, is the prompt
            (joint,) = tokens.encode_prompts(tokenizer, [answer])
            head, tail = joint[: max(len(first), 1)], joint[max(len(first), 1) :]
        full_length = len(head)
        dropped = dropped or unfit(head, encoder)
        head = make_room(head, [tail], max_len, first)
        ids = tokens.join(head, tail, max_len, ends)
        if mask is not None:
            mask = (mask + [True])[: len(ids) - len(head)]  # True: the end token, where one was added
            dropped = dropped or (None if any(mask) else "without a token to learn")
        yield {
            "input_ids": [] if dropped else ids,
            "prompt_length": len(head),
            "loss_mask": None if dropped else mask,
            **fate(dropped, len(head) + len(tail) >= max_len, len(head), full_length),
        }


def split_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: str, earlier: list[list[int]], head: list[int]
) -> tuple[int, list[bool]]:
    """Finds the earlier answers among a prompt's tokens.

    The tokens stay those of the whole prompt; one that crosses an answer's boundary belongs to the answer.

    Args:
        earlier: (start, end) of the earlier answers, in characters of the prompt; at least one.
        head: The prompt's ids, with the tokenizer's beginning.

    Returns:
        The number of tokens before the first answer, and for each token of `head` whether it belongs to an answer.
    """
    (plain,) = tokens.plain_ids(tokenizer, [prompt])
    boundaries = tokens.plain_ids(tokenizer, [prompt[:at] for span in earlier for at in span])
    offset = len(head) - len(plain)  # the tokenizer's beginning
    mask = [False] * len(head)
    starts = []
    for before, up_to in zip(boundaries[::2], boundaries[1::2], strict=True):
        start, end = shared_length(before, plain), shared_length(up_to, plain)
        end += end < len(up_to)  # the last token crosses the boundary
        starts.append(max(offset + start, 1))
        mask[starts[-1] : offset + end] = [True] * (offset + end - starts[-1])
    return starts[0], mask


def shared_length(a: list[int], b: list[int]) -> int:
    """How many items the two begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def make_room(head: list[int], tails: list[list[int]], max_len: int, first: list[int]) -> list[int]:
    """Cuts a prompt that fills `max_len` alone: it keeps its end, and leaves the answers up to half of the room."""
    if len(head) < max_len:
        return head
    longest = max(len(tail) for tail in tails) + 1
    return tokens.keep_end(head, max(max_len - longest, (max_len + 1) // 2, 1), first)


def ranking_batch(batch: dict[str, list], encoder: Encoder) -> Iterator[Row]:
    """Rows with prompt, chosen and rejected -> chosen_ids, rejected_ids, prompt_length, margin and their fate."""
    tokenizer, max_len = encoder.tokenizer, encoder.max_len
    first, ends = tokens.beginning(tokenizer), tokens.end_ids(tokenizer)
    prompts = [prompt or "" for prompt in batch["prompt"]]
    plain = tokens.plain_ids(tokenizer, prompts)
    heads = tokens.with_beginning(first, plain)
    tails = [
        tokens.encode_answers(tokenizer, prompts, plain, [answer or "" for answer in batch[name]])
        for name in ("chosen", "rejected")
    ]
    margins, several, ranks = (batch.get(name) or [None] * len(prompts) for name in ("margin", "answers", "ranks"))
    for i, (prompt, chosen, rejected, margin, head, *both) in enumerate(
        zip(prompts, batch["chosen"], batch["rejected"], margins, heads, *tails, strict=True)
    ):
        full_length = len(head)
        dropped = unusable(prompt, []) or (None if several[i] is None else unranked(several[i], ranks[i]))
        dropped = dropped or unusable(prompt, [chosen, rejected]) or unfit(head, encoder)
        head = make_room(head, both, max_len, first)
        ids = [tokens.join(head, tail, max_len, ends) for tail in both]
        if not dropped and chosen.strip() == rejected.strip():
            dropped = "with equal answers"
        if not dropped and ids[0] == ids[1]:
            dropped = "whose answers are equal after the cut"
        yield {
            "chosen_ids": [] if dropped else ids[0],
            "rejected_ids": [] if dropped else ids[1],
            "prompt_length": len(head),
            "margin": margin,
            **fate(dropped, len(head) + max(map(len, both)) >= max_len, len(head), full_length),
        }


def ranked_batch(batch: dict[str, list], encoder: Encoder) -> Iterator[Row]:
    """Rows with prompt, answers and ranks -> answers_ids, ranks, prompt_length, left_out and their fate.

    A row without `answers` is a pair: chosen before rejected. left_out counts the answers of a used row that are not
    among its `usable_answers`, as texts or after the cut.
    """
    tokenizer, max_len = encoder.tokenizer, encoder.max_len
    first, ends = tokens.beginning(tokenizer), tokens.end_ids(tokenizer)
    prompts = [prompt or "" for prompt in batch["prompt"]]
    plain = tokens.plain_ids(tokenizer, prompts)
    pairs = zip(batch["chosen"], batch["rejected"], strict=True)
    answers: list[Sequence[str | None]] = [
        pair if found is None else found for found, pair in zip(batch["answers"], pairs, strict=True)
    ]
    owner = [i for i, found in enumerate(answers) for _ in found]
    texts = [answer or "" for found in answers for answer in found]
    encoded = iter(tokens.encode_answers(tokenizer, [prompts[i] for i in owner], [plain[i] for i in owner], texts))
    tails = [[next(encoded) for _ in found] for found in answers]
    for i, head in enumerate(tokens.with_beginning(first, plain)):
        full_length, is_pair = len(head), batch["answers"][i] is None
        ranks = [1, 2] if is_pair else batch["ranks"][i]
        kept = usable_texts(answers[i], ranks)
        dropped = unusable(prompts[i], answers[i] if is_pair else []) or unfit(head, encoder)
        if not dropped and (reason := unranked(answers[i], ranks)):
            dropped = "with equal answers" if is_pair else reason
        head = make_room(head, [tails[i][k] for k in kept] or [[]], max_len, first)
        ids = [tuple(tokens.join(head, tail, max_len, ends)) for tail in tails[i]]
        used = [kept[k] for k in usable_answers([ids[k] for k in kept], [ranks[k] for k in kept])]
        if not dropped and len({ranks[k] for k in used}) < 2:
            dropped = "whose answers are equal after the cut"
        yield {
            "answers_ids": [] if dropped else [ids[k] for k in used],
            "ranks": [] if dropped else dense([ranks[k] for k in used]),
            "prompt_length": len(head),
            "left_out": 0 if dropped else len(ranks) - len(used),
            **fate(dropped, any(len(head) + len(tails[i][k]) >= max_len for k in used), len(head), full_length),
        }


def prompts_batch(batch: dict[str, list], encoder: Encoder) -> Iterator[Row]:
    """Rows with prompt -> input_ids, the text, their fate, and the columns that are kept."""
    first = tokens.beginning(encoder.tokenizer)
    prompts, columns = [prompt or "" for prompt in batch["prompt"]], kept_of(batch)
    for i, (prompt, ids) in enumerate(zip(prompts, tokens.encode_prompts(encoder.tokenizer, prompts), strict=True)):
        dropped = unusable(prompt, []) or unfit(ids, encoder)
        end = tokens.keep_end(ids, encoder.max_len, first)
        columns_of_row = {name: batch[name][i] for name in columns}
        yield {"input_ids": end, "prompt": prompt, **fate(dropped, False, len(end), len(ids)), **columns_of_row}


def kept_of(columns: Iterable[str]) -> list[str]:
    """Those of the columns that are kept as they are."""
    return [name for name in columns if name.startswith(KEPT)]


def fate(dropped: str | None, cut: bool, length: int, full_length: int) -> Row:
    """What became of a row with a prompt of this length, after and before the cut; see FATE."""
    return {"dropped": dropped, "cut": cut, "prompt_cut": length < full_length, "full_length": full_length}


def unusable(prompt: str | None, answers: Sequence[str | None]) -> str | None:
    """Why the texts of a row cannot be used, or None; without a prompt (None) the answer is a plain text."""
    if prompt is not None and not prompt.strip():
        return "with an empty prompt"
    if any(answer is None for answer in answers):
        return "without an answer"
    empty = any(answer is not None and not answer.strip() for answer in answers)
    return ("with an empty text" if prompt is None else "with an empty answer") if empty else None


def unfit(prompt_ids: list[int], encoder: Encoder) -> str | None:
    """Why a prompt of these tokens cannot be used, or None."""
    if not prompt_ids:  # the tokenizer ignores all its characters
        return "whose prompt has no token"
    if not encoder.drops_overlong:
        return None
    if encoder.kind == "prompts":
        return "whose prompt is longer than --max_prompt_seq_len" if len(prompt_ids) > encoder.max_len else None
    return TOO_LONG if len(prompt_ids) >= encoder.max_len else None  # no room for an answer


ENCODERS: dict[str, Callable[[dict[str, list], Encoder], Iterator[Row]]] = {
    "supervised": supervised_batch,
    "ranking": ranking_batch,
    "ranked": ranked_batch,
    "prompts": prompts_batch,
}


def to_columns(rows: list[Row]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@dataclass(frozen=True)
class Names:
    """What messages call the rows and the flags."""

    data: str  # "train" or "eval"
    data_flag: str = "--data_path"
    length_flag: str = "--max_seq_len"


def encode_rows(
    rows: Dataset,
    encoder: Encoder,
    *,
    cache_dir: str | None,
    names: Names,
    num_proc: int | None = None,
    record: list[dict] | None = None,
    in_memory: bool = False,
) -> Dataset:
    """Text rows -> the token ids of one stage; through the cache, with what was dropped and cut reported in one line.

    Args:
        rows: Columns prompt, chosen, rejected; for "ranked" also answers and ranks.
        encoder: Says the columns of the result, of which those in OPTIONAL are left out where no row has them.
        cache_dir: Where the Arrow files go; None: the datasets library's own folder.
        record: Gets an entry: how many rows were dropped and cut.
        in_memory: Write nothing to the cache.

    Returns:
        The usable rows, with the columns of FEATURES.

    Raises:
        UserError: The rows lack what this stage needs, or no row is left.
    """
    kind, max_len = encoder.kind, encoder.max_len
    check_serves(rows, kind, names)
    kept_columns = kept_of(rows.column_names) if kind == "prompts" else []
    made_by = (ENCODING_VERSION, tokens.tokenizer_fingerprint(encoder.tokenizer))
    fingerprint = fingerprint_of(rows._fingerprint, *made_by, kind, max_len, sorted(encoder.options.items()))
    encoded = rows.map(
        encoder.encode,
        batched=True,
        remove_columns=rows.column_names,
        features=Features({**FEATURES[kind], **FATE, **dict.fromkeys(kept_columns, Value("string"))}),
        num_proc=num_proc if num_proc and len(rows) > 10_000 else None,
        new_fingerprint=fingerprint,
        keep_in_memory=in_memory,
        cache_file_name=None if in_memory else cache_file(cache_dir, kind, fingerprint),
        desc=f"Encoding {names.data}",
    )
    table = encoded.with_format("arrow")
    kept = np.asarray(table["dropped"][:].is_null())
    longest = int(np.asarray(table["full_length"][:]).max())
    if kind == "prompts" and np.asarray(table["prompt_cut"][:]).all() and names.data.startswith("train"):
        raise UserError(
            f"{names.length_flag} {max_len}: every prompt of {names.data_flag} is longer (up to {longest} tokens); "
            "raise it, or shorten the prompts"
        )
    dropped = tally(table["dropped"][:].to_pylist(), rows)
    if not kept.any():
        if set(dropped) == {TOO_LONG}:
            raise UserError(
                f"{names.length_flag} {max_len}: every prompt of {names.data_flag} alone is as long (up to {longest} "
                "tokens), so that no answer fits; raise it, or shorten the prompts"
            )
        raise UserError(f"{names.data_flag}: no usable row is left for {names.data}: {as_words(dropped)}")
    dropped = {reason.replace("--max_seq_len", names.length_flag): found for reason, found in dropped.items()}
    what = f"{names.data_flag} ({names.data})"
    report_dropped(what, dropped, len(encoded))
    lost = ("cut", "prompt_cut", *(["left_out"] if kind == "ranked" else []))
    cut = {name: first_rows(np.asarray(table[name][:]) * kept, rows) for name in lost}
    left_out = int(np.asarray(table["left_out"][:]).sum()) if kind == "ranked" else 0
    report_encoding(what, f"{names.length_flag} {max_len}", cut, left_out, longest, len(rows))
    if record is not None:
        used = {"data": names.data_flag, "part": names.data, "kind": kind, "max_len": max_len, **encoder.options}
        counts = {"rows": len(encoded), "kept": int(kept.sum()), "dropped": as_record(dropped)}
        record.append({**used, **counts, **cut_record(kind, cut, left_out)})
    unused = [name for name in OPTIONAL if name in encoded.column_names and table[name][:].null_count == len(encoded)]
    unused += ["left_out"] if kind == "ranked" else []
    encoded = encoded.remove_columns([*FATE, *unused])
    return encoded if kept.all() else encoded.select(np.flatnonzero(kept))


def first_rows(chosen: np.ndarray, rows: Dataset) -> tuple[int, list[str]]:
    """How many rows are chosen, and the names of the first of them."""
    where = np.flatnonzero(chosen)
    named = "origin" in rows.column_names and len(where)
    return len(where), rows[where[:SHOWN_ROWS]]["origin"] if named else []


def has_rankings(rows: Dataset) -> bool:
    """Whether some row has several ranked answers."""
    return "answers" in rows.column_names and rows.with_format("arrow")["answers"][:].null_count < len(rows)


def check_serves(rows: Dataset, kind: str, names: Names) -> None:
    """Refuses a data set without the column that the stage learns from."""
    column, need = NEEDS[kind]
    if column == "rejected" and has_rankings(rows):
        column = "answers"  # where all of them are tied, there is no worst one
    for needed in (column, "prompt") if column in ("rejected", "answers") else (column,):
        if len(rows) and rows.with_format("arrow")[needed][:].null_count == len(rows):
            what = "a prompt" if needed == "prompt" else f"an answer `{needed}`"
            raise UserError(f"{names.data_flag}: no row has {what}; {need}")
