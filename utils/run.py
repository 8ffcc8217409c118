"""Start and end of a run: one clear line for bad input, and a `run.json` that says how the run was made.

No heavy import at module level: a wrong flag is refused before torch is loaded.
"""

import errno
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from utils.environment import environment_fault, hide_gpus
from utils.launchers import launcher_variables
from utils.stopping import stoppable
from utils.whereabouts import waited_in_vain

USER_ERROR = 2
STOPPED = 3  # exit status: there was no point in going on
INTERRUPTED = 130
STARTED = datetime.now(timezone.utc)  # the program: this is among its first imports
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "accelerate", "tokenizers", "peft", "numpy")


class UserError(Exception):
    """Bad input. The message is one line: what (flag, file, row), what was expected, and the remedy."""


def one_line(error: BaseException, longest: int = 2000) -> str:
    """The whole message on one line; of a very long one, which a library wrote, the middle is left out."""
    text = " ".join(line for raw in str(error).splitlines() if (line := raw.strip()))
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class TrainingStopped(Exception):
    """Going on would be pointless, or impossible. The message is one line: step, figure, likely cause and remedy."""


class NotFinite(TrainingStopped):
    """Loss, reward or weights are no numbers any more."""


def run_main(main: Callable[[], None]) -> None:
    """Runs `main`: a UserError becomes one line on stderr and exit status 2, Ctrl-C 130.

    A full disk, and a rank that others have waited for in vain, become one line and status 3.

    Rank 0 speaks for all. The launchers stop every rank as soon as one has failed (within a second), so the other
    ranks wait for that; one that is still alive failed alone and speaks for itself. Any other exception passes through
    with its traceback.
    """
    try:
        if fault := environment_fault():
            raise UserError(fault)
        hide_gpus()
        os.environ.update(launcher_variables(os.environ))  # from here on it is known which rank this is
        with stoppable():
            main()
    except UserError as error:
        _leave_as_found()
        _say(one_line(error))
        sys.exit(USER_ERROR)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _say(f"{error.strerror}{f': {error.filename}' if error.filename else ''}; make room, and start again")
        sys.exit(STOPPED)
    except RuntimeError as error:
        if (line := waited_in_vain(error)) is None:
            raise
        _say(line)
        sys.stdout.flush()
        os._exit(STOPPED)  # the collectives' own threads would turn it into an abortion
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _say(error: str) -> None:
    rank = 0 if environment_fault() else rank_of_launcher()
    if rank:
        time.sleep(3)
    print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)


FOLDERS = ("answers", "close_ups", "tensorboard", "checkpoints")  # of texts, event files and states
OF_THE_END = ("results.json", "calibration.json", "report.html", "report.md")  # what a run writes when it is through
OF_A_RUN = ("results.json", "metrics.jsonl", *FOLDERS)  # what would mix with that of another run


GO_ON = "--resume auto to go on from its checkpoint"


def refuse_to_overwrite(folder: Path, models: Iterable[str], *, goes_on: bool = False) -> None:
    """What a run would replace must not be there.

    Args:
        models: The subfolders in which the run will write models; "" for the folder itself.
        goes_on: With --resume, which --overwrite_output_dir contradicts.

    Raises:
        UserError: There is a run, a model, or something else by a name that the run needs.
    """
    of_models = {f"{model}/{name}".lstrip("/"): "a model" for model in models for name in ("config.json", "adapter")}
    replaced = {"run.json": "another run"} | of_models | dict.fromkeys(OF_A_RUN, "a part of a run")
    found = [name for name in replaced if (folder / name).exists()]
    if found:
        what = replaced[found[0]]
        raise UserError(
            f"--output_dir {folder}: holds {what} already ({found[0]}); choose another folder"
            + ("" if goes_on else ", or add --overwrite_output_dir to replace it")
            + (f", or {GO_ON}" if (folder / "checkpoints").is_dir() else "")
        )


