"""Files of a checkpoint: tensors in the safetensors format, one file a rank, read back by name, kind and place.

A file is written by our own few lines, since the library would first copy every tensor into Python's memory, and the
checksum would take another reading. It is read by the library, which runs no code that a file may hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.run import UserError

CHUNK = 2**24  # bytes between two looks at the checksum


def key_of(kind: str, name: str, start: int) -> str:
    """How a file calls the numbers of a parameter from `start` on."""
    return f"{kind}:{name}@{start}"


KEY = re.compile(r"(?P<kind>[^:]+):(?P<name>.+)@(?P<start>\d+)")


@dataclass(frozen=True)
class Written:
    """What the manifest says of a file."""

    size: int
    sha256: str


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes float32 tensors, contiguous and in CPU memory, and returns when the disk has them.

    Raises:
        OSError: The disk is full, or the folder has gone.
    """
    header, place = {}, 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        pieces: list[bytes | memoryview] = [len(head).to_bytes(8, "little"), head, *map(_bytes, tensors.values())]
        for piece in pieces:
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def checksum(path: Path) -> Written:
    """Of a file as it lies there.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
        return Written(file.tell(), digest.hexdigest())


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), "pt")
    except SafetensorError as error:
        raise UserError(f"{path}: is no file of tensors in the safetensors format ({error})") from error


class Shards:
    """The tensors of all ranks' files as one, whatever their cut.

    Raises:
        UserError: A file is of another format.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = [_open(path) for path in files]
        self.places: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}  # start, end, file, its key
        for number, file in enumerate(self.files):
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if match := KEY.fullmatch(key):
                    start = int(match["start"])
                    end = start + file.get_slice(key).get_shape()[0]
                    self.places.setdefault((match["kind"], match["name"]), []).append((start, end, number, key))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """(length,) numbers of a parameter from `start` on.

        Raises:
            UserError: They are not there, or not all of them.
        """
        result, found = torch.empty(length), 0
        for begin, end, number, key in self.places.get((kind, name), []):
            first, last = max(begin, start), min(end, start + length)
            if first < last:
                result[first - start : last - start] = self.files[number].get_slice(key)[first - begin : last - begin]
                found += last - first
        if found != length:
            raise UserError(
                f"the checkpoint holds {found} of the {length} numbers of {name} ({kind}): it is of another model"
            )
        return result
