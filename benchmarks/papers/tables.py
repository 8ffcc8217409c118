"""The tables of docs/results/paper.md: each figure of a paper beside this project's, with the command that gives it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from measuring import ROOT, table
from papers import published as they
from papers.hours import (
    FIT_ON,
    FITTED,
    LAUNCH,
    errors,
    fit,
    job_of_run,
    predicted,
    published,
    rows_of,
)
from papers.memory import largest_batches, model_rows, model_states
from papers.published import RUNS
from papers.reading import cell, command, number, told

from remax.evaluation.winrates import wilson
from remax.planning.advice import in_batches, with_graphs
from remax.planning.durations import DEVICES, Rates, hours, seconds, work
from remax.planning.phases import GIB

ANSWERS = "python -m remax.answers --model M --benchmark"
HYDRA, STEP, STEP_GPU, ESTIMATORS = (
    f"docs/results/{name}.md" for name in ("hydra", "rlhf_step", "rlhf_step_gpu", "estimators")
)
CITED = "cited"


@dataclass(frozen=True)
class Figure:
    """A figure of a paper, and this project's.

    Attributes:
        source: Of `published.SOURCES`.
        measured: By this project, and on what; empty: not measured.
        predicted: By the planner, the time model or arithmetic; empty: not predicted.
        caveat: Why both cannot simply be compared.
        command: What gives this project's figure; where there is none, what would.
    """

    what: str
    source: str
    published: str
    measured: str = ""
    predicted: str = ""
    caveat: str = ""
    command: str = ""

    @property
    def cells(self) -> list[str]:
        """Of its row."""
        measured = self.measured or ("" if self.predicted else CITED)
        run = f"`{self.command}`" if self.command else ""
        return [self.what, self.source, self.published, measured, self.predicted, self.caveat, run]


HEAD = ("figure", "source", "published", "measured here", "predicted here", "caveat", "command")


@dataclass(frozen=True)
class Section:
    """What a table of the command makes: figures, and tables of another form by their names."""

    figures: list[Figure] = field(default_factory=list)
    others: dict[str, tuple[tuple[str, ...], list[list[str]]]] = field(default_factory=dict)

    def blocks(self, name: str) -> dict[str, list[str]]:
        """Lines by the names of their marks in the document."""
        found = {name: table(HEAD, (figure.cells for figure in self.figures))}
        return found | {other: table(head, rows) for other, (head, rows) in self.others.items()}

    def record(self) -> dict:
        """For the file beside the document."""
        rows = {name: [dict(zip(head, row, strict=True)) for row in of] for name, (head, of) in self.others.items()}
        return {"figures": [asdict(figure) for figure in self.figures], **rows}


def on_the_corpus(method: str) -> str:
    """What a method of benchmarks/estimators reaches at equal tokens; empty where it was not run."""
    found = told(ESTIMATORS, "true reward", estimator=method)
    wins = [told(ESTIMATORS, f"{what}, equal tokens", method=method) for what in ("win rate", "length-controlled")]
    if all(wins):
        found += f", better than SFT's answer in {wins[0]} %, at equal length in {wins[1]} %"
    return found and f"true reward {found}"


# --------------------------------------------------------------------------------------------------------------- memory


def memory() -> Section:
    """Batches, models, and how much less ReMax takes."""
    gpu, old = "docs/results/memory.md", "docs/results/step_memory.md"
    h100 = [number(cell(gpu, "update", case=f"1.1B, {way}").partition("/")[2]) for way in ("ReMax", "PPO")]
    cpu = [number(cell(HYDRA, "peak of a step GiB", setting=way)) for way in ("ReMax", "PPO")]
    states = [number(cell(HYDRA, "measured GiB", setting=way)) for way in ("ReMax", "PPO")]
    planned = model_states()
    theirs = they.MODELS["remax"] / they.MODELS["ppo"]
    figures = [
        Figure(
            "models of ReMax / PPO, Llama-2-7B: 46 % less memory",
            "ReMax ICML",
            f"{theirs:.2f}",
            f"{states[0] / states[1]:.2f} (CPU, 134 M, fp32)",
            f"{planned['remax'] / planned['ppo']:.2f}",
            "without activations; in fp32 a frozen model weighs more",
            command(HYDRA),
        ),
        Figure(
            "the same with activations",
            "ReMax ICML",
            "",
            f"{h100[0] / h100[1]:.2f} (H100, 1.1 B, bf16); {cpu[0] / cpu[1]:.2f} (CPU, 134 M, fp32)",
            "",
            "what activations take is the same for both, so it moves the ratio towards 1",
            command(gpu),
        ),
        Figure(
            "GPT-2 on IMDB, ReMax and PPO",
            "ReMax ICML",
            "15 and 37 GB",
            " and ".join(cell(old, "peak resident memory", **{"": way}) for way in ("ReMax", "PPO"))
            + " (CPU, Llama of 134 M, fp32, two prompts)",
            caveat="batches are not told there",
            command=command(old),
        ),
    ]
    heads = ("GPUs", "Adam offloaded", "algorithm", "ReMax v1", "ReMax ICML", "planned")
    models = ("GiB", "ReMax ICML", "planned")
    return Section(figures, {"batches": (heads, list(largest_batches())), "models": (models, list(model_rows()))})


# ----------------------------------------------------------------------------------------------------------------- time


def of_this_pipeline(run: they.Run) -> float:
    """Hours of the same batch by this pipeline's step, by the time model: micro-batches of 8, its own decode."""
    job = job_of_run(run)
    here = in_batches(job, rows_of(run), 8).job
    here = with_graphs(here, DEVICES[run.gpu].memory * GIB) or here
    return hours(run.prompts, here, sum(seconds(work(here), here, DEVICES[run.gpu]).values()))


