"""Numbers for people and for programs: metrics.jsonl, TensorBoard, Weights & Biases, the console, progress bars.

The rank lives here: off rank 0 the same classes do nothing, so callers need no guard.
"""

import html
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.distributed import is_main
from utils.files import write_whole
from utils.run import DISK_FULL, UserError, describe_again, first_line

# How the console shows the values that have a unit; the others get four significant digits.
UNITS = {
    "lr": "lr {:.1e}",
    "seconds_per_step": "{:.2f} s/step",
    "samples_per_second": "{:.1f} samples/s",
    "tokens_per_second": "{:.0f} tokens/s",
    "seconds": "after {:.0f} s",
    "peak_memory_gib": "peak memory {:.2f} GiB",
}
UNSHOWN = ("run/parameters", "run/trained_share")  # the console has a line of its own for them
WIDTH = 120  # columns of a console line; what does not fit goes on in the next, indented


class MetricsLogger:
    """Writes each set of values to `metrics.jsonl`, to TensorBoard or Weights & Biases, and readably to the console.

    What is to be said about the run's course goes to `remarks.jsonl`, which is there when something was.

    Args:
        output_dir: The run's folder; `metrics.jsonl` there gets one record a call. An existing file is continued.
        tensorboard_dir: Where event files go; None: no TensorBoard.
        wandb: What describes the run in Weights & Biases, whose own variables (WANDB_PROJECT, WANDB_MODE, ...) say the
            rest; None: no Weights & Biases.
        console_every: A line for every n-th step; values named "eval/..." are always shown.
        console: Names (without "train/") to show, in this order; None: all.
        quiet: Names (without their group) that the console leaves out.
        drop_after: Continue an existing `metrics.jsonl` but drop its records of later steps, which this run repeats
            (resuming at step n: n; starting afresh: -1). None: keep everything.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        tensorboard_dir: str | Path | None = None,
        wandb: Mapping[str, Any] | None = None,
        console_every: int = 1,
        total_steps: int | None = None,
        console: Sequence[str] | None = None,
        quiet: Sequence[str] = (),
        drop_after: int | None = None,
    ):
        self.active, self.wandb = is_main(), None
        self.remarks: RecordFile | None = None
        self.tensorboard: Any = None
        self.console_every, self.total_steps = max(1, console_every), total_steps
        self.console, self.quiet = console, quiet
        if not self.active:
            return
        path, self.remarks_path = (Path(output_dir) / f"{name}.jsonl" for name in ("metrics", "remarks"))
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, self.remarks_path):
            if drop_after is not None and file.exists():
                kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step(line) <= drop_after]
                write_whole(file, "".join(line + "\n" for line in kept))
        self.file, self.tensorboard_dir = RecordFile(path), tensorboard_dir
        self.step = 0  # of the last record
        if self.remarks_path.exists():
            self.remarks = RecordFile(self.remarks_path)
        # TensorBoard hides what it has of this step and later ones; the first such note it takes for the beginning.
        self._open_tensorboard(None if drop_after is None else max(0, 1 + drop_after))
        if wandb is not None:
            self.wandb = _start_wandb(Path(output_dir), wandb, goes_on=drop_after not in (None, -1))

    def _open_tensorboard(self, first_step: int | None) -> None:
        if self.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # a second of start-up, paid only when asked for

            self.tensorboard = SummaryWriter(str(self.tensorboard_dir), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, Any], epoch: float | None = None) -> None:
        """Records `values` (numbers or one-element tensors) under `step`; rank 0 only.

        Not-a-number and infinity become null in `metrics.jsonl`, as JSON has neither; the console shows them.
        """
        if not self.active:
            return
        self.step = step
        numbers = {name: float(value) for name, value in values.items()}
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        record |= {} if epoch is None else {"epoch": epoch}
        record |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if self.file.append(json.dumps(record)):  # the folder was removed, and the events with it
            self._open_tensorboard(step)
        self._to_tensorboard(lambda events: [events.add_scalar(name, value, step) for name, value in numbers.items()])
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        if step % self.console_every == 0 or step == self.total_steps or any(n.startswith("eval/") for n in numbers):
            tqdm.write(console_line(step, numbers, epoch, self.total_steps, self.console, self.quiet))
            sys.stdout.flush()

    def remark(self, kind: str, text: str, step: int | None = None) -> None:
        """Keeps what is to be said about a step, or about the last one that was logged; rank 0 only.

        Args:
            kind: In a few words, for a mark on the time axis.
            text: A sentence for people.
        """
        if not self.active:
            return
        self.remarks = self.remarks or RecordFile(self.remarks_path)
        record = {"step": self.step if step is None else step, "kind": kind, "text": text}
        self.remarks.append(json.dumps(record, ensure_ascii=False))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Shows some texts, such as a prompt with its answers, as a table where figures go, but for the console."""
        if not rows:
            return
        columns = list(rows[0])
        table = [columns, *(list(row.values()) for row in rows)]
        self._to_tensorboard(lambda events: events.add_text("samples", _markdown(table), step))
        if self.wandb is not None:
            import wandb

            table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
            self.wandb.log({"samples": table}, step=step)

    def go_back(self, step: int) -> None:
        """Forgets the records after `step`, as these steps are made again."""
        if self.active:
            for file in filter(None, (self.file, self.remarks)):
                file.cut(lambda line: _step(line) <= step)
            self._to_tensorboard(lambda events: events.close())
            self._open_tensorboard(step + 1)

    def flush(self) -> None:
        """Returns when the disk has what was logged so far: a checkpoint may rest on it."""
        for file in filter(None, (self.file, self.remarks)) if self.active else ():
            file.sync()
        self._to_tensorboard(lambda events: events.flush())

    def _to_tensorboard(self, write: Callable[[Any], object]) -> None:
        """Hands TensorBoard something; where it cannot write, such as on a full disk, the training goes on without."""
        if self.tensorboard is None:
            return
        try:
            write(self.tensorboard)
        except OSError as error:
            self.tensorboard = self.tensorboard_dir = None
            warn(f"warning: TensorBoard gets no more figures ({error.strerror or error}); metrics.jsonl has them all")

    def close(self) -> None:
        for file in filter(None, (self.file, self.remarks)) if self.active else ():
            file.close()
        self._to_tensorboard(lambda events: events.close())
        if self.wandb is not None:
            self.wandb.finish()


