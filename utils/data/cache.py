"""The folder of converted tables, and the names under which they are found again."""

import hashlib
import os
from pathlib import Path

import datasets

from utils.run import UserError


def content_key(*texts: str | None) -> int:
    """A number that only equal texts share."""
    parts = [b"-" if text is None else b"+" + text.encode("utf-8", "surrogatepass") for text in texts]
    digest = hashlib.blake2b(b"".join(part + b"\0" for part in parts), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint_of(*parts: object) -> str:
    """A short name for content: equal in every process and on every rank."""
    encoded = [part if isinstance(part, bytes) else repr(part).encode() for part in parts]
    return hashlib.blake2b(b"".join(part + b"\0" for part in encoded), digest_size=12).hexdigest()


def cache_folder(cache_dir: str | None) -> Path:
    """The folder of the converted tables.

    Raises:
        UserError: The folder cannot be made or written.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "converted"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "no permission"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--data_output_path: cannot write to {folder} ({reason}); choose another folder")
    return folder


def cache_file(cache_dir: str | None, kind: str, fingerprint: str) -> str:
    """Where the datasets library keeps a converted table."""
    return str(cache_folder(cache_dir) / f"{kind}-{fingerprint}.arrow")