def percent(error: float) -> str:
    return f"{100 * error:+.0f} %"


def hours_rows(rates: Rates) -> Iterator[list[str]]:
    """Of every published run that did not run out of memory."""
    for run in (run for run in RUNS if run.hours is not None):
        told, found = published(run), predicted(run, rates)
        parts = (f"{told.get(part, '–')} / {found[part]:.1f}" for part in ("generate", "update"))
        left_out = ""
        if run in FIT_ON:
            without = fit([other for other in FIT_ON if other is not run])
            left_out = percent(errors(run, without)["hours"])
        yield [
            run.source,
            f"{they.NAMES[run.algo]}, {run.model}",
            f"{run.gpus} x {run.gpu.upper()}",
            "yes" if run.offload else "no",
            f"{rows_of(run)}" if run.batch else f"{rows_of(run)} (not told)",
            *parts,
            f"{run.hours:g}",
            f"{found['hours']:.1f}",
            percent(errors(run, rates)["hours"]),
            left_out,
            f"{of_this_pipeline(run):.1f}",
        ]


HOURS = (
    *("source", "run", "GPUs", "Adam offloaded", "prompts a GPU", "T_G published / predicted, s"),
    *("T_B published / predicted, s", "hours", "predicted", "error", "left out of the fit", "this pipeline, predicted"),
)


