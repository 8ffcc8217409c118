"""remax.winrate from its flags to a table of win rates."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from remax.cli.evaluation import WinrateArguments
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.pretrained import load_actor, load_reward
from remax.evaluation.judges import Positions, judge_pairs, read_annotations, reward_scores
from remax.evaluation.winrates import Comparison, Difficulty, Summary, by_length, ratings, sigmoid, summarise
from remax.models.loading import check_length, load_config, quiet_libraries
from remax.models.policy import check_policy_config
from utils.data.sources import json_objects
from utils.distributed import init_distributed, is_main, print0, shutdown, world_size
from utils.files import read_text, write_whole
from utils.metrics import WIDTH
from utils.run import UserError

LONGEST = 4096  # tokens that a judge reads, where it has positions for more
EXPECTED = "answers in AlpacaEval's format: rows with instruction and output, and generator for the model's name"
Pair = tuple[str, str]


@dataclass(frozen=True)
class AnswerFile:
    """What a model answered.

    Attributes:
        rows: (instruction, which of the equal instructions it is) -> the answer.
    """

    model: str
    rows: dict[tuple[str, int], str]


def run_winrate(args: WinrateArguments) -> None:
    """Has the answers judged, and prints who wins how often."""
    quiet_libraries()
    if find_spec("sklearn") is None:
        raise UserError("scikit-learn is not installed, which fits the rates: pip install -c constraints.txt -e .")
    kind, _, name = args.judge.partition(":")
    difficulty = None if args.difficulty is None else read_difficulty(args.difficulty)
    files = [read_answers_file(file) for file in args.answers]
    positions: dict[Pair, Positions] = {}
    if kind == "annotations":
        pairs = of_annotations(read_annotations(name, "--judge"), args, files)
    else:
        if twice := [model for model, n in Counter(file.model for file in files).items() if n > 1]:
            raise UserError(f"--answers: two files call their model {twice[0]!r}; give one another `generator`")
        if world_size() > 1:
            init_distributed(args.local_rank)
        pairs = {(b.model, a.model): matched(b, a) for a, b in combinations(files, 2)}
        pairs, positions = judged(args, kind, name, files, pairs)
    summaries = [summarise(comparisons, difficulty) for comparisons in pairs.values()]
    if is_main():
        everything = [one for comparisons in pairs.values() for one in comparisons]
        models = {model for pair in pairs for model in pair}
        rated = ratings(everything) if len(models) > 2 else {}
        if args.json:
            print(json.dumps(as_figures(args, summaries, rated, positions), indent=2))
        else:
            for summary, (pair, comparisons) in zip(summaries, pairs.items(), strict=True):
                print(table(summary, positions.get(pair), difficulty is not None))
                if args.lengths:
                    print(length_table(comparisons))
            if rated:
                print(rating_table(rated))
        if args.output:
            rows = [annotation(one, args.judge) for one in everything]
            write_whole(Path(args.output), json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
    if not args.json and args.output:
        print0(f"verdicts written to {args.output}")
    shutdown()


def read_answers_file(file: str) -> AnswerFile:
    """The answers of a file, and the model's name: its first row's generator, else the file's name."""
    rows: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    name = Path(file).stem
    for place, row in json_objects(file, "--answers", EXPECTED):
        if wrong := [column for column in ("instruction", "output") if not isinstance(row.get(column), str)]:
            raise UserError(f"--answers {file}: {place} has no text in {', '.join(wrong)}; expected {EXPECTED}")
        if not rows and isinstance(row.get("generator"), str):
            name = row["generator"]
        rows[row["instruction"], seen[row["instruction"]]] = row["output"]
        seen[row["instruction"]] += 1
    if not rows:
        raise UserError(f"--answers {file}: holds no answer; expected {EXPECTED}")
    return AnswerFile(name, rows)


def matched(baseline: AnswerFile, model: AnswerFile) -> list[Comparison]:
    """The prompts that both answered."""
    names = (baseline.model, model.model)
    found = [
        Comparison(prompt, baseline.rows[prompt, k], answer, names, None, None, i)
        for i, ((prompt, k), answer) in enumerate(model.rows.items())
        if (prompt, k) in baseline.rows
    ]
    if not found:
        raise UserError(f"--answers: {model.model} and {baseline.model} have no instruction in common")
    if len(found) < max(len(baseline.rows), len(model.rows)):
        print0(
            f"{len(found)} instructions are common to {model.model} ({len(model.rows)}) and {baseline.model} "
            f"({len(baseline.rows)}); the others are left out"
        )
    return found


