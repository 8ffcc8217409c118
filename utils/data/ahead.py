"""Batches that are read while the step before them is made, by a thread beside it.

Their order, their errors and the position that a checkpoint keeps are those of reading when asked: an error is raised
where its batch would have come, and the position is that of the last batch handed out, however many lie ready.
"""

import queue
import threading
from collections.abc import Generator, Mapping
from contextlib import suppress
from typing import Any, cast

from torch.utils.data import DataLoader

from utils.data.loaders import ResumableSampler

LOOK = 0.1  # seconds between two looks of a thread that waits for room at whether it is still wanted


class Ahead:
    """A loader whose next batches are read in advance; its `sampler` is a `ResumableSampler`.

    Args:
        ready: How many batches lie ready at most.
    """

    def __init__(self, loader: DataLoader, ready: int) -> None:
        self.loader, self.sampler, self.ready = loader, cast(ResumableSampler, loader.sampler), ready
        self.position: dict[str, Any] | None = None  # of the last batch handed out; None: none since a state was loaded

    def __iter__(self) -> Generator[Any, None, None]:
        """The batches; to be closed, or gone through, before the sampler is touched."""
        room: queue.Queue[tuple[Any, dict[str, Any] | None, BaseException | None]] = queue.Queue(self.ready)
        unwanted = threading.Event()

        def put(*item: Any) -> None:
            while not unwanted.is_set():
                with suppress(queue.Full):
                    return room.put(item, timeout=LOOK)

        def read() -> None:
            try:
                for batch in self.loader:
                    put(batch, self.sampler.state_dict(), None)
                    if unwanted.is_set():
                        return
                put(None, None, None)
            except BaseException as error:
                put(None, None, error)

        thread = threading.Thread(target=read, name="reading ahead", daemon=True)
        thread.start()
        try:
            while True:
                batch, position, error = room.get()
                if error is not None:
                    raise error
                if position is None:
                    return
                self.position = position
                yield batch
        finally:
            unwanted.set()
            thread.join()

    def state_dict(self) -> dict[str, Any]:
        """The position of the batches handed out, see `ResumableSampler.state_dict`."""
        return self.sampler.state_dict() if self.position is None else self.position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration continue at this state."""
        self.position = None
        self.sampler.load_state_dict(dict(state))