def open_folder(output_dir: str | Path) -> Path:
    """Makes the run's folder, and keeps other runs out of it until this process ends, however it ends.

    Rank 0 holds the lock for all ranks of all machines: on a file, `.lock`, since a shared file system may know no
    locks on folders. One that knows none at all goes without.

    Raises:
        UserError: The folder cannot be made or written, or another run is writing to it.
    """
    folder = Path(output_dir)
    found = _found(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank_of_launcher() == 0 and folder.resolve() not in _locks:
            _locks[folder.resolve()] = _lock(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output_dir: cannot write to {folder} ({reason}); choose another folder") from error
    _not_started[folder] = found
    return folder


EARLY = (".lock", "data.json")  # written before a training begins


def _found(folder: Path) -> tuple[list[Path], dict[Path, bytes | None]]:
    """The folders that are yet to be made, the innermost first, and what the files of EARLY hold; None: not there."""
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    files = [folder / name for name in EARLY]
    return made, {file: file.read_bytes() if file.is_file() else None for file in files}


def _leave_as_found() -> None:
    """A refused run takes back what it has written before its training."""
    for folder, (made, files) in _not_started.items():
        with suppress(OSError):
            for file, content in files.items() if folder.resolve() in _locks else ():
                if content is None:
                    file.unlink(missing_ok=True)
                elif content != file.read_bytes():
                    file.write_bytes(content)
            for place in made:  # as far as they are empty
                place.rmdir()


_not_started: dict[Path, tuple[list[Path], dict[Path, bytes | None]]] = {}  # as the folders were when they were opened
_locks: dict[Path, IO[str]] = {}  # open as long as the process lives


def _lock(folder: Path) -> IO[str]:
    import fcntl

    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(
            f"--output_dir {folder}: a run is writing to it ({holder}); wait for its end, or choose another folder"
        ) from None
    except OSError:
        return file
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            return _signed(file)
    file.close()  # a refused run has just taken its lock away
    return _lock(folder)


def _signed(file: IO[str]) -> IO[str]:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def start_run(folder: Path, args: Any, stage: str, resumed: int | None = None) -> None:
    """The training begins: rank 0 writes `run.json` (arguments, versions, seed, git commit, ...).

    Until then nothing of an earlier run is touched; what would mix with this one's goes now.

    Args:
        args: A namespace, dataclass instance or dict with the parsed flags.
        stage: The name that goes into `run.json`, for example "step1".
        resumed: After which step the run in this folder goes on; `run.json` keeps a list of its starts.
    """
    _not_started.pop(folder, None)
    if rank_of_launcher() != 0:
        return
    for name in OF_THE_END:
        (folder / name).unlink(missing_ok=True)
    starts = []
    if resumed is None:
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
    elif (folder / "run.json").is_file():
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        starts = [
            *before.get("starts", []),
            {name: before.get(name) for name in ("command", "started", "resumed_after")},
        ]
    resumption = {} if resumed is None else {"resumed_after": resumed, "starts": starts}
    _described[folder] = json.dumps(describe_run(args, stage) | resumption, indent=2, default=str)
    describe_again(folder)


_described: dict[Path, str] = {}  # what run.json holds


def describe_again(folder: Path) -> bool:
    """Writes `run.json`, which somebody may have removed; False: no run has started in the folder."""
    if folder in _described:
        (folder / "run.json").write_text(_described[folder] + "\n", encoding="utf-8")
    return folder in _described


def rank_of_launcher() -> int:
    """This process's rank, before and after the ranks have met."""
    return int(os.environ.get("RANK", "0"))


def describe_run(args: Any, stage: str) -> dict[str, Any]:
    arguments = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    return {
        "stage": stage,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "arguments": arguments,
        "seed": arguments.get("seed"),
        "git_commit": git_commit(),
        "versions": versions(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "device": device_name(),
        "started": STARTED.isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide a run's numbers; a missing package is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str | None:
    """The commit of this source tree, with "-dirty" when tracked files differ from it; None outside a repository.

    The file must be tracked: an installed copy below somebody else's repository has no commit of its own.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        commit = git("rev-parse", "HEAD")
        return commit + "-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or no commit yet
        return None


def device_name() -> str:
    """The accelerator's name, for example "NVIDIA A100-SXM4-80GB", or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
