"""Checkpoints of a run: written beside the training, complete or not there, and found again.

    OUTPUT/checkpoints/step_000120/
        rank_0000.safetensors ...   what each rank kept of weights, Adam's moments and the moving average
        manifest.json               step, numbers, random states, checksums of the files, and what the run was made of
        best/                       the best model so far, in links to the files of the export

A checkpoint is made in a folder whose name ends in `.partial`, and renamed when every rank's file is on the disk. Ranks
tell one another through notes in that folder, so that a thread may write while the training uses the network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from remax.checkpoint.shards import Shards, Written, checksum, write_shard
from remax.checkpoint.state import RunState, Snapshot
from utils.bounds import free_memory
from utils.distributed import (
    barrier,
    gather_objects,
    is_main,
    print0,
    random_state,
    rank,
    ranks_of_machine,
    sum_across_ranks,
    world_size,
)
from utils.files import write_whole
from utils.run import UserError, one_line

FORMAT = 1
FOLDER, PARTIAL, MANIFEST, BEST = "checkpoints", ".partial", "manifest.json", "best"
NAME = re.compile(r"step_(\d{6,})")
SLOW_DISK = 50e6  # bytes a second; how long the first one may take is not known
LOOK, PATIENCE = 0.1, 3600.0  # seconds: between two looks for the other ranks' notes, and until they are given up


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, and how many stay.

    Attributes:
        steps: Optimizer steps between two of them; 0: none by steps.
        minutes: Minutes between two of them; 0: none by time.
        keep: Of the newest, how many; 0: all.
        max_hours: Since the start of the program, after which it saves and leaves; 0: no limit.
        go_back: Whether a training whose loss is no number goes on from the last one, once.
        beside: Written by a thread, from a copy in memory, while the training goes on.
    """

    steps: int = 0
    minutes: float = 0.0
    keep: int = 1
    max_hours: float = 0.0
    go_back: bool = False
    beside: bool = True


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps that were made before it."""
        return self.manifest["step"]


def newest(output: Path) -> Found | None:
    """The newest complete checkpoint of a run's folder; those that are not complete are named and passed over.

    Every rank must call it: they share the files out among them to check them.
    """
    folder = folder_of(output)
    # What rank 0 sees: a shared file system may show another rank an older list, and all must open the same.
    for name in gather_objects([path.name for _, path in reversed(all_of(folder))])[0]:
        try:
            return open_checkpoint(folder / name)
        except UserError as error:
            print0(f"{error}: passed over")
    return None


def folder_of(output: Path) -> Path:
    """Where a run's checkpoints lie.

    Raises:
        UserError: In a link that leads out of the run's folder.
    """
    folder = output / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.resolve().is_relative_to(output.resolve())):
        raise UserError(f"--output_dir {output}: {folder} is a link to another place; move the checkpoints back")
    return folder


def all_of(folder: Path) -> list[tuple[int, Path]]:
    """(step, place) of what bears a checkpoint's name, the oldest first."""
    return sorted((int(match[1]), path) for path in folder.glob("*") if (match := NAME.fullmatch(path.name)))


def open_checkpoint(folder: Path) -> Found:
    """A checkpoint whose files are all there and as they were written.

    Every rank must call it.

    Raises:
        UserError: On every rank, what is wrong with it.
    """
    fault, manifest = None, {}
    try:
        if links := [path.name for path in (folder, *sorted(folder.rglob("*"))) if path.is_symlink()]:
            fault = f"{links[0]} is a link; a checkpoint holds its own files"
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if fault is None and manifest["format"] != FORMAT:
            fault = f"is of format {manifest['format']}, and this version reads {FORMAT}"
        for number, note in enumerate(manifest["ranks"]):
            if fault is None and number % world_size() == rank():
                fault = _fault(folder / file_of(number), Written(**note["file"]))
    except OSError as error:
        fault = f"is not complete ({error.strerror}: {Path(error.filename or folder).name})"
    except (ValueError, KeyError, TypeError):
        fault = f"is not complete ({MANIFEST} is torn)"
    if fault := next(filter(None, gather_objects(fault)), None):
        raise UserError(f"checkpoint {folder}: {fault}")
    return Found(folder, manifest)


def _fault(file: Path, expected: Written) -> str | None:
    if file.stat().st_size != expected.size:
        return f"is not complete ({file.name} has {file.stat().st_size} of {expected.size} bytes)"
    return None if checksum(file) == expected else f"is damaged ({file.name} is not what was written)"


