"""What a run loses when it is killed, stopped or kept for long: nothing, as these figures are to show.

    python benchmarks/reliability.py --output docs/results/reliability.md

kills: pinned trainings of all stages are killed with SIGKILL at random moments and go on (tests/references/kills.py).
soak: thousands of steps of step 3, once undisturbed and once with stops; memory, descriptors, threads, sizes of logs.
pause: for how long a checkpoint of 100M parameters makes the training wait, written beside it and not.

The exit status is 1 where something differs or grows that must not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import runpy
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/references"), str(ROOT / "tests")]

from cases import STAGES, command  # noqa: E402
from forked import Ranks, fork, import_everything, of_rank  # noqa: E402
from kills import all_kills, left_behind, prepared, table  # noqa: E402
from record import differences, environment  # noqa: E402

HIDDEN, WIDE, LAYERS, HEADS, WORDS = 768, 2048, 8, 12, 32000  # a Llama of 106M parameters
STEPS = 6  # between two checkpoints whose pause is measured
WANTED_SHARE = 0.1  # of the pause without the thread
SAVE, EVALUATE = 100, 250  # steps of the long run
SOAK = (
    "--actor_model_name_or_path {models}/llama --reward_model_name_or_path {models}/llama-reward --algo remax"
    " --num_train_epochs 999 --per_device_generation_batch_size 2 --per_device_training_batch_size 2"
    f" --max_answer_seq_len 8 --actor_learning_rate 1e-4 --save_steps {SAVE} --eval_steps {EVALUATE}"
    " --logging_steps 50 --enable_tensorboard --max_eval_batches 1 --resume auto"
)
TITLES = {"kills": "Killed at random moments", "soak": "Thousands of steps", "pause": "The pause of a checkpoint"}
COMMAND = "python benchmarks/reliability.py --output docs/results/reliability.md"


def apart(action: Callable[[], object], folder: Path, log: str) -> None:
    """Runs something in a process of its own, so that this one stays fit to be forked."""
    pid = fork(action, folder / log, environment(folder, 1) | of_rank(0), folder)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        sys.exit(f"{log} ended with status {status}\n{(folder / log).read_text()[-3000:]}")


def spread(numbers: list[float], digits: int = 2) -> str:
    return f"{statistics.median(numbers):.{digits}f} [{min(numbers):.{digits}f}, {max(numbers):.{digits}f}]"


# ------------------------------------------------------------------------------------------------------------ the pause


def make_model(folder: Path) -> None:
    """Random weights, with the tokenizer of the pinned trainings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/llama")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "models/large")
    tokenizer.save_pretrained(folder / "models/large")


def with_pauses(folder: Path, saves: int) -> None:
    """Step 1 on the large model, whose checkpoints are written beside it in turn with those that it waits for."""
    from remax.checkpoint.checkpoints import Checkpoints

    make_model(folder)
    found: dict[str, list] = {"pauses": [], "writing": []}
    save, write = Checkpoints.save, Checkpoints._write

    def alternating(self: Checkpoints, step: int) -> float:
        self.beside = len(found["pauses"]) % 2 == 0
        waited = save(self, step)
        found["pauses"].append([self.beside, waited])
        return waited

    def timed(self: Checkpoints, *job: object) -> None:
        begin = time.time()
        write(self, *job)  # type: ignore[arg-type]
        found["writing"].append([begin, time.time()])

    Checkpoints.save, Checkpoints._write = alternating, timed  # type: ignore[method-assign]
    flags = "--model_name_or_path {models}/large --num_train_epochs 99 --per_device_train_batch_size 1 --eval_steps 0"
    flags += f" --max_steps {STEPS * (saves + 2) + 1} --save_steps {STEPS} --max_eval_batches 1 --logging_steps 1"
    sys.argv = ["main.py", *command(1, flags, folder, folder / "pause")]
    runpy.run_path(str(ROOT / STAGES[1] / "main.py"), run_name="stage")["main"]()
    (folder / "pauses.json").write_text(json.dumps(found))


