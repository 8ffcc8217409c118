"""Text files that flags name, and those that a run writes."""

import errno
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.run import UserError

LARGEST = 2**27  # bytes


def read_text(file: str, flag: str, expected: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        file: `~` is the user's home folder.
        flag: Named by errors.
        expected: What errors say the file should be.

    Raises:
        UserError: No such file, a folder, a pipe or device (which may never end), another encoding, too large.
    """
    try:
        path = Path(file).expanduser()
        if path.exists() and not path.is_file():
            reason = "is a folder" if path.is_dir() else "is no regular file"
        elif path.stat().st_size > LARGEST:
            reason = f"is larger than {LARGEST // 2**20} MiB"
        else:
            return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            reason = f"no such file (looked from {Path.cwd()})"
    except RuntimeError as error:  # the home folder of nobody
        reason = str(error)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        reason = f"line {line} is not UTF-8 ({error.reason})"
    raise UserError(f"{flag} {file}: {reason}; expected {expected}")


def write_whole(path: Path, text: str) -> None:
    """Writes a UTF-8 file that appears when it is complete: what was there stays until then, also on a full disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One json object a line, see `write_whole`."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