def rate_rows(rates: Rates) -> Iterator[list[str]]:
    """Of what was fitted, and what was not."""
    meant = {
        "decode": ("of the memory's bandwidth, in a decode step", 1.0, ""),
        "forward": ("of the peak of matrix products, without gradient", 1.0, ""),
        "update": ("of the peak of matrix products, with gradient", 1.0, ""),
        "pcie": ("between a GPU and CPU memory", 1e9, " GB/s"),
        "adam": ("parameters that the CPUs of a machine update", 1e9, " billion/s"),
    }
    for name in FITTED:
        meaning, unit, suffix = meant[name]
        ranges = [getattr(fit([other for other in FIT_ON if other is not run]), name) / unit for run in FIT_ON]
        yield [name, meaning, f"{getattr(rates, name) / unit:.3g}{suffix}", f"{min(ranges):.3g} to {max(ranges):.3g}"]
    yield ["launch", "of a layer in a decode step; not fitted: DeepSpeed issue 8271", f"{1000 * LAUNCH:.2f} ms", ""]
    recorded = f"{1000 * Rates().recorded:.2f} ms"
    yield [
        "recorded",
        "the same in this pipeline's CUDA graphs, beside what is read; measured on an H100 (rlhf_step_gpu.md)",
        recorded,
        "",
    ]


def time() -> Section:
    """Hours of the published runs, and how much faster ReMax is."""
    rates = fit()
    by_name = {(run.source, run.algo, run.gpus, run.offload): run for run in RUNS}

    def ratio(source: str, gpus: int) -> tuple[float, float, float]:
        """Of ReMax's hours to PPO's: published, predicted for their step, and for this pipeline's."""
        pair = [by_name[source, algo, gpus, True] for algo in ("remax", "ppo")]
        theirs = [predicted(run, rates)["hours"] for run in pair]
        ours = [of_this_pipeline(run) for run in pair]
        assert pair[0].hours and pair[1].hours
        return pair[0].hours / pair[1].hours, theirs[0] / theirs[1], ours[0] / ours[1]

    setting = "opt 16 x 64+64 forced"
    ppo = cell(STEP, "its step / ReMax's", setting=setting, way="PPO")
    authors = cell(STEP, "its step / ReMax's", setting=setting, way="authors' way")
    large = cell(STEP_GPU, "its step / ReMax's", way="authors' way")
    hydra = [number(cell(HYDRA, "step s", setting=way)) for way in ("ReMax", "PPO")]
    figures = []
    for source, gpus in (("ReMax v1", 4), ("ReMax v1", 1), ("ReMax ICML", 4), ("ReMax ICML", 1)):
        printed, theirs, ours = ratio(source, gpus)
        figures.append(
            Figure(
                f"hours of ReMax / PPO, Adam offloaded, {gpus} GPU{'s' * (gpus > 1)}",
                source,
                f"{printed:.2f}",
                "",
                f"{theirs:.2f}; {ours:.2f} by this pipeline",
                "each with its largest batch there",
                "python benchmarks/paper.py time",
            )
        )
    figures += [
        Figure(
            "a step of PPO / ReMax: twice as fast (GPT-2: 2.2 times)",
            "ReMax ICML",
            "2.2 (GPT-2, four inner epochs of PPO)",
            f"{ppo} (CPU, OPT of 10 M); {hydra[1] / hydra[0]:.2f} (CPU, Llama of 134 M, answers of 8 tokens)",
            "",
            "PPO with one inner epoch here; nothing is offloaded",
            command(STEP),
        ),
        Figure(
            "a step of the authors' way / of this pipeline, ReMax",
            "ReMax ICML",
            "",
            f"{large} (H100, Llama of 1.1 B); {authors} (CPU, OPT of 10 M)",
            "",
            "the authors' way as `benchmarks/rlhf_ways/authors.py` has it",
            command(STEP_GPU),
        ),
    ]
    of_rates = ("rate", "what it is", "fitted", "with a run left out")
    others = {"hours": (HOURS, list(hours_rows(rates))), "rates": (of_rates, list(rate_rows(rates)))}
    return Section(figures, others)


# -------------------------------------------------------------------------------------------------------------- answers


