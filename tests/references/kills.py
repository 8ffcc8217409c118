"""Pinned trainings that are killed with SIGKILL at random moments, and go on until they end as if nothing had been.

    python tests/references/kills.py [--kills 40] [--seed 0] [--report FILE]

The moments are uniform over the time that the training takes undisturbed, its export included; a part of them is moved
into the writing of a checkpoint, into the start, or into that of the process that goes on. Where there are several
ranks, sometimes one is killed before the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent)]

from cases import CASES, STAGES, command, prepare  # noqa: E402
from forked import Ranks, fork, import_everything  # noqa: E402
from record import differences, environment  # noqa: E402
from run import TIMES, outcome  # noqa: E402

ROOT = HERE.parents[1]
OFFLOAD_1, OFFLOAD_2 = "--zero_stage 1 --offload", "--actor_zero_stage 2 --offload"
LIMIT = 180.0  # seconds that a part of a training may take

# (ranks, pinned training, further flags): in turns they reach all stages, ReMax and PPO, ZeRO 0 to 3, offloading, one
# rank and two, adapters, packing, streaming, the moving average and the mix with plain text.
COURSES = [
    (1, "remax, everything", "--save_steps 1"),
    (2, "ppo, ZeRO 2 and 3", "--save_steps 1"),
    (1, "supervised, packed, LoRA", "--save_steps 2"),
    (2, "remax, ZeRO 3, LoRA", "--save_steps 1"),
    (1, "ranking", f"--save_steps 2 {OFFLOAD_1}"),
    (2, "remax, ZeRO 2", "--save_steps 2"),
    (1, "r-dpo, streamed", "--save_steps 1"),
    (2, "ranking, ZeRO 3, packed", "--save_steps 1"),
    (1, "ppo", "--save_steps 2"),
    (2, "supervised, ZeRO 3, LoRA", "--save_steps 1"),  # streamed, too
    (1, "ranking, several answers", "--save_steps 1"),
    (2, "remax, ZeRO 2", f"--save_steps 1 {OFFLOAD_2}"),
]


@dataclass
class Kill:
    """One of them.

    Attributes:
        moment: What the run was at.
        found: What the next start found: "step 3 of 5", or nothing.
    """

    moment: str
    found: str = ""


def offloads(flags: str) -> bool:
    """Whether a course needs DeepSpeed's compiled optimizer."""
    return "--offload" in flags


def title(ranks: int, name: str, more: str) -> str:
    """A course in words."""
    words = [f"stage {CASES[ranks][name][0]}", name, f"{ranks} rank{'s' * (ranks > 1)}"]
    return ", ".join(words + ["offloaded"] * offloads(more))


def left_behind(output: Path) -> dict:
    """What a run leaves to whoever reads it, without times: weights, metrics, events, answers, notes."""
    return outcome(output) | {"events": events(output)}


