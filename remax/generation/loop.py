"""A decode loop of our own over a model's forward in transformers.

A prompt is read once for its sampled and its greedy answers. Rows that have ended leave the batch, greedy ones that
have reached their cap too, so that a step costs what the answers cost that still grow. Prompts are decoded in order of
length, as many together as the memory for keys and values allows.

What is drawn depends on neither: each row has its own random numbers, see `sampler`. Greedy answers are the same too,
but for the rounding of products that depends on how many rows they have.

With `Graphs` a GPU repeats recorded steps, unless the ranks decode in step. Shapes are few then: prompts, the width of
the longest, and rows are rounded up, and rows leave when half of them have ended. What is there in excess is computed
and thrown away.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from remax.core.onednn import for_few_rows
from remax.core.sequences import Prompts, among
from remax.generation.cache import SHARED, PromptCache
from remax.generation.decoder import Answers, GenerationSettings
from remax.generation.graphs import Arena, Graphs, addresses, regular_rows, rounded_up
from remax.generation.hugging_face import HuggingFaceDecoder
from remax.generation.sampler import draw, logprobs_of, mend, most_probable, uniform_numbers
from utils.distributed import world_size
from utils.metrics import warn

READ_AT_ONCE = 2**14  # prompt tokens, padding included
CPU_BYTES = 2**31  # for keys and values
GPU_SHARE = 0.5  # of the free memory
LOOK_EVERY = 8  # steps between two looks at what has ended, on a GPU, where each waits for it
LAYERS = {"full_attention", "sliding_attention"}
WRITTEN = ("ids", "positions", "ended", "uniform", "logprobs")  # of `_Rows`, by a step


@dataclass
class _Rows:
    """The rows of a decode that still grow, sampled ones first.

    Attributes:
        numbers: (rows,) of each among all that are asked for; -1 of one that nobody asked for.
        sampled: How many of them are sampled.
        ids: (rows,) the last token of each.
        positions: (rows,) where it stands.
        ended: (rows,) bool.
        uniform: (rows,) float64 in [0, 1), what the next token is drawn with, of the sampled ones.
        logprobs: (rows,) float32 of the last token, where they are asked for.
        arena: Where all but the numbers lies.
    """

    numbers: Tensor
    sampled: int
    ids: Tensor
    positions: Tensor
    ended: Tensor
    uniform: Tensor
    logprobs: Tensor
    arena: Arena | None = None

    def __post_init__(self) -> None:
        if self.arena is not None:
            for name in WRITTEN:
                setattr(self, name, self.arena.place(name, getattr(self, name)))

    def keep(self, rows: list[int]) -> None:
        """Goes on with some of them."""
        index = torch.tensor(rows, device=self.ids.device)
        self.sampled = sum(row < self.sampled for row in rows)
        for name in ("numbers", *WRITTEN):
            setattr(self, name, getattr(self, name)[index])
        self.__post_init__()


class SharedPromptDecoder:
    """Reads prompts once, and lets rows go when they have ended; where a model does not allow it, `generate`."""

    name = "a decode that reads each prompt once"

    def __init__(self, cache_bytes: int | None = None, look_every: int | None = None, graphs: Graphs | None = None):
        """Sets limits.

        Args:
            cache_bytes: Most memory for keys and values; by default 2 GiB on a CPU, half of what is free on a GPU.
            look_every: Steps between two looks at what has ended; by default each on a CPU, each eighth on a GPU.
            graphs: Records the steps of the model, on a GPU.
        """
        self.cache_bytes, self.look_every, self.graphs = cache_bytes, look_every, graphs
        if graphs is not None:
            self.name = f"{self.name}, its steps as CUDA graphs"
        self.faults: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
        self.instead = HuggingFaceDecoder()

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: GenerationSettings,
        *,
        samples: int,
        greedy: bool,
        logprobs: bool = False,
        synced_gpus: bool = False,
    ) -> Answers:
        """See `Decoder`."""
        if model not in self.faults:
            self.faults[model] = fault_of(model)
            if self.faults[model]:
                kind = model.config.model_type
                warn(f"answers of models of the type {kind!r} come from transformers' generate: {self.faults[model]}")
        if self.faults[model]:
            return self.instead(
                model, prompts, settings, samples=samples, greedy=greedy, logprobs=logprobs, synced_gpus=synced_gpus
            )
        if self.graphs is not None and self.graphs.failed:
            self.graphs = None  # and its memory goes
        graphs = None if synced_gpus else self.graphs
        decode = _Decode(model, prompts, settings, samples, greedy, logprobs, synced_gpus, graphs)
        look_every = self.look_every or (1 if prompts.input_ids.is_cpu else LOOK_EVERY)
        with attention(model, SHARED), nullcontext() if graphs else for_few_rows(model):
            for some in self.parts(decode):
                decode.answer(some, look_every)
        return decode.answers()

    def parts(self, decode: _Decode) -> Iterator[list[int]]:
        """The prompts in order of length, as many at once as the memory allows; all where the ranks decode in step."""
        order = sorted(range(len(decode.lengths)), key=decode.lengths.__getitem__)
        budget = self.cache_bytes or _free_bytes(decode.device, decode.graphs.arena.bytes if decode.graphs else 0)
        size = rounded_up if decode.graphs else int
        part: list[int] = []
        for prompt in order:
            width = size(decode.lengths[prompt]) + decode.kinds * decode.settings.max_new_tokens
            tokens = size(len(part) + 1) * width
            if part and not decode.together and tokens * PromptCache.bytes_of_token(decode.model) > budget:
                yield part
                part = []
            part.append(prompt)
        yield part


def _free_bytes(device: torch.device, held: int) -> int:
    """For keys and values; `held` is what an arena has for them already."""
    if device.type != "cuda":
        return CPU_BYTES
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GPU_SHARE * (free + unused + held))


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the model has this attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _Decode:
    """The answers to some prompts as they grow."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: GenerationSettings,
        samples: int,
        greedy: bool,
        logprobs: bool,
        together: bool,
        graphs: Graphs | None,
    ):
        self.graphs: Graphs | None = graphs
        self.kind: Hashable = None
        if graphs is not None:
            graphs.begin(model)
        self.model, self.prompts, self.settings = model, prompts, settings
        self.samples, self.greedy, self.together = samples, greedy, together
        self.device, self.lengths = prompts.input_ids.device, prompts.lengths.tolist()
        self.kinds = samples + greedy
        self.drawn = len(prompts) * samples  # rows; those of the greedy answers come behind
        # One row more, for those that nobody asked for.
        shape = (len(prompts) * self.kinds + 1, settings.max_new_tokens)
        self.tokens = torch.full(shape, settings.pad_id, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device) if logprobs else None
        self.noise = uniform_numbers(self.drawn, settings.max_new_tokens, self.device)
        self.end_ids = model.generation_config.eos_token_id

    def answer(self, some: list[int], look_every: int) -> None:
        """Decodes the answers to some of the prompts, by their numbers."""
        limit, cap = self.settings.max_new_tokens, self.settings.greedy_cap
        longest = limit if self.samples else cap
        arena = None if self.graphs is None else self.graphs.arena
        spare = 0 if self.graphs is None else rounded_up(len(some)) - len(some)  # prompts that nobody asks about
        kinds = [[prompt * self.samples + i for prompt in some] for i in range(self.samples)]
        kinds += [[self.drawn + prompt for prompt in some]] * self.greedy
        numbers = torch.tensor([kind + [-1] * spare for kind in kinds], device=self.device).flatten()
        cache = PromptCache(
            [self.lengths[prompt] - 1 for prompt in some] + [0] * spare,
            list(range(len(some) + spare)) * self.kinds,
            self.device,
            arena,
            longest,
        )
        which = torch.tensor(some + some[:1] * spare, device=self.device)
        read(self.model, cache, self.prompts, which[: len(some)], READ_AT_ONCE if not self.together else None)
        rows = _Rows(
            numbers=numbers,
            sampled=len(which) * self.samples,
            ids=self.prompts.input_ids[which, -1].repeat(self.kinds),
            positions=(self.prompts.lengths[which] - 1).repeat(self.kinds),
            ended=numbers < 0,
            uniform=torch.zeros(len(numbers), dtype=torch.float64, device=self.device),
            logprobs=torch.zeros(len(numbers), device=self.device),
            arena=arena,
        )
        for step in range(longest):
            cache.begin(step)
            rows.uniform[: rows.sampled] = self.noise[rows.numbers[: rows.sampled], step]
            self.take(cache, rows)
            self.tokens[rows.numbers, step] = rows.ids
            if self.logprobs is not None:
                self.logprobs[rows.numbers, step] = rows.logprobs
            if step + 1 == cap:
                rows.ended[rows.sampled :] = True
            if step + 1 == longest:
                break
            if (step + 1) % look_every == 0 or step + 1 == cap:
                ended = rows.ended.tolist()
                if self.all_ended(all(ended)):
                    break
                self.drop(cache, rows, ended)

    def take(self, cache: PromptCache, rows: _Rows) -> None:
        """`extend`, by a graph where there are graphs."""
        if self.graphs is None:
            self.extend(cache, rows)
            return
        if cache.moved:
            tensors = [*cache.tensors(), *(getattr(rows, name) for name in WRITTEN)]
            shapes = tuple(tensor.shape for tensor in tensors)
            asked = (rows.sampled, self.settings.sampling, tuple(self.end_ids), self.logprobs is not None)
            self.kind, cache.moved = (asked, shapes, addresses(tensors)), False
        self.graphs.take(self.kind, partial(self.extend, cache, rows))

    def extend(self, cache: PromptCache, rows: _Rows) -> None:
        """One more token for every row, by what lies on the device alone, and written in place."""
        cache.forget_masks()
        out: Any = self.model(
            input_ids=rows.ids[:, None], position_ids=rows.positions[:, None], past_key_values=cache, use_cache=True
        )
        logits = mend(out.logits[:, -1])
        drawn, greedy, ids, logprobs = logits[: rows.sampled], logits[rows.sampled :], [], []
        if len(drawn):
            found, logprob = draw(drawn, self.settings.sampling, rows.uniform[: rows.sampled])
            ids.append(found)
            logprobs.append(logprob)
        if len(greedy):
            ids.append(most_probable(greedy))
            if self.logprobs is not None:
                logprobs.append(logprobs_of(greedy, ids[-1]))
        torch.cat(ids, out=rows.ids)
        rows.positions += 1
        rows.ended |= among(rows.ids, self.end_ids)
        if self.logprobs is not None:
            torch.cat(logprobs, out=rows.logprobs)

    def all_ended(self, here: bool) -> bool:
        """Whether no row grows any more, where the ranks decode in step on any rank."""
        if not self.together or world_size() == 1:
            return here
        grows = torch.tensor(not here, dtype=torch.int32, device=self.device)
        dist.all_reduce(grows, op=dist.ReduceOp.MAX)
        return not grows

    def drop(self, cache: PromptCache, rows: _Rows, ended: list[bool]) -> None:
        """Lets the rows go that have ended, if they are enough to be worth moving the others."""
        if self.graphs is None:
            left = [row for row, end in enumerate(ended) if not end] or [0]  # one for the ranks that go on
            enough = 8 * len(left) <= 7 * len(ended)
        else:
            left = regular_rows(cache.prompt_of_row, rows.sampled, ended)
            enough = 2 * len(left) <= len(ended)
        if enough:
            cache.keep(left)
            rows.keep(left)

    def answers(self) -> Answers:
        """What has been decoded."""
        return Answers.of_rows(
            self.prompts,
            self.tokens[:-1],
            None if self.logprobs is None else self.logprobs[:-1],
            self.settings,
            self.end_ids,
            samples=self.samples,
            greedy=self.greedy,
        )