def pause(folder: Path, saves: int) -> tuple[bool, list[str]]:
    """The section on the pause; whether it is as short as it is to be."""
    apart(lambda: with_pauses(folder, saves), folder, "pause.log")
    found = json.loads((folder / "pauses.json").read_text())
    pauses = {way: [waited for beside, waited in found["pauses"][2:] if beside is way] for way in (True, False)}
    records = [json.loads(line) for line in (folder / "pause/metrics.jsonl").read_text().splitlines()]
    steps = [(r["time"], r["train/seconds_per_step"]) for r in records if "train/seconds_per_step" in r][1:]
    during, alone = [], []
    for end, seconds in steps:
        inside = sum(max(0.0, min(end, last) - max(end - seconds, first)) for first, last in found["writing"])
        if inside > 0.9 * seconds:
            during.append(seconds)
        elif inside == 0:
            alone.append(seconds)
    share = statistics.median(pauses[True]) / statistics.median(pauses[False])
    written = [last - first for first, last in found["writing"][2:]]
    rows = {"beside the training": pauses[True], "while it waits": pauses[False]}
    lines = [
        "| checkpoint | s that the training waits, median [range] | of |",
        "|---|---|---|",
        *(f"| {way} | {spread(waited)} | {len(waited)} |" for way, waited in rows.items()),
        "",
        f"Written beside it, the training waits {share:.1%} of that time, and copies 3 x 4 bytes a parameter meanwhile;"
        f" wanted: under {WANTED_SHARE:.0%}. The file, its checksum and the disk take {spread(written, 1)} s."
        f" Steps during which the thread writes take {spread(during, 1)} s, the others {spread(alone, 1)} s:"
        f" {len(os.sched_getaffinity(0))} core(s), which training and thread share.",
    ]
    return share < WANTED_SHARE, lines


# ------------------------------------------------------------------------------------------------------------- the soak


@dataclass
class Sample:
    """What a process holds after so many steps."""

    step: int
    resident: float  # MiB
    descriptors: int
    threads: int


def sample(pid: int, output: Path) -> Sample | None:
    """None: it is about to end, or has not begun."""
    try:
        with (output / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
            step = json.loads(file.read().splitlines()[-1])["step"]
        status = Path(f"/proc/{pid}/status").read_text()
        resident, threads = (int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "Threads"))  # type: ignore[index]
        return Sample(step, resident / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads)
    except (OSError, ValueError, IndexError, TypeError):
        return None


def watched(running: Ranks, output: Path, until: int) -> list[Sample]:
    """Samples of a start, twice a second, until it ends or has made `until` steps."""
    samples: list[Sample] = []
    while not running.over() and not (samples and samples[-1].step >= until):
        time.sleep(0.5)
        if found := sample(running.pids[0], output):
            samples.append(found)
    return samples


@dataclass
class Line:
    """The straight line through a run's memory."""

    slope: float  # MiB in 1000 steps
    error: float  # standard error of the slope, from ten blocks of samples, as neighbours depend on one another
    noise: float  # standard deviation round the line, MiB
    mean: float


def line_through(samples: list[Sample]) -> Line:
    """Least squares over steps."""

    def slope_of(some: list[Sample]) -> float:
        return statistics.linear_regression([s.step for s in some], [s.resident for s in some]).slope * 1000

    steps, resident = [s.step for s in samples], [s.resident for s in samples]
    fit = statistics.linear_regression(steps, resident)
    noise = statistics.stdev(y - fit.slope * x - fit.intercept for x, y in zip(steps, resident, strict=True))
    tenth = len(samples) // 10
    without = [slope_of(samples[: k * tenth] + samples[(k + 1) * tenth :]) for k in range(10)]  # a jackknife
    error = (9 / 10 * sum((x - statistics.mean(without)) ** 2 for x in without)) ** 0.5
    return Line(fit.slope * 1000, error, noise, statistics.mean(resident))


