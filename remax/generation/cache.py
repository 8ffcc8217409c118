"""Keys and values of a decode, in which all answers to a prompt share what was read of it.

To transformers this is a cache and an attention. A model hands each layer's new keys and values to `PromptCache.update`
and what it gets back to `attend`, which looks up the rest in the cache. There are two kinds of forwards:

- *reading*: prompts, right-padded, without their last token; their keys and values are kept once for each prompt;
- *decoding*: one token of every row, at first the last of its prompt. A row attends to its prompt and to the tokens
  that it has decoded. The queries of all rows of a prompt stand side by side, so its keys are read once for them all.

The decoded tokens' keys are in a buffer that is read whole, with what is not yet written masked, and that grows by
`BLOCK` columns when it is full. To read a slice of a buffer of full length would take three times as long as that many
numbers without gaps between them (on a CPU, whose prefetching ends at a gap).

With an `Arena` a decode step can be recorded and repeated: the number of its token is on the device too, what lies
where depends on the shapes alone, and these are few, since buffers double and prompts' widths are rounded up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from remax.generation.graphs import Arena, rounded_up
from utils.present import present

BLOCK = 32  # columns
SHARED = "shared_prompts"  # transformers makes no mask for an attention that it has no mask function for


class _Layer(CacheLayerMixin):
    """One layer's keys and values, here of key heads H and width D; values may have a width of their own.

    Attributes:
        prompt_keys: (prompts, H, P, D), 0 beyond a prompt's end; prompt_values likewise.
        keys: (rows, H, A, D), of the decoded tokens, 0 where none is written; values likewise.
    """

    prompt_keys: Tensor | None = None
    prompt_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Unused."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Unused: `PromptCache.update` does it."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: no mask is made."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Unused: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """No limit that transformers need know."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases


class Slots:
    """Where the rows of a decode stand among the answers to their prompts, (most answers to a prompt, prompts).

    As long as every place is taken, the rows follow one another as the places do.

    Attributes:
        shape: Of the rows as `by_row` gives them: (answers, prompts) where every place is taken, else (rows,).
    """

    def __init__(self, prompt_of_row: list[int], prompts: int, device: torch.device):
        counts, places = [0] * prompts, []
        for prompt in prompt_of_row:
            places.append(counts[prompt] * prompts + prompt)
            counts[prompt] += 1
        self.answers, self.prompts = max(counts), prompts
        self.shape: tuple[int, ...] = (self.answers, prompts)
        self.regular = places == list(range(self.answers * prompts))
        if not self.regular:
            self.shape = (len(places),)
            rows = [0] * (self.answers * prompts)  # any row, where a place is empty
            for row, place in enumerate(places):
                rows[place] = row
            self.place_of_row = torch.tensor(places, device=device)
            self.row_of_place = torch.tensor(rows, device=device)

    def by_prompt(self, of_rows: Tensor) -> Tensor:
        """(*shape, H, G, N) of the rows -> (prompts, H, answers * G, N)."""
        if not self.regular:
            of_rows = of_rows[self.row_of_place].unflatten(0, (self.answers, self.prompts))
        return of_rows.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def by_row(self, of_prompts: Tensor) -> Tensor:
        """(prompts, H, answers * G, N) -> (*shape, H, G, N)."""
        of_places = of_prompts.unflatten(2, (self.answers, -1)).permute(2, 0, 1, 3, 4)
        return of_places if self.regular else of_places.flatten(0, 1)[self.place_of_row]


