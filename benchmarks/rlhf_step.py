"""What a step of step 3 costs: seconds of its parts and peak memory, beside other ways to the same step.

    python benchmarks/rlhf_step.py --output docs/results/rlhf_step.md
    python benchmarks/rlhf_step.py --family llama --prompts 16 --size 64+64 --lengths natural --rounds 5
    python benchmarks/rlhf_step.py --shape 1.1b --dtype bf16 --output docs/results/rlhf_step_gpu.md

The first measures what docs/results shows, the second one setting; the third, for a GPU of 80 GB, large models.
Compared are ReMax, RLOO, GRPO and PPO by this pipeline's own trainer, ReMax in the authors' way (`rlhf_ways/authors`),
and, where trl 1.16.0 is installed, TRL's RLOO and GRPO trainers. All ways answer the same prompts with answers of the
same lengths (`rlhf_ways/models.py` says how) by the same sampling. They take turns in one process, `--rounds` times
after a first round that does not count; a ratio is the median of the rounds' ratios. Large models take turns two ways
at a time, as many as fit beside one another; with `--apart` each way has a process. Peak memory always comes from such
a process: on a GPU what torch allocated, on a CPU the resident set without what the libraries take.

With two ranks, one and two ranks are started by turns, each rank on a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from measuring import (
    SHAPES,
    best_rates,
    figures_of,
    forget_peak,
    machine,
    peak,
    ratios,
    resident,
    spread,
    table,
    write_results,
)
from turns import trl_is_here

OURS = ("ReMax", "ReMax, greedy answers cut", "ReMax, no CUDA graphs", "RLOO k=2", "GRPO k=2", "PPO")
AUTHORS = "authors' way"
TRL = ("TRL RLOO k=2", "TRL GRPO k=2")
WAYS = (*OURS, AUTHORS, *TRL)
PARTS = ("generate", "score", "reference", "update", "rest")
SMALL = ("tiny", "10m")  # shapes of which all ways fit beside one another
PACKAGES = ("torch", "transformers", "deepspeed", "trl")


@dataclass(frozen=True)
class Cell:
    """A setting in which ways are compared.

    Attributes:
        prompts: Of a step, on one rank.
        answer: Longest answer, in tokens; every one with forced lengths, else they are even on 1..answer.
        more: Further flags of step 3.
        seconds: By the clock (`wall`), or those of this process on its core (`cpu`).
        memory: Whether the peak memory of each way is measured, in a process of its own.
        profile: Whether each way takes one step more, whose operators are told apart; not TRL's, in their threads.
    """

    family: str = "llama"
    prompts: int = 16
    prompt: int = 64
    answer: int = 64
    lengths: str = "forced"
    top_p: float = 1.0
    ranks: int = 1
    ways: tuple[str, ...] = ("ReMax", AUTHORS)
    shape: str = "10m"
    dtype: str = "fp32"
    micro_batch: int = 16
    more: str = ""
    seconds: str = "wall"
    memory: bool = False
    profile: bool = False

    def __str__(self) -> str:
        truncated = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        return f"{self.family} {self.prompts} x {self.prompt}+{self.answer} {self.lengths}{truncated}"

    @property
    def forward_rows(self) -> int:
        """Of a training forward."""
        return min(self.micro_batch, self.prompts)

    def models(self, place: Path) -> Path:
        """The folder of the models and tokenizers that all ways read; cells whose models are alike share it."""
        from rlhf_ways.models import make_models

        of = (self.family, self.shape, self.dtype, self.answer, 2 * (self.prompt + self.answer))
        folder = place / "-".join(map(str, of))
        if not folder.is_dir():
            make_models(folder, *of)
        return folder

    def rows(self, seed: int) -> list[list[int]]:
        """The prompts of a step."""
        from rlhf_ways.models import prompt_rows

        return prompt_rows(self.shape, self.prompts, self.prompt, self.answer, self.lengths == "natural", seed)

    def written(self, way: str, rows: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        """Of each prompt the lengths of its sampled answers, and that of its greedy one where there are any."""
        from rlhf_ways.models import answer_length

        lengths = [answer_length(row, self.answer) for row in rows]
        if way.endswith("k=2"):
            return [[n, n] for n in lengths], []
        greedy = {"PPO": 0, "ReMax, greedy answers cut": max(1, self.answer // 4)}.get(way, self.answer)
        return [[n] for n in lengths], [min(n, greedy) for n in lengths] if greedy else []


NATURAL = replace(Cell(), lengths="natural")
LONG = {"prompt": 128, "answer": 256}
SUITE = (
    replace(Cell(), family="opt", ways=("ReMax", OURS[1], AUTHORS, "PPO", "RLOO k=2", "TRL RLOO k=2"), memory=True),
    Cell(),
    replace(NATURAL, ways=("ReMax", AUTHORS, "RLOO k=2", "TRL RLOO k=2")),
    replace(Cell(), **LONG),
    replace(NATURAL, **LONG),
    replace(Cell(), ranks=2, ways=("ReMax",)),
    replace(NATURAL, family="opt"),
    replace(Cell(), top_p=0.9),
    replace(Cell(), prompts=4),
    replace(Cell(), prompts=64, ways=("ReMax",)),
)
LARGE = replace(Cell(), prompts=32, answer=128)
LARGE_SUITE = (
    LARGE,
    replace(LARGE, ways=("RLOO k=2", "TRL RLOO k=2")),
    replace(LARGE, ways=("ReMax", "ReMax, no CUDA graphs")),
    replace(LARGE, ways=("ReMax", "PPO")),
    replace(LARGE, lengths="natural"),
)


# ------------------------------------------------------------------------------------------- in a process of its own


def one(cell: Cell, ways: Sequence[str], rounds: int, folder: Path) -> dict:
    """Rounds of all ways in this process: each way's steps, its peak memory where it is alone, and the best rates."""
    import torch
    from rlhf_ways.authors import Authors
    from rlhf_ways.operators import operators
    from rlhf_ways.ours import Ours
    from rlhf_ways.products import products, size_of
    from rlhf_ways.with_trl import Theirs
    from transformers import AutoConfig

    from utils.distributed import init_distributed, rank

    steps = [cell.rows(1000 * int(os.environ.get("RANK", "0")) + seed) for seed in range(rounds + 1)]
    if trl_is_here():
        import trl  # noqa: F401, so that what libraries take is the same for all ways
    # TRL's come first: they would take part in the process group
    theirs = {way: Theirs(way, folder, cell, steps) for way in ways if way in TRL}
    init_distributed()
    libraries = 0 if torch.cuda.is_available() else resident("VmRSS")
    sides = {
        way: Authors(way, folder, cell) if way == AUTHORS else Ours(way, folder, cell) for way in ways if way not in TRL
    }
    sides |= theirs
    found: dict = {"ways": {way: [] for way in ways}, "best": [], "peak": 0}
    for i, rows in enumerate(steps):
        found["best"].append(best_rates(cell.dtype))
        for way in ways if i % 2 else reversed(ways):
            forget_peak()
            record = sides[way].step(rows)
            sampled, _ = cell.written(way, rows)
            wanted = statistics.mean(length for lengths in sampled for length in lengths)
            if abs(record["length"] - wanted) > 0.01:
                raise RuntimeError(f"{way}: answers of {record['length']} tokens, where {wanted} were wanted")
            if i:
                found["ways"][way].append(record)
                found["peak"] = max(found["peak"], peak() - libraries)
    profiled = sorted(sides.keys() - theirs.keys()) if cell.profile else ()
    found["operators"] = {way: operators(sides[way], steps[0]) for way in profiled}
    size = size_of(AutoConfig.from_pretrained(folder / "policy"))
    found["operations"], found["tokens"] = {}, {}
    for way in ways:
        told = [cell.written(way, rows) for rows in steps[1:]]
        needs = [products(size, cell.prompt, *lengths, critic=way == "PPO") for lengths in told]
        found["operations"][way] = needs
        found["tokens"][way] = [sum(map(sum, sampled)) + sum(greedy) for sampled, greedy in told]
    return found if rank() == 0 else {}


