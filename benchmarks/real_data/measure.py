"""Checks a finished run from outside, with plain transformers: reads the folders that the stages wrote.

Writes <run>/measured.json. Held-out rows share prompts (about 40 pairs to a prompt in AlpacaEval-like data), so every
standard error is over prompts, not over rows.
"""

import argparse
import gzip
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from utils.run import UserError, run_main

DATA_ROWS = 600  # real answers that are measured like the policies' answers
PERPLEXITY_ROWS = 512  # the rows that step 1 evaluates on with 2 ranks x 8 batches x 32


def clustered(values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Mean over all rows, and its standard error when rows of one group are not independent.

    sqrt(C / (C - 1) * sum over groups of (sum of the group's deviations)^2) / n, with C groups and n rows.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    sums: dict[str, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    count = len(sums)
    error = math.sqrt(count / max(count - 1, 1) * math.fsum(s * s for s in sums.values())) / n
    return {"mean": mean, "se": error, "n": n, "prompts": count}


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.tensor([list(x), list(y)], dtype=torch.float64))[0, 1])


def batches(ids: list[list[int]], size: int = 64):
    """(row numbers, padded ids, attention mask), rows of like length together."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = max(len(ids[i]) for i in rows)
        padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in rows])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in rows])
        yield rows, padded, mask


@torch.no_grad()
def scores(model, ids: list[list[int]]) -> list[float]:
    """The reward model's score at each row's last token."""
    result = [0.0] * len(ids)
    for rows, padded, mask in batches(ids):
        states = model.base_model(input_ids=padded, attention_mask=mask).last_hidden_state
        ends = model.score(states[torch.arange(len(rows)), mask.sum(1) - 1]).squeeze(-1)
        for row, score in zip(rows, ends.tolist(), strict=True):
            result[row] = score
    return result


@torch.no_grad()
def negative_log_likelihoods(model, ids: list[list[int]], prompt_lengths: list[int]) -> list[tuple[float, int]]:
    """(nats, answer tokens) of each row."""
    result = [(0.0, 0)] * len(ids)
    for rows, padded, mask in batches(ids, 32):
        logprobs = model(input_ids=padded, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        taken = logprobs.gather(-1, padded[:, 1:, None]).squeeze(-1)
        positions = torch.arange(1, padded.shape[1])
        starts = torch.tensor([prompt_lengths[i] for i in rows])[:, None]
        answer = (mask[:, 1:] > 0) & (positions >= starts)
        sums, counts = (-taken * answer).sum(1).tolist(), answer.sum(1).tolist()
        for row, nats, count in zip(rows, sums, counts, strict=True):
            result[row] = (nats, count)
    return result


def encode(tokenizer, prompts: list[str], answers: list[str], max_len: int) -> tuple[list[list[int]], list[int]]:
    """Prompt, answer and end token, cut at max_len; and the prompts' lengths."""
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    tails = tokenizer(answers, add_special_tokens=False)["input_ids"]
    ids = [(h + t + [tokenizer.eos_token_id])[:max_len] for h, t in zip(heads, tails, strict=True)]
    return ids, [len(h) for h in heads]


def perplexities(run: Path, rows: list[dict], max_len: int) -> dict:
    """Held-out perplexity of the policy before and after step 1, and after step 3, on the chosen answers."""
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    ids, starts = encode(tokenizer, [r["prompt"] for r in rows], [r["chosen"] for r in rows], max_len)
    kept = [i for i in range(len(rows)) if starts[i] < max_len][:PERPLEXITY_ROWS]
    result = {}
    for name, folder in (("before", "models/policy"), ("sft", "sft"), ("remax", "remax/actor_final")):
        model = AutoModelForCausalLM.from_pretrained(run / folder).eval()
        pairs = negative_log_likelihoods(model, [ids[i] for i in kept], [starts[i] for i in kept])
        tokens = sum(count for _, count in pairs)
        loss = sum(nats for nats, _ in pairs) / tokens
        # The mean over tokens is a ratio: its error is that of the rows' residuals nats - loss * tokens.
        residuals = [nats - loss * count for nats, count in pairs]
        error = clustered(residuals, [rows[i]["prompt"] for i in kept])["se"] * len(kept) / tokens
        result[name] = {"perplexity": math.exp(loss), "se": math.exp(loss) * error, "loss": loss, "loss_se": error}
    return result


def judge(run: Path, name: str, rows: list[dict], max_len: int) -> dict:
    """Accuracy of a reward model on the held-out pairs: on all, and by whether the longer answer won."""
    tokenizer = AutoTokenizer.from_pretrained(run / name)
    model = AutoModelForSequenceClassification.from_pretrained(run / name).eval()
    sides, lengths = {}, {}
    for side in ("chosen", "rejected"):
        ids, starts = encode(tokenizer, [r["prompt"] for r in rows], [r[side] for r in rows], max_len)
        kept = [i for i in range(len(rows)) if starts[i] < max_len]
        sides[side] = scores(model, [ids[i] for i in kept])
        lengths[side] = [len(ids[i]) - starts[i] for i in kept]
    groups = [rows[i]["prompt"] for i in kept]
    right = [0.5 + 0.5 * ((c > r) - (c < r)) for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
    longer = [(c > r) - (c < r) for c, r in zip(lengths["chosen"], lengths["rejected"], strict=True)]

    def subset(*signs: int) -> dict:
        picked = [i for i in range(len(kept)) if longer[i] in signs]
        return clustered([right[i] for i in picked], [groups[i] for i in picked])

    both = subset(1), subset(-1)
    return {
        "accuracy": clustered(right, groups),
        "longer_chosen": both[0],
        "shorter_chosen": both[1],
        "equal_length": subset(0),
        # As if the longer answer were chosen in half of the pairs of unequal length.
        "balanced": {
            "mean": (both[0]["mean"] + both[1]["mean"]) / 2,
            "se": math.hypot(both[0]["se"], both[1]["se"]) / 2,
        },
        "longer_wins": clustered([0.5 + 0.5 * sign for sign in longer], groups),
        "reward_length_correlation": correlation(
            sides["chosen"] + sides["rejected"], lengths["chosen"] + lengths["rejected"]
        ),
        "score_std": float(torch.tensor(sides["chosen"] + sides["rejected"]).std()),
    }


def repeated(answer: str, n: int = 4) -> float:
    """Share of an answer's n-grams of words that stood in it before."""
    words = answer.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def bold(answer: str) -> float:
    """Bold marks of markdown: a favourite of the judges in such data, and the first thing a small policy overdoes."""
    return float(answer.count("**"))


def policies(run: Path, rows: list[dict], max_prompt: int) -> dict:
    """The answers to held-out prompts at the first and the last evaluation of step 3, and both judges' scores.

    And of the answers that people prefer or do not (`rows`), cut to the same number of tokens, what needs no judge.
    """
    files = sorted((run / "remax" / "answers").glob("step_*.jsonl"))
    longest = json.loads((run / "remax" / "run.json").read_text())["arguments"]["max_answer_seq_len"]
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(run / name).eval() for name in ("reward", "referee")
    }
    read = {
        name: [json.loads(line) for line in file.open()] for name, file in (("sft", files[0]), ("remax", files[-1]))
    }
    result: dict = {"last_step": int(files[-1].stem.removeprefix("step_"))}
    columns: dict[str, dict[str, list[float]]] = {}
    rows = rows[:DATA_ROWS]
    heads = [ids[-max_prompt:] for ids in tokenizer([r["prompt"] for r in rows], add_special_tokens=False)["input_ids"]]
    for side in ("chosen", "rejected"):
        tails = tokenizer([r[side] for r in rows], add_special_tokens=False)["input_ids"]
        cut = [(ids + [tokenizer.eos_token_id])[:longest] for ids in tails]
        texts, groups = tokenizer.batch_decode(cut, skip_special_tokens=True), [r["prompt"] for r in rows]
        whole = [head + tail for head, tail in zip(heads, cut, strict=True)]
        result[side] = {name: clustered(scores(models[name], whole), groups) for name in models} | {
            "length": clustered([len(ids) for ids in cut], groups),
            "ended": clustered([float(len(ids) < longest) for ids in tails], groups),
            "repeated": clustered([repeated(text) for text in texts], groups),
            "bold": clustered([bold(text) for text in texts], groups),
        }
    for name, rows in read.items():
        heads = tokenizer([r["prompt"] for r in rows], add_special_tokens=False)["input_ids"]
        tails = tokenizer([r["answer"] for r in rows], add_special_tokens=False)["input_ids"]
        ids = [
            head[-max_prompt:] + tail[:longest] + ([tokenizer.eos_token_id] if row["length"] < longest else [])
            for head, tail, row in zip(heads, tails, rows, strict=True)
        ]
        columns[name] = {
            "reward": [row["reward"] for row in rows],
            "referee": scores(models["referee"], ids),
            "reward_again": scores(models["reward"], ids),
            "length": [row["length"] for row in rows],
            "ended": [float(row["length"] < longest) for row in rows],
            "repeated": [repeated(row["answer"]) for row in rows],
            "bold": [bold(row["answer"]) for row in rows],
        }
        groups = [row["prompt"] for row in rows]
        openings = Counter(" ".join(row["answer"].split()[:3]) for row in rows)
        result[name] = {key: clustered(values, groups) for key, values in columns[name].items()}
        result[name] |= {
            "distinct_answers": len({row["answer"] for row in rows}),
            "commonest_openings": openings.most_common(5),
            "reward_length_correlation": correlation(columns[name]["reward"], columns[name]["length"]),
        }
    differences = {
        key: [after - before for after, before in zip(columns["remax"][key], columns["sft"][key], strict=True)]
        for key in columns["sft"]
    }
    result["difference"] = {key: clustered(values, groups) for key, values in differences.items()}
    for name, controls in (
        ("rise_at_equal_length", ("length", "ended")),
        ("rise_at_equal_style", ("length", "ended", "bold", "repeated")),
    ):
        result[name] = {key: rise(columns, key, controls, groups) for key in ("reward", "referee")}
    return result


def rise(
    columns: dict[str, dict[str, list[float]]], key: str, controls: Sequence[str], groups: list[str]
) -> dict[str, float]:
    """What is left of the rise of `key` among answers that are alike in `controls`.

    The coefficient of "after" in the least-squares fit key ~ 1 + after + controls over the answers of both policies,
    and its standard error over prompts.
    """
    design, target = [], []
    for name in ("sft", "remax"):
        for values in zip(*(columns[name][control] for control in controls), strict=True):
            design.append([1.0, float(name == "remax"), *values])
        target += columns[name][key]
    x, y = torch.tensor(design, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)
    inverse = torch.linalg.pinv(x.T @ x)
    weights = inverse @ x.T @ y
    pieces = x * (y - x @ weights)[:, None]  # (2n, 2 + controls)
    sums: dict[str, torch.Tensor] = {}
    for group, piece in zip(groups + groups, pieces, strict=True):
        sums[group] = sums.get(group, 0.0) + piece
    meat = sum(torch.outer(s, s) for s in sums.values())
    return {"mean": float(weights[1]), "se": math.sqrt(float((inverse @ meat @ inverse)[1, 1]))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures a finished run with plain transformers.")
    parser.add_argument("--run", required=True, help="output folder of run.sh")
    parser.add_argument("--max_prompt_seq_len", type=int, default=64)
    args = parser.parse_args()
    run = Path(args.run)
    if not (run / "remax" / "answers").is_dir():
        raise UserError(f"--run {run}: no folder remax/answers there; expected a finished run of run.sh")
    torch.set_num_threads(2)
    max_len = json.loads((run / "prepared.json").read_text())["max_seq_len"]
    with gzip.open(run / "data" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    rows = list({(row["prompt"], row["chosen"], row["rejected"]): row for row in read}.values())  # as the stages do
    result = {
        "perplexity": perplexities(run, rows, max_len),
        "reward": judge(run, "reward", rows, max_len),
        "referee": judge(run, "referee", rows, max_len),
        "policy": policies(run, rows, args.max_prompt_seq_len),
    }
    (run / "measured.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {run / 'measured.json'}")


if __name__ == "__main__":
    run_main(main)
