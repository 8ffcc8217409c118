"""The same in Markdown, short: for terminals, pull requests and browsers without scripts."""

from __future__ import annotations

from collections.abc import Sequence

from remax.report.page import buckets, differences
from remax.report.runs import Record, Run
from remax.report.verdict import clock, facts, judge, number, time_split

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a curve
CURVES = ("reward", "kl", "length", "entropy", "loss", "accuracy", "perplexity")
SHOWN = 4  # prompts with their answers
MOST = 200  # answers of an evaluation that are looked at
LONGEST = 300  # characters of a text


def markdown(runs: Sequence[Run]) -> str:
    """The whole text."""
    title = "Report of several runs" if len(runs) > 1 else f"Report: {plain(runs[0].name)}"
    blocks = [f"# {title}", *(block for run in runs for block in of_run(run, named=len(runs) > 1))]
    if len(runs) > 1:
        names = [run.name for run in runs]
        blocks += ["## What differs", table([["setting", *names], *differences(runs)])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def of_run(run: Run, named: bool) -> list[str]:
    """The blocks of one run."""
    verdict, told = judge(run), facts(run)
    head = f"**{verdict.words}.** {plain(' '.join(verdict.sentences))}"
    short = ", ".join(
        f"{name} {plain(told[name])}" for name in ("steps", "time", "peak memory", "device") if name in told
    )
    seconds = time_split(run)
    spent = ", ".join(f"{name} {clock(value)}" for name, value in seconds.items())
    remarks = [["step", "remark", ""], *([str(row["step"]), row["kind"], row["text"]] for row in run.remarks)]
    return [
        f"## {plain(run.name)}" if named else "",
        head,
        f"{run.stage}; {short}" + (f"; time: {spent}" if spent else ""),
        table(figures(run)),
        "```\n" + "\n".join(curves(run)) + "\n```" if curves(run) else "",
        table(remarks) if run.remarks else "",
        answers(run),
    ]


def figures(run: Run) -> list[list[str]]:
    """Held-out figures at the start, at the best evaluation and at the last one."""
    if not run.evaluations:
        return []
    picked = run.milestones
    rows = [["held-out figure", "start", f"best (step {run.best_step})", "end"]]
    for name in picked[0]:
        values = [row.get(name) for row in picked]
        rows.append([name.replace("_", " "), *("–" if value is None else number(value) for value in values)])
    return rows


def curves(run: Run) -> list[str]:
    """Lines of blocks: the course of the main figures over the steps, from the lowest value to the highest."""
    found = []
    for name in CURVES:
        values = run.series(f"train/{name}")[1] or run.series(f"eval/{name}")[1]
        if len(values) < 2:
            continue
        means = [sum(part) / len(part) for part in buckets(values, WIDTH)]
        low, high = min(means), max(means)
        heights = [round((mean - low) / ((high - low) or 1.0) * (len(BLOCKS) - 1)) for mean in means]
        line = "".join(BLOCKS[height] for height in heights)
        found.append(f"{name:<11} {line:<{WIDTH}} {number(means[0])} → {number(means[-1])}")
    return found


def answers(run: Run) -> str:
    """A few prompts with their first and last answers: those whose reward has grown most, and least."""
    kind = "close_ups" if run.answered("close_ups") else "answers"
    steps = run.answered(kind)
    if len(steps) < 2:
        return ""
    first, last = min(steps), max(steps)
    both = (run.answers(kind, step, MOST) for step in (first, last))
    pairs = [pair for pair in zip(*both, strict=False) if pair[0]["prompt"] == pair[1]["prompt"]]
    pairs = [pair for pair in pairs if all(isinstance(row.get("reward"), (int, float)) for row in pair)]
    pairs.sort(key=lambda pair: pair[0]["reward"] - pair[1]["reward"])
    if len(pairs) > SHOWN:
        pairs = pairs[: SHOWN // 2] + pairs[-SHOWN // 2 :]
    rows = [["prompt", f"answer at step {first}", "reward", f"answer at step {last}", "reward"]]
    return table(rows + [answer_row(*pair) for pair in pairs])


def answer_row(before: Record, after: Record) -> list[str]:
    texts = [before["prompt"], before["answer"], after["answer"]]
    prompt, old, new = (text if len(text) <= LONGEST else text[:LONGEST] + " ..." for text in map(str, texts))
    return [prompt, old, number(before["reward"]), new, number(after["reward"])]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first one the head; empty without a row behind it."""
    if len(rows) < 2:
        return ""
    lines = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plain(text: str) -> str:
    """Text in one line, none of which is Markdown or HTML: an untrained model writes anything."""
    text = " ".join(str(text).split())
    seen = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    for mark in "\\`*_[]<>|":
        seen = seen.replace(mark, "\\" + mark)
    return seen or "–"