class PromptCache(Cache):
    """The keys and values of all layers.

    Attributes:
        step: The number of the token that each row decodes; None while prompts are read.
        at: (1,) that number, with an arena.
        columns: A, of the buffers.
        moved: Whether tensors have changed their shapes or places since somebody set this to False.
        reading: The prompts that the next forward reads.
        windows: The sliding windows that layers asked for.
    """

    layers: list[Any]

    def __init__(
        self,
        read: list[int],
        prompt_of_row: list[int],
        device: torch.device,
        arena: Arena | None = None,
        longest: int = 0,
    ):
        """Makes room.

        Args:
            read: Tokens of each prompt that are going to be read.
            prompt_of_row: The prompt of each row, a number below len(read).
            arena: Where keys and values lie; the prompts have equally many rows then, in the order of `Slots`.
            longest: Tokens that are going to be decoded, for the arena's sake.
        """
        super().__init__(layers=[])
        self.read, self.prompt_of_row, self.device, self.arena = read, prompt_of_row, device, arena
        self.step: int | None = None
        self.at: Tensor | None = None
        if arena is not None:
            self.at = arena.place("step", torch.zeros(1, dtype=torch.long, device=device))
        self.columns, self.most_columns = 0, -(-longest // BLOCK) * BLOCK
        self.windows: set[int | None] = set()
        self.reading = slice(0, 0)
        self._arrange()

    def _arrange(self) -> None:
        self.width, self.moved = max(*self.read, 1), True
        self.slots = Slots(self.prompt_of_row, len(self.read), self.device)
        self.lengths = torch.tensor(self.read, device=self.device)[:, None]  # (prompts, 1)
        if self.arena is not None:
            self.width = rounded_up(self.width)
            self.lengths = self.arena.place("lengths", self.lengths)
        self._hidden: dict[int | None, Tensor | None] = {}
        self._unwritten: dict[int | None, Tensor] = {}

    def begin(self, step: int) -> None:
        """The next forward decodes a token of every row, the one of this number."""
        self.step = step
        self.forget_masks()
        if self.at is not None:
            self.at.fill_(step)
        if step == self.columns:
            self.grow(step + BLOCK if self.arena is None else min(max(2 * step, BLOCK), self.most_columns))

    def forget_masks(self) -> None:
        """The next forward makes those of its step; what a recording has made holds no values before it is repeated."""
        self._hidden.clear()
        self._unwritten.clear()

    def grow(self, columns: int) -> None:
        """Gives the buffers more columns."""
        rows, more = len(self.prompt_of_row), columns - self.columns
        for number, layer in enumerate(self.layers):
            for name in ("keys", "values"):
                buffer, like = getattr(layer, name), getattr(layer, f"prompt_{name}")
                if buffer is None:
                    buffer = like.new_zeros(rows, like.shape[1], 0, like.shape[3])
                room = rows * like.shape[1] * like.shape[3] * self.most_columns
                self._put(number, name, pad(buffer, (0, 0, 0, more)), room)
        self.columns, self.moved = columns, True

    def _put(self, number: int, name: str, values: Tensor, room: int = 0) -> None:
        """Makes these a layer's keys or values, in the arena if there is one; `room` as of `Arena.place`."""
        if self.arena is not None:
            values = self.arena.place((number, name), values, room)
        setattr(self.layers[number], name, values)

    def tensors(self) -> list[Tensor]:
        """All that a decode step reads or writes here."""
        names = ("prompt_keys", "prompt_values", "keys", "values")
        return [
            present(self.at, "PromptCache.at"),
            self.lengths,
            *(getattr(layer, name) for layer in self.layers for name in names),
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes (N, H, T, D) new keys and values in; gives them back, with where `attend` finds the others."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer())
        layer = self.layers[layer_idx]
        if self.step is None:
            if layer.prompt_keys is None:
                for name, new in (("prompt_keys", key_states), ("prompt_values", value_states)):
                    empty = new.new_zeros(len(self.read), new.shape[1], self.width, new.shape[3])
                    self._put(layer_idx, name, empty)
            layer.prompt_keys[self.reading, :, : key_states.shape[2]] = key_states
            layer.prompt_values[self.reading, :, : value_states.shape[2]] = value_states
        elif self.at is None:
            layer.keys[:, :, self.step] = key_states[:, :, 0]
            layer.values[:, :, self.step] = value_states[:, :, 0]
        else:
            layer.keys.index_copy_(2, self.at, key_states)
            layer.values.index_copy_(2, self.at, value_states)
        key_states.remembered = (self, layer)  # type: ignore[attr-defined]
        return key_states, value_states

    def keep(self, rows: list[int]) -> None:
        """Goes on with some of the rows, and with the prompts that they answer."""
        index = torch.tensor(rows, device=self.device)
        prompts = sorted({self.prompt_of_row[row] for row in rows})
        fewer = len(prompts) < len(self.read)
        number = {prompt: i for i, prompt in enumerate(prompts)}
        self.read = [self.read[prompt] for prompt in prompts]
        self.prompt_of_row = [number[self.prompt_of_row[row]] for row in rows]
        self._arrange()
        of_prompts = torch.tensor(prompts, device=self.device) if fewer else None
        for i, layer in enumerate(self.layers):
            for name in ("keys", "values"):
                self._put(i, name, getattr(layer, name)[index])
                if of_prompts is not None:
                    self._put(i, f"prompt_{name}", getattr(layer, f"prompt_{name}")[of_prompts, :, : self.width])

    def hidden(self, window: int | None) -> Tensor | None:
        """(prompts, 1, 1, P) bool, True where a decoded token sees nothing of its prompt; None: it sees all."""
        if window not in self._hidden:
            step: int | Tensor = present(self.step, "PromptCache.step")
            last, mask = step, None
            if self.at is not None:
                step, last = self.at, self.columns - 1  # a recorded step is repeated as long as the buffers have room
            slides = window is not None and self.width + last >= window
            if slides or self.at is not None or min(self.read) < self.width:
                columns = torch.arange(self.width, device=self.device)
                mask = columns >= self.lengths  # (prompts, P)
                if window is not None and slides:
                    mask = mask | (columns <= self.lengths + step - window)
                mask = mask[:, None, None]
            self._hidden[window] = mask
        return self._hidden[window]

    def hide(self, own: Tensor, window: int | None) -> None:
        """Scores of the decoded tokens' columns, (..., A): -inf where none is written, or out of the window."""
        if self.at is not None:
            if window not in self._unwritten:
                columns = torch.arange(self.columns, device=self.device)
                mask = columns > self.at
                self._unwritten[window] = mask if window is None else mask | (columns <= self.at - window)
            own.masked_fill_(self._unwritten[window], -torch.inf)
            return
        step = present(self.step, "PromptCache.step")
        own[..., step + 1 :] = -torch.inf
        if window is not None and step >= window:
            own[..., : step + 1 - window] = -torch.inf

    @staticmethod
    def bytes_of_token(model: Any) -> int:
        """Of one token's keys and values in all layers, at most."""
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention of transformers, on what a `PromptCache` keeps.

    Args:
        query: (N, heads, T, D); key and value are what `PromptCache.update` gave.
        attention_mask: None; transformers makes no mask for this attention.
        scaling: Of the scores, by default D ** -0.5.
        sliding_window: How many tokens a token sees, itself included.
        softcap: c in c * tanh(score / c).
        s_aux: (heads,) scores of the sinks, which take a share of the attention and give nothing.

    Returns:
        (N, T, heads, D), and no attention weights.
    """
    if (remembered := getattr(key, "remembered", None)) is None:
        raise TypeError("their attention alters the keys that a cache gives")
    cache, layer = remembered
    cache.windows.add(sliding_window)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if cache.step is None:
        return _read(module, query, key, value, scaling, sliding_window, softcap, s_aux), None
    return _decode(cache, layer, query, scaling, sliding_window, softcap, s_aux), None


AttentionInterface.register(SHARED, attend)


def _read(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of prompts, which are padded on the right: no token sees padding but padding itself."""
    length, mask = query.shape[2], None
    slides = window is not None and length > window
    if slides or softcap is not None or sinks is not None:
        column = torch.arange(length, device=query.device)
        mask = column <= column[:, None]
        if window is not None and slides:
            mask &= column > column[:, None] - window
    if softcap is None and sinks is None:
        mask = mask if mask is None else mask[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=True)[0]
    heads = key.shape[1]
    scores = (query * scaling).unflatten(1, (heads, -1)) @ key[:, :, None].transpose(-1, -2)  # (N, H, G, T, T)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = _softmax(scores.transpose(-3, -2).transpose(-4, -3), sinks)  # (N, T, H, G, T)
    return (weights.transpose(-4, -3).transpose(-3, -2) @ value[:, :, None]).flatten(1, 2).transpose(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Scores (..., H, G, N) to attention weights; sinks are (H * G,)."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    sink = sinks.view(*scores.shape[-3:-1], 1).to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1, dtype=torch.float32)[..., :-1].to(scores.dtype)


def _decode(
    cache: PromptCache,
    layer: Any,
    query: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One token of every row: over its prompt's keys and its own; (rows, heads, 1, D) -> (rows, 1, heads, D)."""
    slots, heads = cache.slots, layer.keys.shape[1]
    if scaling != 1.0:
        query = query * scaling
    q = query.reshape(*slots.shape, heads, -1, query.shape[-1])  # (*slots.shape, H, G, D)
    own = q.flatten(0, -4) @ layer.keys.transpose(-1, -2)  # (rows, H, G, A)
    shared = slots.by_prompt(q) @ layer.prompt_keys.transpose(-1, -2)  # (prompts, H, answers * G, P)
    if softcap is not None:
        own, shared = (torch.tanh(scores / softcap) * softcap for scores in (own, shared))
    cache.hide(own, window)
    if (hidden := cache.hidden(window)) is not None:
        shared.masked_fill_(hidden, -torch.inf)
    scores = torch.cat([slots.by_row(shared), own.view(*slots.shape, *own.shape[1:])], -1)
    weights = _softmax(scores, sinks)  # (*slots.shape, H, G, P + A)
    out = slots.by_row(slots.by_prompt(weights[..., : cache.width]) @ layer.prompt_values)
    of_own = weights[..., cache.width :].flatten(0, -4) @ layer.values
    return (out + of_own.view(out.shape)).reshape(len(own), 1, -1, of_own.shape[-1])