def events(output: Path) -> dict[str, list]:
    """(step, value) of everything in TensorBoard, by name, as its own reader gives it."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # says how many events of lost steps it leaves out
    reader = EventAccumulator(str(output / "tensorboard"), tensor_size_guidance={"scalars": 0, "text": 0})
    reader.Reload()
    times = [tag for tag in reader.Tags()["tensors"] if tag.startswith("run/") or tag.split("/")[-1].startswith(TIMES)]
    return {
        tag: [[event.step, str(make_ndarray(event.tensor_proto))] for event in reader.Tensors(tag)]
        for tag in reader.Tags()["tensors"]
        if tag not in times
    }


class Killing:
    """One pinned training, undisturbed and killed.

    Args:
        folder: As `prepare` left it.
    """

    def __init__(self, folder: Path, ranks: int, name: str, more: str, chance: random.Random):
        self.folder, self.ranks, self.name, self.chance = folder, ranks, name, chance
        self.stage, flags = CASES[ranks][name]
        self.flags = f"{flags} {more} --enable_tensorboard --resume auto --logging_steps 1"
        place = title(ranks, name, more).replace(",", "").replace(" ", "_")
        self.folders = (folder / f"{place}_{number}" for number in range(1000))
        self.output = next(self.folders)
        begin = time.time()
        self.ends(self.start())
        self.expected = left_behind(self.output)
        records = (self.output / "metrics.jsonl").read_text().splitlines()
        self.times = [0.0, *(json.loads(record)["time"] - begin for record in records), time.time() - begin]

    @property
    def log(self) -> Path:
        """What the present course prints."""
        return self.output.with_suffix(".log")

    def start(self) -> Ranks:
        """Another start of the present course."""
        flags = command(self.stage, self.flags, self.folder, self.output)
        return Ranks(ROOT / STAGES[self.stage] / "main.py", flags, self.ranks, self.folder, self.log)

    def ends(self, running: Ranks) -> None:
        """Waits for the end of a start, which is to be a good one."""
        status = running.wait()
        logs = sorted(self.log.parent.glob(f"{self.log.stem}.*"))
        tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.is_file())
        assert status == 0, f"{self.name} ended with status {status}\n{tails}"

    def course(self, wanted: int) -> tuple[list[Kill], list[str]]:
        """A training that is killed at most `wanted` times, and how its end differs from the undisturbed one's."""
        self.output, kills = next(self.folders), []
        for moment in sorted(self.moment() for _ in range(wanted)):
            running, printed = self.start(), len(self.printed())
            if kills and self.chance.random() < 0.2:  # while it starts again
                time.sleep(self.chance.uniform(0, 0.9 * self.times[1]))
            elif self.reaches(running, moment) and self.chance.random() < 0.5:
                self.waits_for_a_checkpoint(running)
            ended = running.over()
            if not ended:
                if self.ranks > 1 and self.chance.random() < 0.3:
                    running.send(signal.SIGKILL, ranks=1)
                    time.sleep(self.chance.uniform(0, 0.3))
                running.kill()
            if kills:
                kills[-1].found = self.found(printed)
            if ended:
                self.ends(running)
                break
            kills.append(Kill(self.at(printed)))
        else:
            printed = len(self.printed())
            self.ends(self.start())
            if kills:
                kills[-1].found = self.found(printed)
        return kills, differences(left_behind(self.output), self.expected, exact=True)

    def moment(self) -> float:
        """Seconds of the undisturbed training; one in six in its start, which takes longer than the rest."""
        start, end = self.times[1], self.times[-1]
        return self.chance.uniform(0, start) if self.chance.random() < 1 / 6 else self.chance.uniform(start, end)

    def printed(self) -> str:
        """By all starts of this course."""
        return self.log.read_text() if self.log.exists() else ""

    def reaches(self, running: Ranks, moment: float) -> bool:
        """Waits until the run is where it was at `moment` undisturbed; False: it has ended before."""
        done = sum(begin <= moment for begin in self.times[1:-1])  # records that are to be there
        metrics, begin = self.output / "metrics.jsonl", time.monotonic()
        old = metrics.stat().st_ino if metrics.exists() else None
        while done and not running.over() and time.monotonic() < begin + LIMIT:
            if metrics.exists() and metrics.stat().st_ino != old and metrics.read_bytes().count(b"\n") >= done:
                break
            time.sleep(0.002)
        end = time.monotonic() + moment - self.times[done]
        while not running.over() and time.monotonic() < end:
            time.sleep(0.002)
        return not running.over()

    def waits_for_a_checkpoint(self, running: Ranks) -> None:
        """Until one is being written, and a little longer."""
        folder = self.output / "checkpoints"
        while not running.over() and not list(folder.glob("*.partial")):
            time.sleep(0.0005)
        time.sleep(self.chance.choice((0, self.chance.uniform(0, 0.01 if self.ranks == 1 else 0.1))))

    def at(self, printed: int) -> str:
        """What the run was at when it was killed."""
        writing = [path.name for path in (self.output / "checkpoints").glob("*.partial")]
        exported = [path.parent.name for path in self.output.rglob(".partial") if "checkpoints" not in path.parts]
        text = self.printed()[printed:]
        if writing:
            return f"writing checkpoint {int(writing[0].split('.')[0].split('_')[1])}"
        if exported:
            return f"exporting to {'the output folder' if exported[0] == self.output.name else exported[0]}"
        if "step" not in text:
            return "start"
        metrics = self.output / "metrics.jsonl"
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return f"after the record of step {steps[-1]}" if steps else "before the first record"

    def found(self, printed: int) -> str:
        """What a start went on from, in its own words."""
        text = self.printed()[printed:]
        for line in text.splitlines():
            if line.startswith("goes on after "):
                return line.removeprefix("goes on after ")
            if "starts afresh" in line:
                return "none: from the start"
            if "nothing to do" in line:
                return "its end"
        return "killed before it looked"


Row = tuple[str, list[Kill], list[str]]  # a course in words, its kills, and how its end differs


def all_kills(folder: Path, kills: int, seed: int, courses: list = COURSES) -> Iterator[Row]:
    """Courses until there were that many kills, in equal shares."""
    chance = random.Random(seed)
    shares = [kills // len(courses) + (number < kills % len(courses)) for number in range(len(courses))]
    for (ranks, name, more), share in zip(courses, shares, strict=True):
        if share:
            training, left = Killing(folder, ranks, name, more, chance), share
            while left > 0:
                found, lines = training.course(left)
                left -= len(found)
                yield title(ranks, name, more), found, lines
                shutil.rmtree(training.output)


def table(rows: list[Row]) -> list[str]:
    """Markdown: a line a kill."""
    lines = ["| training | killed | went on after | end |", "|---|---|---|---|"]
    for name, kills, different in rows:
        end = "differs" if different else "bitwise equal"
        lines += [f"| {name} | {kill.moment} | {kill.found} | {end} |" for kill in kills]
    return lines


def prepared(folder: Path) -> None:
    """Models and data, made in a process of its own: this one stays fit to be forked."""
    log = folder / "prepare.log"
    pid = fork(lambda: prepare(folder), log, environment(folder, 1), folder)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--courses", type=int, nargs="*", help="some of them, by their numbers")
    parser.add_argument("--report", help="a Markdown file for the table")
    args = parser.parse_args()
    import_everything()
    courses = COURSES if args.courses is None else [COURSES[number] for number in args.courses]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder))
        for row in all_kills(Path(folder), args.kills, args.seed, courses):
            rows.append(row)
            print(*table([row])[2:], *row[2][:10], sep="\n", flush=True)
    if args.report:
        Path(args.report).write_text("\n".join(table(rows)) + "\n")
    sys.exit(any(different for _, _, different in rows))


if __name__ == "__main__":
    main()