class RecordFile:
    """A file of one record a line, continued, that loses none: neither on a full disk nor when somebody removes it.

    What a full disk does not take waits in memory for the next record. A file that has gone is written again, from its
    start, as it is still open.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.waiting, self.full = path, bytearray(), False
        self.descriptor = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def append(self, record: str) -> bool:
        """Writes a line, at once; whether the file had been removed."""
        self.waiting += f"{record}\n".encode()
        if removed := not self.path.exists():
            self._begin_again()
        self._write()
        return removed

    def cut(self, kept: Callable[[str], bool]) -> None:
        """Leaves the records out that are not to be `kept`."""
        whole = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0) + self.waiting
        self.waiting = bytearray().join(line for line in whole.splitlines(keepends=True) if kept(line.decode()))
        os.ftruncate(self.descriptor, 0)
        self._write()

    def sync(self) -> None:
        """Returns when the disk has what was written."""
        os.fsync(self.descriptor)

    def _begin_again(self) -> None:
        self.waiting[:0] = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)
        os.close(self.descriptor)
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = self._open()
        again = f"{self.path.name} and run.json are" if describe_again(folder) else f"{self.path.name} is"
        warn(f"warning: files of this run were removed from {folder}; {again} written again, but nothing else")

    def _write(self) -> None:
        try:
            while self.waiting:
                del self.waiting[: os.write(self.descriptor, self.waiting)]
            self.full = False
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if not self.full:
                warn(f"warning: no space left for {self.path}; make room: until then its records are kept in memory")
            self.full = True

    def close(self) -> None:
        """The end, until which a full disk has time."""
        self._write()
        if self.waiting:
            warn(f"warning: {self.path} lacks its last {self.waiting.count(10)} records, as there is no space left")
        os.close(self.descriptor)


def warn(message: str) -> None:
    """Prints one line on rank 0 without tearing a progress bar."""
    if is_main():
        tqdm.write(message)


def _start_wandb(folder: Path, config: Mapping[str, Any], goes_on: bool) -> Any:
    """A new run, or the one of this folder again, which then refuses steps that it knows."""
    import wandb

    file = folder / "wandb_id"
    before = {"id": file.read_text(), "resume": "allow"} if goes_on and file.is_file() else {}
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "remax"),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=str(folder),
            config=dict(config),
            **before,
        )
        file.write_text(str(run.id))
        return run
    except wandb.Error as error:  # such as no account
        raise UserError(
            f"--report_to wandb: {first_line(error)}; `wandb login`, or WANDB_MODE=offline to upload later"
        ) from error


def _markdown(table: Sequence[Sequence[Any]]) -> str:
    """A table whose first row is its head; what would break it is written otherwise."""
    head, *rows = [[_cell(value) for value in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value).strip()
    return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")


def _step(line: str) -> float:
    """The step of a record; a line torn by a kill counts as the last of all, so it is dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def console_line(
    step: int,
    values: Mapping[str, float],
    epoch: float | None = None,
    total_steps: int | None = None,
    names: Sequence[str] | None = None,
    quiet: Sequence[str] = (),
) -> str:
    """One line for people: `step 20/300  reward 1.23  kl 0.04  lr 1.0e-06  2.10 s/step`.

    Values of one group other than train ("eval/loss", "eval/reward/rules") lose the prefix, and the line begins
    with the group; those of the group run (time, memory) go along with any other. What does not fit goes on below.
    """
    values = {name: value for name, value in values.items() if name not in UNSHOWN}
    groups = {name.partition("/")[0] if "/" in name else "" for name in values} - {"run"}
    group = groups.pop() if len(groups) == 1 else ""
    parts = [] if group in ("", "train") else [group]
    parts.append(f"step {step}" + (f"/{total_steps}" if total_steps else ""))
    if epoch is not None:
        parts.append(f"epoch {epoch:.2f}")
    shown = {}
    for name, value in values.items():
        short = name.removeprefix(group + "/" if group else "train/").removeprefix("run/")
        shown[short] = UNITS.get(short, short.replace("_", " ") + " {:.4g}").format(value)
    if names is not None and group in ("", "train"):
        shown = {name: shown[name] for name in names if name in shown}
    return in_columns([*parts, *(text for name, text in shown.items() if name not in quiet)])


