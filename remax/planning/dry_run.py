"""What a model's forward and backward hold, found by running them without numbers.

The model is built on torch's meta device with two and with three layers. There the very code that trains runs through,
operator by operator, while a dispatch mode counts the bytes of every storage from its birth to its end, as a device's
allocator would. Layers being alike, the difference of both is what one layer keeps, and any number of layers follows.
So each family of models, each number format and each version of transformers is counted as it is.

The kernels of attention keep queries, keys, values, the result and one number for each row of the softmax, never the
matrix of all pairs; so does the stand-in that serves here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from remax.core import fused, linear
from remax.core.logprobs import token_stats
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts
from remax.generation.cache import BLOCK, SHARED, PromptCache
from remax.generation.loop import READ_AT_ONCE, attention, read
from remax.generation.sampler import draw, mend
from remax.models.loading import count_parameters, prepare_training
from remax.models.lora import add_lora
from remax.models.policy import PolicyModel
from remax.models.reward_model import RewardModel


class Storages(TorchDispatchMode):
    """Bytes of the storages that operators make, now and at most; those of `known` tensors are not counted."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.known = known  # kept, so that no other storage gets the place of one of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # transformers asks whether rows are packed by their positions: these are not
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self.sizes:
            self.sizes[place] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._end, place)

    def _end(self, place: int) -> None:
        self.live -= self.sizes.pop(place)


class _Attention(torch.autograd.Function):
    """As a fused kernel has it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """As a GPU has `remax.core.linear.product_in_float32`."""
    return a.new_empty(len(a), b.shape[1], dtype=torch.float32)


@contextlib.contextmanager
def without_numbers(cuda: bool) -> Iterator[None]:
    """Inside, tensors have no numbers, and operators the memory that they have on a GPU, or on a CPU."""
    with contextlib.ExitStack() as stack:
        attention: Any = lambda q, k, v, *args, **options: _Attention.apply(q, k, v)  # noqa: E731
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", attention))
        for module in (linear, fused) if cuda else ():
            stack.enter_context(patch.object(module, "product_in_float32", _product))
        stack.enter_context(torch.device("meta"))
        yield


@dataclass(frozen=True)
class Sketch:
    """A model to run without numbers.

    Attributes:
        config: Told apart by `key`, its text: configurations cannot be hashed.
        scores: A sequence classifier with one label; otherwise a causal language model.
        lora: Rank and layers of its adapters, and whether they alone learn; None for none.
        cuda: As on a GPU; otherwise as on a CPU.
    """

    config: PreTrainedConfig = field(compare=False)
    dtype: torch.dtype
    scores: bool = False
    checkpointing: bool = False
    lora: tuple[int, str, bool] | None = None
    attention: str | None = None
    cuda: bool = True
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", json.dumps(self.config.to_dict(), sort_keys=True, default=str))

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def with_layers(self, layers: int) -> PreTrainedConfig:
        """The configuration with so many layers."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if isinstance(kinds := getattr(text, "layer_types", None), list):
            text.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
        return config

    def build(self, layers: int, learns: bool = True) -> Any:
        """The model with so many layers; inside `without_numbers`."""
        config = self.with_layers(layers)
        kind: Any = AutoModelForSequenceClassification if self.scores else AutoModelForCausalLM
        if self.scores:
            config.num_labels = 1
            config.pad_token_id = config.pad_token_id or 0
        hf = kind.from_config(config, dtype=self.dtype, attn_implementation=self.attention)
        if self.lora is not None:
            rank, names, only = self.lora
            add_lora(hf, rank, names, only, "--lora")
        prepare_training(hf, self.checkpointing and learns)
        model = RewardModel(hf) if self.scores else PolicyModel(hf)
        return model.train(learns).requires_grad_(True) if learns and self.lora is None else model.train(learns)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of all, trained, of the largest single one, and of the weights of linear layers."""

    parameters: int
    trained: int
    largest: int
    linear: int = 0


@functools.cache
def sizes(sketch: Sketch) -> Sizes:
    """Of the whole model."""
    with without_numbers(sketch.cuda):
        model = sketch.build(sketch.layers)
    largest = max(p.numel() for p in model.parameters())
    weights = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)}
    return Sizes(count_parameters(model), count_parameters(model, trained_only=True), largest, sum(weights.values()))


@dataclass(frozen=True)
class Held:
    """Bytes of a forward with its backward, beyond the model's own.

    Attributes:
        kept: By all layers, until the backward pass.
        head: At most beside that while log-probs or scores are computed, with their backward.
        layer: At most beside that while the layers' backward runs.
    """

    kept: int
    head: int
    layer: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.head, self.layer)


def _grown(sketch: Sketch, measure: Callable[[int], list[int]], few: int) -> list[int]:
    """From what models of `few` layers and of one more hold to that of all layers."""
    few = min(few, sketch.layers)
    first = measure(few)
    if few == sketch.layers:
        return first
    second = measure(few + 1)
    return [a + (b - a) * (sketch.layers - few) for a, b in zip(first, second, strict=True)]


def _tied(model: Any) -> int:
    """Bytes of the head's gradient where it waits for that of the input embedding, whose weight it is."""
    if isinstance(model, RewardModel):
        return 0
    weights = [layer.weight for layer in (model.hf.get_output_embeddings(), model.hf.get_input_embeddings())]
    same = weights[0] is weights[1] and weights[0].requires_grad
    return int(same) * weights[0].numel() * weights[0].element_size()