def read(model: PreTrainedModel, cache: PromptCache, prompts: Prompts, which: Tensor, at_once: int | None) -> None:
    """Reads some of the prompts, without their last tokens.

    Args:
        which: (n,) numbers of the prompts, in the order that the cache has them.
        at_once: Tokens in a forward, padding included; None: all.
    """
    ids, lengths, start = prompts.input_ids[which], prompts.lengths[which], 0
    while start < len(which):
        end, width = start, 0
        while end < len(which) and (at_once is None or (end + 1 - start) * max(width, cache.read[end]) <= at_once):
            width = max(width, cache.read[end])
            end += 1
        end = max(end, start + 1)
        columns = torch.arange(max(*cache.read[start:end], 1), device=ids.device)
        places = (ids.shape[1] - lengths[start:end, None] + columns).clamp(max=ids.shape[1] - 1)
        cache.reading = slice(start, end)
        model.base_model(
            input_ids=ids[start:end].gather(1, places),
            position_ids=columns.expand(end - start, -1),
            past_key_values=cache,
            use_cache=True,
        )
        start = end


def fault_of(model: PreTrainedModel) -> str:
    """Why a model cannot be decoded so; empty: it can, which a few tokens have shown."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return "their attention cannot be exchanged"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "they take no positions"
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= LAYERS:
        return "they have layers without attention over all of a row"
    rope = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", ""))
    if rope in ("dynamic", "longrope"):
        return f"their positions turn on the longest row of a batch ({rope})"
    try:
        return _probe(model, "sliding_attention" in kinds or bool(getattr(config, "sliding_window", None)))
    except Exception as error:
        return (str(error) or type(error).__name__).splitlines()[0]


@torch.no_grad()
def _probe(model: PreTrainedModel, slides: bool) -> str:
    """Compares the logits of a few tokens with those of a forward without cache."""
    config, device = model.config.get_text_config(), next(model.parameters()).device
    ids = torch.arange(14, device=device).view(2, 7) * 31 % config.vocab_size
    expected = model(input_ids=ids, use_cache=False).logits.float()  # (2, 7, V)
    prompts = Prompts(torch.stack([ids[0, :4], ids[1, :4].roll(2)]), torch.tensor([4, 2], device=device))
    cache = PromptCache([3, 1], [0, 1, 0, 1], device)
    with attention(model, SHARED):
        read(model, cache, prompts, torch.arange(2, device=device), None)
        steps = []
        for step in range(3):
            cache.begin(step)
            fed = torch.stack([ids[0, 3 + step], ids[1, 1 + step]]).repeat(2)
            out: Any = model(
                input_ids=fed[:, None],
                position_ids=torch.tensor([[3 + step], [1 + step]] * 2, device=device),
                past_key_values=cache,
                use_cache=True,
            )
            steps.append(out.logits[:, -1].float())
    got = torch.stack(steps, 1)  # (4, 3, V)
    wanted = torch.stack([expected[0, 3:6], expected[1, 1:4]]).repeat(2, 1, 1)
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * (1 + wanted.nan_to_num().abs().max())
    if not torch.allclose(got, wanted, rtol=0.0, atol=float(tolerance), equal_nan=True):
        return "their logits by its cache differ from those of a forward"
    if slides and cache.windows <= {None}:
        return "their sliding window is not told to the attention"
    return ""
