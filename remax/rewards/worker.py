"""The process in which reward functions run: it finds and calls them as the rank that started it asks for.

It imports what the functions import, and neither torch nor transformers by itself. See `remax.rewards.process`.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import random
import socket
import struct
import sys
import time
from typing import Any, BinaryIO

from remax.rewards.functions import RewardFunction, SampleError, find_function, in_words
from utils.run import UserError, rank_of_launcher

LENGTH = struct.Struct("<Q")  # of a request, in bytes
# In memory that both processes see: what the function works on, and after a page the request. A batch may have
# megabytes, for which a connection would wake both processes several times.
INDEX, SINCE = struct.Struct("<q"), struct.Struct("<d")
PROGRESS = INDEX.size + SINCE.size  # bytes
REQUEST = 4096  # where it begins
WHOLE = -1  # as index: the batch
LOST = 70  # exit status where the connection has gone


def main(channel: int, memory: int) -> None:
    """Answers requests until the rank closes the connection.

    Args:
        channel: Descriptor of the connection. The length of a request comes, a line of JSON goes.
        memory: Descriptor of the memory that both see: which sample the function works on, since when, and the request,
            pickled.
    """
    sys.argv = ["reward_fn"]
    connection, me = socket.socket(fileno=channel), os.getpid()
    requests, functions = connection.makefile("rb"), dict[str, RewardFunction]()
    progress = mmap.mmap(memory, PROGRESS)

    def begin(index: int | None, anew: bool) -> None:
        INDEX.pack_into(progress, 0, WHOLE if index is None else index)
        if anew:
            SINCE.pack_into(progress, INDEX.size, time.monotonic())

    def reply_to(request: bytes) -> dict[str, Any]:
        try:
            what, entry, *rest = pickle.loads(request)
            if what == "find":
                flag, folder = rest
                os.chdir(folder)
                functions[entry] = find_function(entry, flag)
                _seed()
                return _described(functions[entry])
            prompts, answers, columns, timeout = rest
            return {"values": functions[entry](prompts, answers, columns, timeout, begin)}
        except UserError as error:
            return {"refused": str(error)}
        except SampleError as error:
            return {"index": error.index, "error": str(error)}
        except BaseException as error:  # nobody interrupts this process: it is the function's own
            (index,) = INDEX.unpack_from(progress)
            return {"index": None if index == WHOLE else index, "error": in_words(error)}

    while request := _receive(requests, memory):
        reply = json.dumps(reply_to(request)).encode()
        if os.getpid() != me:  # a child that the function forked, and that came back out of it
            os._exit(0)
        try:
            connection.sendall(reply + b"\n")
        except OSError:
            os._exit(LOST)


def _seed() -> None:
    """A function that draws numbers draws the same ones in every run."""
    rank = rank_of_launcher()
    random.seed(rank)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(rank)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(rank)


def _receive(requests: BinaryIO, memory: int) -> bytes:
    """The next request; empty where there will be none."""
    try:
        head = requests.read(LENGTH.size)
        size = LENGTH.unpack(head)[0] if head else 0
        request = os.pread(memory, size, REQUEST)
        while len(request) < size:  # beyond 2 GB
            request += os.pread(memory, size - len(request), REQUEST + len(request))
        return request
    except OSError:
        os._exit(LOST)


def _described(function: RewardFunction) -> dict[str, Any]:
    """What the rank has to know of a function."""
    names = {"takes": sorted(function.takes), "needs": sorted(function.needs)}
    return {"batched": function.batched, "asynchronous": function.asynchronous, **names}
