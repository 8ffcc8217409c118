"""Decode steps as CUDA graphs: one launch for a step instead of a thousand.

A graph repeats the kernels that were launched while it was recorded, with their shapes and on their addresses. So what
a step reads and writes stays where it is (`Arena`), shapes are few (`rounded_up`), and a graph is found by where its
tensors lie: one that would read memory that is no longer theirs is never found again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.metrics import warn

MOST_GRAPHS = 64
Step = Callable[[], object]


def rounded_up(number: int) -> int:
    """The next of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, ...: less than half as much again."""
    power = 1 << max(number - 1, 0).bit_length()
    return next(size for size in (0, power * 3 // 4, power) if size >= number)


def regular_rows(prompt_of_row: list[int], sampled: int, ended: list[bool]) -> list[int]:
    """The rows to go on with so that each prompt has as many as any other, in the order of `Slots`.

    Those are the ones that still grow and, to fill up, ended ones: the numbers of prompts, and of a prompt's sampled
    rows, are rounded up.

    Args:
        prompt_of_row: Each prompt has as many rows as any other; the sampled ones come first.
        sampled: How many rows those are.
        ended: Of each row.
    """
    prompts = range(max(prompt_of_row) + 1)
    grow = {prompt for prompt, end in zip(prompt_of_row, ended, strict=True) if not end}
    others = [prompt for prompt in prompts if prompt not in grow]
    chosen = sorted([*grow, *others[: rounded_up(len(grow)) - len(grow)]])
    left: list[int] = []
    for kind in (range(sampled), range(sampled, len(ended))):
        of_prompt: list[list[int]] = [[] for _ in prompts]
        for row in sorted(kind, key=ended.__getitem__):  # those that grow come first
            of_prompt[prompt_of_row[row]].append(row)
        most = max(sum(not ended[row] for row in rows) for rows in of_prompt)
        left += [of_prompt[p][i] for i in range(min(rounded_up(most), len(of_prompt[0]))) for p in chosen]
    return left


class Arena:
    """Memory that is kept from one decode to the next, a piece for each name, as large as it has ever had to be."""

    def __init__(self) -> None:
        self.pieces: dict[Hashable, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        return sum(piece.numel() * piece.itemsize for piece in self.pieces.values())

    def place(self, name: Hashable, values: Tensor, room: int = 0) -> Tensor:
        """A copy of some values in the memory of this name.

        Args:
            values: They may not lie there themselves.
            room: Numbers that will be needed there before long.
        """
        piece = self.pieces.get(name)
        if piece is None or piece.numel() < values.numel() or piece.dtype != values.dtype:
            piece = self.pieces[name] = values.new_zeros(max(values.numel(), room))
        place = piece[: values.numel()].view(values.shape)
        place.copy_(values)
        return place


class Recorder(Protocol):
    """What takes steps on a device and makes them repeatable."""

    def warm_up(self, step: Step) -> None:
        """Takes a step where others will be recorded."""
        ...

    def record(self, step: Step) -> Step:
        """Gives what repeats a step; the step itself is not taken."""
        ...


class CudaRecorder:
    """Records CUDA graphs.

    A graph holds on to what lay in the pool while it was recorded. No tensor that is there outlives a step, so all
    graphs can have the same pool, in whichever order they run.
    """

    def __init__(self) -> None:
        # cuBLAS has a workspace for each stream: with a stream of its own for the first steps and the recorded ones,
        # that of the recorded ones is there beforehand, and nobody else's.
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        """See `Recorder`."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, step: Step) -> Step:
        """See `Recorder`. What other threads do meanwhile (checkpoints, NCCL's watchdog) does not matter."""
        here = torch.cuda.current_stream()
        try:
            return self._recorded(step, self.pool)
        except Exception:
            # torch may leave behind the stream, a pool that it still records to, and a generator that still counts for
            # the graph; a recording that comes to its end gives the generator back.
            torch.cuda.set_stream(here)
            with suppress(RuntimeError):  # it is not recorded to
                torch._C._cuda_endAllocateToPool(here.device_index, self.pool)
            self._recorded(lambda: torch.zeros(1, device=here.device), torch.cuda.graph_pool_handle())
            raise

    def _recorded(self, step: Step, pool: Any) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


class Graphs:
    """The recorded steps of a model, and the memory on which they work.

    Attributes:
        recorder: Makes the graphs; None until the first step: a `CudaRecorder`.
        failed: A step could not be recorded, for example since it waits for the GPU. Steps are taken as they are then.
    """

    def __init__(self, recorder: Recorder | None = None):
        self.recorder, self.arena, self.failed = recorder, Arena(), False
        self.steps: OrderedDict[Hashable, Step | None] = OrderedDict()  # the one that was used last is the last
        self._weights: tuple[int, ...] = ()

    def begin(self, model: nn.Module) -> None:
        """Forgets all graphs if a weight of the model lies elsewhere than in the last decode."""
        weights = addresses([*model.parameters(), *model.buffers()])
        if weights != self._weights:
            self.steps.clear()
            self._weights = weights

    def take(self, kind: Hashable, step: Step) -> None:
        """Takes a step.

        The first of its kind is taken as it is: what is made once, such as the workspaces of libraries, is there
        afterwards. The second is recorded, and repeated from then on.

        Args:
            kind: Equal for steps that launch the same kernels on the same addresses.
        """
        recorder = self.recorder = self.recorder or CudaRecorder()
        if self.failed:
            step()
            return
        if kind not in self.steps:
            recorder.warm_up(step)
            self.steps[kind] = None
            if len(self.steps) > MOST_GRAPHS:
                self.steps.popitem(last=False)
            return
        self.steps.move_to_end(kind)
        if (repeat := self.steps[kind]) is None:
            try:
                repeat = self.steps[kind] = recorder.record(step)
            except Exception as error:
                warn(f"CUDA graphs: a decode step cannot be recorded ({cause_of(error)}); decoding goes on without")
                self.failed, repeat = True, step
                self.steps.clear()
        repeat()


def cause_of(error: BaseException) -> str:
    """The first line of what came first: the end of a recording that failed fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Where some tensors lie."""
    return tuple(tensor.data_ptr() for tensor in tensors)