def judged() -> Section:
    """AlpacaEval and MT-bench."""
    document = "docs/evaluation.md"
    text = (ROOT / document).read_text(encoding="utf-8")

    def demo(name: str) -> str:
        found = re.search(rf"^ +{name} +([\d.]+ %(?: +\[[\d., ]+\])?)", text, flags=re.MULTILINE)
        if found is None:
            raise LookupError(f"{document}: tells no {name}")
        return re.sub(" +", " ", found[1])

    def against(name: str) -> str:
        both = [on_the_corpus(method) for method in ("remax", name)]
        return f"built-in corpus (CPU), equal tokens: ReMax {both[0]}; {name.upper()} {both[1]}" if all(both) else ""

    compare = command(document, "--judge reward:output/demo/reward")
    seeds = [cell("docs/results/demo.md", name, seed="0") for name in ("ReMax", "SFT")]
    study = "python benchmarks/estimators/run.py"
    ours = {
        "SFT": (
            f"demo (CPU): true reward {seeds[0]} over {seeds[1]}; {demo('win rate')} by its reward model, "
            f"{demo('length-controlled')} at equal length, longer wins {demo('longer wins')}",
            compare,
        ),
        "DPO": (against("dpo"), study),
        "PPO": (against("ppo"), study),
    }
    figures = []
    for one in they.JUDGED:
        rate = wilson(one.wins / they.PROMPTS, they.PROMPTS)
        interval = f"{rate.value:.1f} % [{rate.low:.1f}, {rate.high:.1f}]"
        figures.append(
            Figure(
                f"AlpacaEval, ReMax over {one.other}: {one.wins} of {they.PROMPTS}",
                "ReMax v1",
                interval,
                ours[one.other][0],
                "",
                f"length: {they.REMAX_CHARACTERS} characters against {one.characters}; preferring the longer "
                f"answer gives {one.longer_wins} %",
                ours[one.other][1],
            )
        )
    before, after = they.MISTRAL["AlpacaEval"]
    rates = [wilson(share / 100, they.PROMPTS) for share in (before, after)]
    shown = " to ".join(f"{rate.value:.1f} % [{rate.low:.1f}, {rate.high:.1f}]" for rate in rates)
    figures.append(
        Figure(
            "AlpacaEval, Mistral-7B-Instruct before and after ReMax",
            "ReMax ICML",
            shown,
            caveat="the intervals overlap; lengths are not told",
            command=f"{ANSWERS} alpaca_eval --questions alpaca_eval.json --output M.json",
        )
    )
    before, after = they.MISTRAL["MT-bench"]
    figures.append(
        Figure(
            "MT-bench, the same",
            "ReMax ICML",
            f"{before} to {after}",
            caveat="160 judgements of one model; no interval can be computed from the mean",
            command=f"{ANSWERS} mt_bench --questions question.jsonl --output M.jsonl",
        )
    )
    return Section(figures)


# ---------------------------------------------------------------------------------------------------------------- hydra


def hydra() -> Section:
    """Memory and latency of one trunk, and what its models answer."""
    base = {name: number(cell(HYDRA, name, setting="LoRA-PPO")) for name in ("measured GiB", "step s")}
    figures = []
    for way, (size, latency) in they.HYDRA.items():
        of_way = {name: number(cell(HYDRA, name, setting=way)) for name in base}
        states = number(cell(HYDRA, way, shape="7b"))
        theirs = they.HYDRA["LoRA-PPO"]
        told = f"{size} GB" + (f", {latency} s a sample" if latency else " (their estimate)")
        if latency and theirs[1] and way != "LoRA-PPO":
            told += f": {size / theirs[0]:.2f} and {latency / theirs[1]:.2f} of LoRA-PPO's"
        of_base = " and ".join(f"{of_way[name] / base[name]:.2f}" for name in base)
        figures.append(
            Figure(
                f"{way}: memory and latency",
                "Hydra-RLHF",
                told,
                f"{of_way['measured GiB']:.2f} GiB of states, {of_way['step s']:.2f} s a step: {of_base} of LoRA-PPO's "
                "(CPU, 134 M, fp32)",
                f"{states} GB of states at 7B (bf16, rank 16)",
                "there each batch fills the GPU, whence the latency; here all have one batch",
                command(HYDRA),
            )
        )
    joint = "docs/results/joint_critic.md"
    for way, wins in they.HYDRA_WINS.items():
        ours = ""
        if way in ("J-Hydra-PPO", "Hydra-PPO"):
            by_seed = [cell(joint, "true reward, best model", rate="5e-3", seed=seed, setting=way) for seed in "01"]
            ours = f"true reward {' and '.join(by_seed)} on the built-in corpus (CPU, two seeds)"
        figures.append(
            Figure(
                f"{way}: win rate by GPT-4",
                "Hydra-RLHF",
                f"{wins} %",
                ours,
                "",
                "mean of the pairs with all other methods; second-hand; at 1.3B the paper has another order",
                "make demo-hydra" if ours else "",
            )
        )
    return Section(figures)