def file_of(number: int) -> str:
    """The name of a rank's file."""
    return f"rank_{number:04d}.safetensors"


class Checkpoints:
    """Those of one run: restores the one that it goes on from, and writes further ones.

    Args:
        output: The run's folder.
        made_of: What the run was made of, for those who go on from it: kept in the manifest.
        found: Where to go on from.
        best: The folder of the best model so far, which a checkpoint keeps, too.
    """

    def __init__(
        self,
        output: Path,
        saving: Saving,
        made_of: Mapping[str, Any],
        *,
        found: Found | None = None,
        best: Path | None = None,
    ):
        self.output, self.saving, self.made_of, self.found, self.best = output, saving, made_of, found, best
        self.folder = folder_of(output)
        self.state: RunState | None = None
        self.snapshot, self.beside = Snapshot(), saving.beside
        self.writer: threading.Thread | None = None
        self.last: Path | None = found.folder if found else None
        self.saved_at, self.size = time.monotonic(), 0
        self.slowest = 0.0  # seconds that writing one has taken

    def begin(self, state: RunState) -> None:
        """Restores `state` from what was found, or leaves it as it is; every rank must call it."""
        self.state = state
        self._restore()
        if is_main():
            self._clear()
        here = state.size()
        self.size = int(sum_across_ranks({"bytes": here})["bytes"])
        if self.beside and here * ranks_of_machine() > free_memory() / 2:
            self.beside = False
            print0(f"checkpoints: the training waits for each, as {here / 2**30:.1f} GiB of memory are not to spare")
        self.slowest, self.saved_at = self.size / SLOW_DISK, time.monotonic()
        barrier()

    def _clear(self) -> None:
        """Removes what a killed run has left half done, and the checkpoints of a course that is now left."""
        for remains in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(remains, ignore_errors=True)
        for step, path in all_of(self.folder):
            if self.found is not None and step > self.found.step:
                print0(f"{path}: removed, as the run goes on from step {self.found.step}")
                shutil.rmtree(path, ignore_errors=True)

    def go_back(self) -> bool:
        """Restores the last complete one, where there is one; every rank must call it."""
        self.finish()
        self.found = newest(self.output) or self.found
        self._restore()
        self.last = self.found.folder if self.found else None
        return self.found is not None

    def _restore(self) -> None:
        if self.found is not None and self.state is not None:
            manifest = self.found.manifest
            shards = Shards(self.found.folder / file_of(number) for number in range(len(manifest["ranks"])))
            try:
                self.state.restore(manifest["state"], shards, [note["random"] for note in manifest["ranks"]])
            except KeyError as error:
                raise UserError(f"checkpoint {self.found.folder}: it knows nothing of {error}") from error
            self._restore_best()

    def _restore_best(self) -> None:
        assert self.found is not None
        kept = self.found.folder / BEST
        if self.best is None or not is_main() or not kept.is_dir():
            return
        # Always: a run that was killed while it exported has left files of two models, and the note of the older one.
        shutil.rmtree(self.best, ignore_errors=True)
        shutil.copytree(kept, self.best, copy_function=_link)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by this rank's clock."""
        by_time = self.saving.minutes and time.monotonic() - self.saved_at >= 60 * self.saving.minutes
        return bool((self.saving.steps and step % self.saving.steps == 0) or by_time)

    def save(self, step: int) -> float:
        """Keeps the state as it is now; every rank must call it after the same step.

        Where the disk is full, or the folder is not to be written, the training goes on, and a warning says so.

        Returns:
            Seconds that the training has waited.
        """
        assert self.state is not None
        begin = time.perf_counter()
        self._await_writer()
        self.saved_at = time.monotonic()
        refusal = self._prepare(step)
        if refusal is None:
            tensors = self.state.tensors()
            if self.beside:
                tensors = self.snapshot.take(tensors)
            else:
                tensors = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
            job = (step, tensors, {"random": random_state()}, deepcopy(self.state.numbers()))
            if self.beside:
                self.writer = threading.Thread(target=self._write, args=job, name="checkpoint", daemon=True)
                self.writer.start()
            else:
                self._write(*job)
        elif refusal:
            self._fail(step, refusal)
        return time.perf_counter() - begin

    def kept(self, step: int) -> bool:
        """Whether the state after this step is on the disk, as far as rank 0 knows."""
        return self.last is not None and self.last.resolve() == self._place(step).resolve()

    def _place(self, step: int, ending: str = "") -> Path:
        return self.folder / f"step_{step:06d}{ending}"

    def finish(self) -> None:
        """Waits until everything is written; every rank must call it."""
        self._await_writer()
        barrier()

    def _await_writer(self) -> None:
        if self.writer is not None:
            self.writer.join()
            self.writer = None

    def _prepare(self, step: int) -> str | None:
        """Makes the folder to write to, on rank 0; why it cannot be, on every rank; empty: there is nothing to do."""
        refusal, partial = None, self._place(step, PARTIAL)
        if is_main():
            try:
                refusal = "" if self.kept(step) else self._make(partial)
            except OSError as error:
                refusal = _reason(error)
                shutil.rmtree(partial, ignore_errors=True)
        if (refusal := gather_objects(refusal)[0]) is None:
            unseen = [k for k, there in enumerate(gather_objects(partial.is_dir())) if not there]
            if unseen:
                if is_main():
                    shutil.rmtree(partial, ignore_errors=True)
                refusal = f"rank {unseen[0]} does not see {partial}: --output_dir must be one place for all machines"
        return refusal

    def _make(self, partial: Path) -> str | None:
        if not self.output.is_dir():
            return f"{self.output} has gone"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < self.size:
            partial.rmdir()
            return f"{free / 2**30:.2f} GiB are free in {self.folder}, and it takes {self.size / 2**30:.2f}"
        if self.best is not None and self.best.is_dir():
            shutil.copytree(self.best, partial / BEST, copy_function=_link)
        return None

    def _write(self, step: int, tensors: Mapping[str, Tensor], note: dict[str, Any], numbers: dict[str, Any]) -> None:
        """This rank's file and note; on rank 0, when all are there, the manifest, and the name."""
        folder, partial = self._place(step), self._place(step, PARTIAL)
        number, begin = rank(), time.perf_counter()
        try:
            written = write_shard(partial / file_of(number), tensors)
            write_whole(partial / f"{number}.json", json.dumps(note | {"file": asdict(written)}))
            if is_main():
                notes = self._notes(partial)
                manifest = {"format": FORMAT, "step": step, "made_of": self.made_of, "state": numbers, "ranks": notes}
                write_whole(partial / MANIFEST, json.dumps(manifest))
                for k in range(len(notes)):
                    (partial / f"{k}.json").unlink()
                _sync(partial / MANIFEST, partial)
                if folder.exists():  # of an earlier course of this run
                    shutil.rmtree(folder)
                partial.rename(folder)
                _sync(folder.parent)
                self._forget_old()
        except (OSError, ValueError) as error:
            text = _reason(error)
            if is_main():
                self._fail(step, text)
                shutil.rmtree(partial, ignore_errors=True)
            else:
                _tell(partial / f"{number}.failed", f"rank {number}: {text}")
        else:
            self.last = folder
        self.slowest = max(self.slowest, time.perf_counter() - begin)

    def _notes(self, partial: Path) -> list[dict[str, Any]]:
        """What the ranks have left beside their files, in rank order.

        Raises:
            ValueError: A rank has failed, or left nothing.
        """
        notes, end = [], time.monotonic() + PATIENCE
        for number in range(world_size()):
            place, failed = partial / f"{number}.json", partial / f"{number}.failed"
            while not place.exists():
                if failed.exists():
                    raise ValueError(failed.read_text(encoding="utf-8"))
                if time.monotonic() > end:
                    raise ValueError(
                        f"rank {number} has left no file in {partial}: --output_dir must be one place for all machines"
                    )
                time.sleep(LOOK)
            notes.append(json.loads(place.read_text(encoding="utf-8")))
        return notes

    def _fail(self, step: int, why: str) -> None:
        before = f"the last one is {self.last}" if self.last else "there is none yet"
        print0(f"warning: no checkpoint of step {step}: {why}; {before}; the training goes on")

    def _forget_old(self) -> None:
        if self.saving.keep:
            for _, path in all_of(self.folder)[: -self.saving.keep]:
                shutil.rmtree(path, ignore_errors=True)


def _reason(error: OSError | ValueError) -> str:
    """In a line; `shutil.copytree` gathers several errors in one that has no text of its own."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return one_line(error)


def _link(source: str, target: str) -> None:
    """An export is replaced file by file and never changed, so that a link keeps what it was."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _tell(file: Path, text: str) -> None:
    try:
        write_whole(file, text)
    except OSError:
        print(f"warning: {text}", flush=True)


def _sync(*places: Path) -> None:
    for place in places:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