def in_columns(parts: Sequence[str]) -> str:
    """The parts side by side; those that do not fit into the width on further lines, indented."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) > WIDTH:
            lines.append("   ")
        lines[-1] += "  " + part
    return "\n".join(lines)


class ProgressLines:
    """Replaces a tqdm bar where there is no terminal: one plain line every `every` seconds, none when silent.

    Same use as tqdm: `update(n)`, `set_postfix(**values)`, `close()`, or as a context manager.
    """

    def __init__(self, total: int, desc: str, unit: str, *, done: int = 0, silent: bool = False, every: float = 30.0):
        self.total, self.desc, self.unit, self.silent, self.every = total, desc, unit, silent, every
        self.n, self.done, self.postfix = done, done, ""
        self.started = self.printed = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if not self.silent and self.n < self.total and now - self.printed >= self.every:
            self._print(now)

    def set_postfix(self, **values: Any) -> None:
        """What the lines end with from now on."""
        self.postfix = ", ".join(f"{name} {value}" for name, value in values.items())

    def close(self) -> None:
        """Prints the last line."""
        if not self.silent:
            self._print(time.monotonic())
            self.silent = True  # a second close says nothing

    def _print(self, now: float) -> None:
        self.printed = now
        seconds = max(now - self.started, 1e-9)
        rate = (self.n - self.done) / seconds
        times = f"{tqdm.format_interval(seconds)} so far"
        if self.done < self.n < self.total:
            times += f", {tqdm.format_interval((self.total - self.n) / rate)} to go"
        shown = f"{rate:.3g}" if rate < 999.5 else f"{rate:.0f}"
        line = f"{self.desc}: {self.n}/{self.total} {self.unit}, {times}, {shown} {self.unit}/s"
        print(line + (f", {self.postfix}" if self.postfix else ""), file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def progress(total: int, desc: str, unit: str, done: int = 0) -> "tqdm | ProgressLines":
    """ETA and throughput on rank 0: a tqdm bar on a terminal, otherwise a line every half minute; elsewhere nothing.

    The `unit` is in the plural: "steps", "prompts". `done` are those of an earlier start.
    """
    if is_main() and sys.stderr.isatty():
        return tqdm(total=total, initial=done, desc=desc, unit=f" {unit}", dynamic_ncols=True, smoothing=0.1)
    return ProgressLines(total, desc, unit, done=done, silent=not is_main())