def of_annotations(
    found: Sequence[Comparison], args: WinrateArguments, files: Sequence[AnswerFile]
) -> dict[Pair, list[Comparison]]:
    """Comparisons by pair of models; files of answers, where given, choose the models and their order."""
    order = [file.model for file in files]
    pairs: dict[Pair, list[Comparison]] = {}
    for one in found:
        if order and not {*one.models} <= {*order}:
            continue
        first, second = one.models
        turn = order.index(second) > order.index(first) if order else (second, first) in pairs
        one = one.reversed() if turn else one
        pairs.setdefault(one.models, []).append(one)
    if not pairs:
        known = sorted({name for one in found for name in one.models})
        raise UserError(f"--judge {args.judge}: compares {', '.join(known)}, and not {', '.join(order)}")
    return pairs


def judged(
    args: WinrateArguments, kind: str, name: str, files: Sequence[AnswerFile], pairs: dict[Pair, list[Comparison]]
) -> tuple[dict[Pair, list[Comparison]], dict[Pair, Positions]]:
    """The comparisons with the verdicts of a model."""
    config = load_config(name, "--judge")
    most = min(getattr(config, "max_position_embeddings", None) or LONGEST, LONGEST)
    check_length(config, args.max_seq_len or most, "--max_seq_len", "--judge")
    options: dict[str, Any] = {"max_len": args.max_seq_len or most, "batch_size": args.batch_size, "flag": "--judge"}
    engine = EngineConfig(dtype=args.dtype)
    if kind == "lm":
        check_policy_config(config, name, "--judge")
        actor, tokenizer = load_actor(name, engine=engine, flag="--judge")
        found = {pair: judge_pairs(actor, tokenizer, comparisons, **options) for pair, comparisons in pairs.items()}
        return {pair: one for pair, (one, _) in found.items()}, {pair: where for pair, (_, where) in found.items()}
    reward, tokenizer = load_reward(name, engine=engine, flag="--judge")
    score: dict[tuple[str, str, str], float] = {}  # by model, prompt and answer
    for file in files:
        keys = list(dict.fromkeys((prompt, answer) for (prompt, _), answer in file.rows.items()))
        questions, answers = (list(column) for column in zip(*keys, strict=True))
        scores, cut = reward_scores(reward, tokenizer, questions, answers, **options)
        if not scores.isfinite().all():
            raise UserError(f"--dtype {args.dtype}: the scores of {file.model} are not finite numbers; try fp32")
        if cut:
            print0(
                f"{file.model}: {cut} of {len(answers)} answers are cut at {options['max_len']} tokens (--max_seq_len)"
            )
        score |= {(file.model, *key): value for key, value in zip(keys, scores.tolist(), strict=True)}
    return {pair: [by_reward(one, score) for one in comparisons] for pair, comparisons in pairs.items()}, {}


def by_reward(one: Comparison, score: dict[tuple[str, str, str], float]) -> Comparison:
    """With Bradley-Terry's p, the sigmoid of the rewards' difference; the verdict is the higher reward's."""
    baseline, model = one.models
    margin = score[model, one.prompt, one.second] - score[baseline, one.prompt, one.first]
    return dataclasses.replace(one, p=float(sigmoid(np.array(margin))), verdict=0.5 + 0.5 * float(np.sign(margin)))


def read_difficulty(file: str) -> Difficulty:
    """AlpacaEval's df_gamed.csv."""
    import pandas

    columns = ["index", "instruction_difficulty", "std_delta_len", "preference"]
    text = read_text(file, "--difficulty", "df_gamed.csv of AlpacaEval")
    try:
        rows = pandas.read_csv(io.StringIO(text))[columns].dropna()
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--difficulty {file}: {str(error).splitlines()[0]}; expected df_gamed.csv of AlpacaEval, with the columns "
            f"{', '.join(columns)}"
        ) from error
    known = rows.drop_duplicates("index")
    of_prompt = dict(zip(known["index"].astype(int), known["instruction_difficulty"].astype(float), strict=True))
    length = np.tanh(rows["std_delta_len"].to_numpy(dtype=float))
    gamed = np.stack([length, rows["instruction_difficulty"].to_numpy(dtype=float), np.zeros(len(rows))], axis=1)
    return Difficulty(of_prompt, gamed, rows["preference"].to_numpy(dtype=float))