# ----------------------------------------------------------------------------------------------------------- estimators


def rloo() -> Section:
    """The estimators' win rates beside the true reward on the built-in corpus."""
    ours = {
        "RLOO, 4 answers": "rloo_4",
        "REINFORCE with a mean as baseline": "reinforce_mean",
        "PPO": "ppo",
        "DPO": "dpo",
    }
    remax, figures = on_the_corpus("remax"), []
    for method, wins in they.RLOO.items():
        measured = on_the_corpus(ours[method]) if method in ours else ""
        figures.append(
            Figure(
                f"{method}: win rate on TL;DR, HH (Pythia), HH (Llama)",
                "RLOO",
                ", ".join(f"{win} %" for win in wins),
                measured and f"{measured}; ReMax: {remax} (CPU, built-in corpus, equal tokens)",
                "",
                "no ReMax there; here every answer counts" if measured else "not run here",
                "python benchmarks/estimators/run.py" if measured else "",
            )
        )
    return Section(figures)


def offline() -> Section:
    """Methods without rollouts of their own, or with supervised steps on the best answers."""
    speed = "docs/results/finetune.md"
    figures = []
    for model, (dpo, rdpo) in they.LENGTH_CONTROLLED.items():
        figures.append(
            Figure(
                f"DPO and R-DPO, {model}: length-controlled win rate of AlpacaEval 2",
                "SimPO",
                f"{dpo} % and {rdpo} %",
                caveat="both losses are in step 2; models of this size were not trained here",
                command="python step2_reward_model_finetuning/main.py --loss r-dpo",
            )
        )
    pairs = {name: on_the_corpus(method) for name, method in (("DPO", "dpo"), ("R-DPO", "r_dpo"))}
    if all(pairs.values()):
        measured = "; ".join(f"{name}: {found}" for name, found in pairs.items())
        figures.append(
            Figure(
                "DPO and R-DPO on a task whose true reward is known",
                "SimPO",
                "",
                f"{measured} (CPU, built-in corpus)",
                command="python benchmarks/estimators/run.py --stages offline",
            )
        )
    side = [cell(speed, "times TRL's", work="DPO", side=side) for side in ("padded", "packed")]
    figures.append(
        Figure(
            "DPO: tokens/s",
            "SimPO",
            "",
            f"{side[0]} times TRL's, packed {side[1]} (CPU, 10 M)",
            caveat="no paper tells it",
            command=command(speed),
        )
    )
    figures += [
        Figure(f"INPO: {name}", "INPO", f"{value} %", caveat="`--algo inpo`; not trained at this size here")
        for name, value in they.INPO.items()
    ]
    figures += [
        Figure(f"{name}: win rate", "SuperHF", f"{value} %", caveat="`--algo superhf`; not trained at this size here")
        for name, value in they.SUPERHF.items()
    ]
    return Section(figures)


TABLES: dict[str, Callable[[], Section]] = {
    "memory": memory,
    "time": time,
    "judged": judged,
    "hydra": hydra,
    "rloo": rloo,
    "offline": offline,
}