def _known(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.long, device="meta")


@functools.cache
def learning(
    sketch: Sketch,
    rows: int,
    tokens: int,
    answer: int,
    *,
    chunk: int,
    sampling: Sampling = Sampling(),
    stats_grad: bool = False,
    full_kl: bool = False,
) -> Held:
    """A training forward and backward over (rows, tokens), of which the last `answer` tokens count.

    Gradients of parameters leave as soon as they are there: where they go is a matter of the engine.
    """

    def measure(layers: int) -> list[int]:
        with without_numbers(sketch.cuda):
            model = sketch.build(layers)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            storages = Storages(_known(model))
            with storages:
                states = model.hf.base_model(input_ids=_ids(rows, tokens), use_cache=False).last_hidden_state
                kept = storages.live
                leaf = states.detach().requires_grad_(states.requires_grad)
                storages.peak = storages.live
                if sketch.scores:  # values of every token, or scores of the last
                    model.head(leaf[:, :answer]).sum().backward()
                else:
                    _stats(model, leaf, answer, chunk, sampling, stats_grad, full_kl).sum().backward()
                head = storages.peak
                storages.peak = storages.live
                torch.autograd.backward(states, leaf.grad)  # which would be gone with the last layer, if all were one
                return [kept, head, storages.peak + _tied(model) - (0 if leaf.grad is None else leaf.grad.nbytes)]

    kept, head, layer = _grown(sketch, measure, 2)
    return Held(kept, max(head - kept, 0), max(layer - kept, 0))


def _stats(
    model: Any,
    states: Tensor,
    answer: int,
    chunk: int,
    sampling: Sampling,
    stats_grad: bool = False,
    full_kl: bool = False,
) -> Tensor:
    hidden = states[:, -answer:].clone().flatten(0, 1).clone()  # (B, A, H) is picked out, then (N, H)
    targets = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    reference = {"reference_hidden": hidden.detach(), "reference_head": model.head} if full_kl else {}
    chunks = max(-(-len(hidden) // chunk), 1)
    of_token = token_stats(
        *(hidden, model.head, targets),
        chunks=chunks,
        sampling=sampling,
        entropy=True,
        stats_grad=stats_grad,
        fused=model.fused,
        **reference,
    )
    return torch.stack([x for x in of_token if x.requires_grad] or list(of_token)).sum(0)


@functools.cache
def reading(sketch: Sketch, rows: int, tokens: int, answer: int, *, chunk: int, sampling: Sampling = Sampling()) -> int:
    """Bytes, at most, of a forward without gradient: log-probs of the answers, or scores."""

    def measure(layers: int) -> int:
        with without_numbers(sketch.cuda), torch.no_grad():
            model = sketch.build(layers, learns=False)
            storages = Storages(_known(model))
            with storages:
                states = model.hf.base_model(input_ids=_ids(rows, tokens), use_cache=False).last_hidden_state
                if sketch.scores:
                    model.head(states[:, -1])
                else:
                    _stats(model, states, answer, chunk, sampling)
            return storages.peak

    return measure(min(2, sketch.layers))  # what a layer has held serves the next


@dataclass(frozen=True)
class Decoding:
    """Bytes of writing answers: of the whole cache of keys and values, and at most beside it."""

    cache: int
    beside: int


@functools.cache
def decoding(sketch: Sketch, prompts: int, kinds: int, prompt: int, answer: int, sampling: Sampling) -> Decoding:
    """Of `kinds` answers to each of some prompts of `prompt` tokens, written together by `SharedPromptDecoder`."""
    rows, full = prompts * kinds, -(-answer // BLOCK) * BLOCK

    def step(model: Any, cache: PromptCache, number: int) -> None:
        cache.begin(number)
        ids = _ids(rows, 1)
        states = model.hf.base_model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True)
        logits = mend(model.head(states.last_hidden_state[:, -1]))  # (rows, V)
        draw(logits, sampling, torch.zeros(rows, dtype=torch.float64))

    def measure(layers: int) -> list[int]:
        with without_numbers(sketch.cuda), torch.no_grad():
            model = sketch.build(layers, learns=False)
            with attention(model.hf, SHARED), Storages(_known(model)) as storages:
                cache = PromptCache([prompt - 1] * prompts, list(range(prompts)) * kinds, torch.device("meta"))
                asked = Prompts(_ids(prompts, prompt), torch.full((prompts,), prompt))
                read(model.hf, cache, asked, torch.arange(prompts), READ_AT_ONCE)
                if full > BLOCK:
                    cache.grow(full - BLOCK)
                    step(model, cache, full - BLOCK - 1)
                step(model, cache, full - BLOCK)  # the buffers grow for the last time
                return [storages.live, storages.peak]

    whole, peak = _grown(sketch, measure, 1)
    return Decoding(whole, max(peak - whole, 0))