def annotation(one: Comparison, judge: str) -> dict[str, Any]:
    """A row of alpaca_eval's annotations."""
    return {
        "index": one.index,
        "instruction": one.prompt,
        "output_1": one.first,
        "generator_1": one.models[0],
        "output_2": one.second,
        "generator_2": one.models[1],
        "annotator": judge,
        "preference": None if one.p is None else 1 + one.p,
        "verdict": one.verdict,
    }


def table(summary: Summary, positions: Positions | None, whole: bool) -> str:
    """One model against another, in words and figures."""
    baseline, model = summary.models
    judged_ones = summary.comparisons - summary.without_verdict
    lines = [
        ("win rate", f"{summary.raw}", "mean probability of winning; 95 % by prompts drawn anew"),
        ("  discrete", f"{summary.discrete}", f"by verdicts, {summary.ties} ties count half; 95 % by Wilson"),
        (
            "  length-controlled",
            f"{summary.controlled}",
            f"as if both were equally long; {'full' if whole else 'minimal'}",
        ),
        ("  longer wins", f"{summary.longer_wins:5.1f} %", "what preferring the longer answer would give"),
    ]
    if summary.for_longer is not None:
        lines.append(("verdicts for longer", f"{summary.for_longer:5.1f} %", "of those that are no tie"))
    lengths = " : ".join(f"{characters:.0f}" for characters in summary.characters)
    lines.append(("mean characters", lengths, f"{model} : {baseline}"))
    if positions is not None:
        lines.append(("shown first wins", f"{100 * positions.first:5.1f} %", "50 % for a judge without position bias"))
        lines.append(("orders disagree", f"{100 * positions.disagreements:5.1f} %", "these are ties"))
    text = [f"\n{model} over {baseline}, {judged_ones} comparisons"]
    if summary.without_verdict:
        text[0] += f" ({summary.without_verdict} more without a verdict)"
    text += [f"  {name:<21}{figure:<28}{words}".rstrip() for name, figure, words in lines]
    if summary.extreme:
        text.append("  warning: the control moves the rate very far; look at --lengths before you trust either")
    return "\n".join(text)


def length_table(comparisons: Sequence[Comparison]) -> str:
    """The rate by difference of length."""
    baseline, model = comparisons[0].models
    lines = [f"  {model}'s answer is longer by   comparisons   win rate"]
    for low, high, n, rate in by_length(comparisons):
        lines.append(f"  {f'{low} to {high}':<{len(lines[0]) - 26}}{n:>11}   {rate:6.1f} %")
    return "\n".join(lines)


def rating_table(rated: dict[str, tuple[float, float, float]]) -> str:
    """Elo points of all models."""
    width = min(max(len(name) for name in rated) + 2, WIDTH - 40)
    lines = [f"\n{'ratings':<{width + 2}}{'Elo':>6}   95 %, by prompts drawn anew"]
    lines += [f"  {name:<{width}}{elo:6.0f}   [{low:.0f}, {high:.0f}]" for name, (elo, low, high) in rated.items()]
    return "\n".join(lines)


def as_figures(
    args: WinrateArguments,
    summaries: Sequence[Summary],
    rated: dict[str, tuple[float, float, float]],
    positions: dict[Pair, Positions],
) -> dict[str, Any]:
    """All of it for programs."""
    pairs = []
    for summary in summaries:
        where = positions.get(summary.models)
        extra = {} if where is None else {"positions": dataclasses.asdict(where)}
        pairs.append(dataclasses.asdict(summary) | {"extreme": summary.extreme} | extra)
    elo = {name: dict(zip(("elo", "low", "high"), found, strict=True)) for name, found in rated.items()}
    return {"judge": args.judge, "pairs": pairs, "ratings": elo}