# --------------------------------------------------------------------------------------------------- from the outside


def measure(cell: Cell, ways: Sequence[str], rounds: int, folder: Path) -> dict:
    """`one` in a process of its own."""
    return of_rank(0, cell, ways, rounds, folder, {})


def of_rank(
    rank: int, cell: Cell, ways: Sequence[str], rounds: int, folder: Path, variables: dict[str, object]
) -> dict:
    """`one` as a rank, on a CPU with a core of its own."""
    import torch

    if not torch.cuda.is_available():
        cores = sorted(os.sched_getaffinity(0))
        variables = variables | {"OMP_NUM_THREADS": 1, "CORE": cores[rank % len(cores)]}
    command = [sys.executable, __file__, "--one", json.dumps([asdict(cell), list(ways), rounds, str(folder)])]
    texts = {name: str(value) for name, value in variables.items()}
    return figures_of(f"{cell}: {', '.join(ways)}", command, **texts)


def together(cell: Cell, rounds: int, folder: Path) -> dict:
    """All ways by turns, then the peak memory of each alone."""
    found = measure(cell, cell.ways, rounds, folder)
    found["peak"] = {way: measure(cell, [way], 1, folder)["peak"] for way in cell.ways if cell.memory}
    return found


def apart(cell: Cell, rounds: int, folder: Path) -> dict:
    """Each way alone."""
    each = {way: measure(cell, [way], rounds, folder) for way in cell.ways}
    found = {name: {way: each[way][name][way] for way in each} for name in ("ways", "operations", "tokens")}
    best = [rates for way in each for rates in each[way]["best"]]
    return found | {"best": best, "peak": {way: each[way]["peak"] for way in each}}