def soak(folder: Path, steps: int, seed: int) -> tuple[bool, list[str]]:
    """The section on the long run; whether nothing grew and nothing differed."""
    chance, program = random.Random(seed), ROOT / STAGES[3] / "main.py"

    def start(output: Path) -> Ranks:
        flags = command(3, SOAK + f" --max_steps {steps}", folder, output)
        return Ranks(program, flags, 1, folder, output.with_suffix(".log"))

    plain, stopped = folder / "undisturbed", folder / "stopped"
    running = start(plain)
    samples = watched(running, plain, steps + 1)
    if running.wait():
        sys.exit(f"the undisturbed run failed\n{running.log.read_text()[-3000:]}")
    stops, parts, at = [], [], 0
    while True:
        running = start(stopped)
        at += chance.randint(steps // 15, steps // 6)
        parts.append(watched(running, stopped, at))
        if running.over():
            break
        running.send(signal.SIGTERM)
        status = running.wait()
        if status == 0:  # it came to its end just then
            break
        if status != 128 + signal.SIGTERM:
            sys.exit(f"a stopped run ended with {status}\n{running.log.read_text()[-3000:]}")
        stops.append(int(running.log.read_text().rpartition("stopped by SIGTERM after step ")[2].split(":")[0]))
    if running.wait():
        sys.exit(f"the stopped run failed\n{running.log.read_text()[-3000:]}")
    different = differences(left_behind(stopped), left_behind(plain), exact=True)
    warm = [s for s in samples if s.step > steps // 10]
    line, quarter = line_through(warm), len(warm) // 4
    growth = line.slope * 0.9 * steps / 1000
    flat = growth < max(2 * line.noise, 0.01 * line.mean)
    rows, counts_grow = [], False
    for name in ("descriptors", "threads"):
        first, last = (sorted({getattr(s, name) for s in some}) for some in (warm[:quarter], warm[-quarter:]))
        ends = sorted({max(getattr(s, name) for s in part) for part in parts if part})
        counts_grow |= last[-1] > first[-1]
        rows.append(f"| open {name} | {first[0]} to {first[-1]} | {last[0]} to {last[-1]} | {ends[0]} to {ends[-1]} |")
    sizes = {name: size_of(plain, name) for name in ("metrics.jsonl", "tensorboard", "checkpoints")}
    sizes["printed"] = (plain.with_suffix(".log")).stat().st_size
    kept = sorted(path.name for path in (plain / "checkpoints").iterdir())
    lines = [
        f"Step 3, ReMax, a Llama of 2 layers, answers of 8 tokens: {steps} steps with {steps // SAVE} checkpoints and"
        f" {steps // EVALUATE} evaluations, once undisturbed and once stopped by SIGTERM after steps"
        f" {', '.join(map(str, stops))} and gone on with each time.",
        "",
        f"- The end of both is {'**different**' if different else 'bitwise equal'}: weights, metrics, TensorBoard,"
        " answers.",
        f"- Memory: {line.mean:.0f} MiB, slope {line.slope:+.2f} ± {line.error:.2f} MiB in 1000 steps (after the first"
        f" {steps // 10}; {line.noise:.1f} MiB of noise round it, {len(warm)} samples): {growth:+.1f} MiB, or"
        f" {growth / line.mean:.1%}, from there to the end.",
        f"- metrics.jsonl has {sizes['metrics.jsonl'] / steps:.0f} bytes a step, TensorBoard"
        f" {sizes['tensorboard'] / steps:.0f}, the console {sizes['printed'] / steps:.0f}; checkpoints: {len(kept)}"
        f" kept, {sizes['checkpoints'] / 2**20:.1f} MiB.",
        "",
        f"| | first quarter | last quarter | at the end of {len(parts)} starts |",
        "|---|---|---|---|",
        *rows,
    ]
    return flat and not counts_grow and not different and len(kept) == 1, lines + different[:10]


def size_of(output: Path, name: str) -> int:
    """Bytes of a file, or of all files in a folder."""
    place = output / name
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


# ------------------------------------------------------------------------------------------------------------ the whole


def kills(folder: Path, number: int, seed: int) -> tuple[bool, list[str]]:
    """The section on the kills; whether every end is that of the undisturbed training."""
    rows = []
    for row in all_kills(folder, number, seed):
        rows.append(row)
        print(*table([row])[2:], *row[2][:10], sep="\n", flush=True)
    count = sum(len(found) for _, found, _ in rows)
    lines = [
        f"{count} times SIGKILL to all ranks, seed {seed}. Compared with the same training undisturbed: weights of"
        " every export, every record of metrics.jsonl, every event of TensorBoard, answers, results; all but times. A"
        " start that is killed before it has looked for a checkpoint leaves that to the next one.",
        "",
        *table(rows),
    ]
    return not any(different for _, _, different in rows), lines


def write(output: Path, sections: dict[str, list[str]]) -> None:
    """The document, in which sections of parts that were not measured now stay as they were."""
    before = output.read_text().split("\n## ")[1:] if output.exists() else []
    texts = {text.partition("\n")[0]: text.partition("\n")[2].strip() for text in before}
    texts |= {TITLES[part]: "\n".join(lines) for part, lines in sections.items()}
    import torch

    head = f"# Killed, stopped, and kept for long\n\n    {COMMAND}\n\nCPU, float32, Python {platform.python_version()}"
    head += f", torch {torch.__version__}.\n"
    body = [f"\n## {title}\n\n{texts[title]}\n" for title in TITLES.values() if title in texts]
    output.write_text(head + "".join(body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3000, help="of the long run")
    parser.add_argument("--saves", type=int, default=10, help="checkpoints whose pause is measured")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", help="a Markdown file; the sections of other parts stay in it")
    args = parser.parse_args()
    import_everything()
    sections, good = {}, True
    for part in args.parts:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            prepared(folder)
            measure: dict[str, Callable[[], tuple[bool, list[str]]]] = {
                "kills": lambda: kills(folder, args.kills, args.seed),  # noqa: B023
                "soak": lambda: soak(folder, args.steps, args.seed),  # noqa: B023
                "pause": lambda: pause(folder, args.saves),  # noqa: B023
            }
            as_wanted, sections[part] = measure[part]()
            good &= as_wanted
        print(f"## {TITLES[part]}\n", *sections[part], sep="\n", flush=True)
        if args.output:
            write(Path(args.output), {part: sections[part]})
    sys.exit(not good)


if __name__ == "__main__":
    main()