def in_ranks(cell: Cell, rounds: int, folder: Path) -> dict:
    """The first way of a cell by one rank and by `cell.ranks` in turns, as many prompts a rank: tokens a second."""
    found: dict = {"one": [], "all": []}
    for _ in range(max(2, rounds // 2)):
        for name, ranks in (("one", 1), ("all", cell.ranks)):
            each, way = of_ranks(cell, ranks, folder), cell.ways[0]
            pairs = zip(each["tokens"][way], each["ways"][way], strict=True)
            found[name] += [ranks * tokens / step["step"] for tokens, step in pairs]
    return found


def of_ranks(cell: Cell, ranks: int, folder: Path) -> dict:
    """Three rounds of the first way by several ranks."""
    from concurrent.futures import ThreadPoolExecutor

    from utils.distributed import free_port

    shared = {"WORLD_SIZE": ranks, "MASTER_PORT": free_port(), "MASTER_ADDR": "127.0.0.1"}

    def start(rank: int) -> dict:
        return of_rank(rank, cell, cell.ways[:1], 3, folder, shared | {"RANK": rank, "LOCAL_RANK": rank})

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(start, range(ranks)))[0]


# --------------------------------------------------------------------------------------------------------- the report


def seconds(found: dict, way: str, part: str) -> list[float]:
    return [step[part] for step in found["ways"][way]]


def best(found: dict, what: str) -> float:
    return max(rates[what] for rates in found["best"])


def needed(found: dict, way: str, part: str | None = None) -> list[float]:
    """Seconds that the matrix products of a part, or of the whole step, need at the best rate."""
    return [sum(o.values() if part is None else [o[part]]) / best(found, "flops") for o in found["operations"][way]]


def times_table(results: list[tuple[Cell, dict]]) -> list[str]:
    def rows() -> Iterator[list[str]]:
        for cell, found in results:
            mine = seconds(found, "ReMax", "step") if "ReMax" in found["ways"] else None
            for way in found["ways"]:
                whole = seconds(found, way, "step")
                parts = [f"{statistics.median(seconds(found, way, part)):.2f}" for part in PARTS]
                rate = statistics.median(ratios(found["tokens"][way], whole))
                ratio = spread(ratios(whole, mine), 2) if mine and way != "ReMax" else ""
                peak = f"{found['peak'][way] / 2**20:.0f}" if way in found["peak"] else ""
                yield [str(cell), way, spread(whole, 2), *parts, f"{rate:.0f}", peak, ratio]

    head = ["setting", "way", "step s", *PARTS, "generated tokens/s", "peak MiB", "its step / ReMax's"]
    return ["## Steps", "", *table(head, rows())]


def products_table(results: list[tuple[Cell, dict]]) -> list[str]:
    """How near our own parts are to what their matrix products need."""

    def rows() -> Iterator[list[str]]:
        for cell, found in results:
            for way in found["ways"]:
                if way not in ("ReMax", AUTHORS):
                    continue
                shares = []
                for part in PARTS[:-1]:
                    share = statistics.median(ratios(needed(found, way, part), seconds(found, way, part)))
                    shares.append(f"{100 * share:.0f} %")
                whole = spread(ratios(seconds(found, way, "step"), needed(found, way)), 2)
                yield [str(cell), way, f"{statistics.median(needed(found, way)):.2f}", *shares, whole]

    head = [
        "setting",
        "way",
        "products alone s",
        *(f"{part}, of the best rate" for part in PARTS[:-1]),
        "step / products",
    ]
    return ["## Beside what the matrix products need", "", *table(head, rows())]


def derived(results: list[tuple[Cell, dict]]) -> list[str]:
    """What needs two lines of the tables."""
    lines = ["## Besides", ""]
    for cell, found in results:
        ways = found["ways"]
        if "ReMax, greedy answers cut" in ways and "ReMax" in ways:
            cut = ratios(seconds(found, "ReMax, greedy answers cut", "generate"), seconds(found, "ReMax", "generate"))
            lines.append(
                f"- {cell}: greedy answers of at most a quarter save {100 * (1 - statistics.median(cut)):.0f} % of a "
                "generation."
            )
        for name in ("RLOO", "GRPO"):
            if f"TRL {name} k=2" in ways and f"{name} k=2" in ways:
                ratio = ratios(seconds(found, f"TRL {name} k=2", "step"), seconds(found, f"{name} k=2", "step"))
                lines.append(f"- {cell}: TRL's {name} takes {spread(ratio, 2)} times this project's.")
    alike: dict[Cell, list[tuple[int, float]]] = {}
    for cell, found in results:
        if "ReMax" in found["ways"]:
            cost = 1000 * statistics.median(seconds(found, "ReMax", "step")) / cell.prompts
            alike.setdefault(replace(cell, prompts=0, ways=()), []).append((cell.prompts, cost))
    for cell, costs in alike.items():
        if len({prompts for prompts, _ in costs}) > 1:
            told = ", ".join(f"{cost:.0f} ms with {prompts}" for prompts, cost in sorted(costs))
            lines.append(f"- {replace(cell, prompts=1)}: a prompt costs {told} of a step.")
    return [*lines, ""]


def operators_table(results: list[tuple[Cell, dict]]) -> list[str]:
    from rlhf_ways.operators import lines

    head = ["way", "part", "CPU s", "in matrix products", "in the largest others"]
    ways = [(f"{cell}: {way}", ops) for cell, found in results for way, ops in found.get("operators", {}).items()]
    return ["## Operators", "", *table(head, (row for way, ops in ways for row in lines(way, ops)))] if ways else []


def ranks_table(results: list[tuple[Cell, dict]]) -> list[str]:
    def rows() -> Iterator[list[str]]:
        for cell, found in results:
            ratio = statistics.median(found["all"]) / statistics.median(found["one"])
            yield [str(cell), str(cell.ranks), spread(found["one"], 0), spread(found["all"], 0), f"{ratio:.2f}"]

    head = ["setting, a rank", "ranks", "tokens/s of one", "tokens/s of all", "times"]
    return ["## Ranks", "", *table(head, rows())] if results else []


def report(results: list[tuple[Cell, dict]], rounds: int, versions: str) -> str:
    alone = [(cell, found) for cell, found in results if cell.ranks == 1]
    lines = [f"{versions}. Medians [least, greatest] of {rounds} rounds.", ""]
    if alone:
        rates = [(best(found, "flops") / 1e9, best(found, "bytes") / 1e9) for _, found in alone]
        flops, moved = (statistics.median(column) for column in zip(*rates, strict=True))
        lines += [f"Best rates seen: {flops:.0f} GFLOP/s of a matrix product, {moved:.0f} GB/s of a copy.", ""]
        lines += times_table(alone) + products_table(alone) + derived(alone) + operators_table(alone)
    return "\n".join(lines + ranks_table([(cell, found) for cell, found in results if cell.ranks > 1])).rstrip()


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shape", choices=SHAPES, help="of all models (10m)")
    flags.add_argument("--dtype", choices=("fp32", "bf16"))
    flags.add_argument("--family", choices=("llama", "opt"))
    flags.add_argument("--prompts", type=int, help="of a step, on one rank")
    flags.add_argument("--size", help="tokens of a prompt + of the longest answer (64+64)")
    flags.add_argument(
        "--lengths", choices=("forced", "natural"), help="all answers the longest, or even on 1..longest"
    )
    flags.add_argument("--top_p", type=float)
    flags.add_argument("--ranks", type=int, help="more than one: beside one rank alone, ReMax only")
    flags.add_argument("--micro_batch", type=int, help="rows of a training forward")
    flags.add_argument("--ways", nargs="+", choices=WAYS)
    flags.add_argument("--more", help="further flags of step 3, for this project's ways")
    flags.add_argument("--seconds", choices=("wall", "cpu"), help="of the clock, or on a core: where others work too")
    flags.add_argument(
        "--cells", type=int, nargs="+", help="of those that docs/results shows, these (from 0) once more"
    )
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--apart", action="store_true", help="a process for each way")
    flags.add_argument(
        "--memory", action="store_const", const=True, help="measures the peak memory of each way as well"
    )
    flags.add_argument(
        "--profile", action="store_const", const=True, help="tells the operators of a step apart, beside its seconds"
    )
    flags.add_argument("--output", help="a Markdown file for the tables; all figures go into a .json beside it")
    flags.add_argument("--one", help=argparse.SUPPRESS)
    return flags


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The settings asked for: those of docs/results, or one."""
    small = args.shape in (None, *SMALL)
    start = Cell() if small else LARGE
    given = {name: getattr(args, name) for name in asdict(start) if getattr(args, name, None) is not None}
    if args.size:
        given |= dict(zip(("prompt", "answer"), map(int, args.size.split("+")), strict=True))
    if args.ways:
        given["ways"] = tuple(args.ways)
    if args.cells is not None or not given.keys() - {"seconds"}:
        found = [replace(cell, **given) for cell in (SUITE if args.cells is None else [SUITE[i] for i in args.cells])]
    elif small or args.ways:
        found = [replace(start, **given)]
    else:
        found = [replace(cell, **given) for cell in LARGE_SUITE]
    with_trl = trl_is_here()
    return [replace(cell, ways=tuple(way for way in cell.ways if with_trl or way not in TRL)) for cell in found]


def cell_of(setting: dict) -> Cell:
    """A cell as JSON keeps it."""
    return Cell(**setting | {"ways": tuple(setting["ways"])})


def kept(output: str | None) -> list[tuple[Cell, dict]]:
    """What a former run wrote beside this Markdown file."""
    path = Path(output or "").with_suffix(".json")
    cells = json.loads(path.read_text())["cells"] if output and path.is_file() else []
    return [(cell_of(found.pop("setting")), found) for found in cells]


def main() -> None:
    args = parser().parse_args()
    if args.one:
        if "CORE" in os.environ:
            os.sched_setaffinity(0, {int(os.environ["CORE"])})
        setting, ways, rounds, folder = json.loads(args.one)
        print("FIGURES" + json.dumps(one(cell_of(setting), ways, rounds, Path(folder))), flush=True)
        return
    results = dict(kept(args.output) if args.cells else [])
    versions = machine(*PACKAGES, threads=1)
    with tempfile.TemporaryDirectory() as place:
        for cell in cells_of(args):
            how = in_ranks if cell.ranks > 1 else apart if args.apart else together
            results[cell] = how(cell, args.rounds, cell.models(Path(place)))
            print(report([(cell, results[cell])], args.rounds, versions), flush=True)
            if args.output:
                cells = [{"setting": asdict(cell), **found} for cell, found in results.items()]
                body = report(list(results.items()), args.rounds, versions)
                figures = {"machine": versions, "cells": cells}
                write_results(args.output, "What a step costs", "rlhf_step", body, figures, part=args.cells is not None)


if __name__ == "__main__":
    main()
