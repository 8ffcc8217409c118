"""Recorded decode steps, on a CPU: all but the capture by CUDA itself, which tests/test_gpu.py has."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remax.core.sampling import Sampling
from remax.generation import graphs, loop
from remax.generation.cache import BLOCK, Slots
from remax.generation.decoder import GenerationSettings
from remax.generation.graphs import Arena, Graphs, regular_rows, rounded_up
from remax.generation.loop import SharedPromptDecoder
from tests.remax.generation.test_loop import PAD, SERVED, SHARED_HEADS, USUAL, assert_same, decode, make

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
FAMILIES = {kind: SERVED[kind] for kind in ("gpt2", "opt", "mistral", "gemma2")} | {"llama": USUAL | SHARED_HEADS}


def place_of(tensor) -> int:
    """Where the memory begins that a tensor is in."""
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """What a CUDA graph is: operations on the very tensors that they were recorded with.

    While it is recorded nothing is computed that lasts, and what would wait for a GPU ends it. When it is repeated no
    line of Python decides anything.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.given, self.made = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}\nmore")
        self.given |= {
            place_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        } - self.made.keys()
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        self.made |= {place_of(x): x for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result

    def spoil(self) -> None:
        """Nothing was computed: what was made holds anything."""
        for place, made in self.made.items():
            if place not in self.given:
                made.fill_(1)

    def repeat(self) -> None:
        for function, args, kwargs, result in self.operations:
            for place, value in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Tapes:
    """A recorder; counts what it is asked for."""

    def __init__(self):
        self.arena, self.counts = Arena(), Counter()

    def warm_up(self, step):
        self.counts["warm"] += 1
        step()

    def record(self, step):
        self.counts["recorded"] += 1
        before, tape = {name: piece.clone() for name, piece in self.arena.pieces.items()}, Tape()
        try:
            with tape, patch("torch.cuda.is_current_stream_capturing", lambda: True):  # transformers asks
                step()
        except RuntimeError:
            tape.spoil()
            raise
        finally:
            for name, piece in before.items():
                self.arena.pieces[name].copy_(piece)

        def repeat():
            self.counts["repeated"] += 1
            tape.repeat()

        return repeat


@pytest.fixture
def taped(monkeypatch):
    """taped(**options) -> a decoder whose steps are recorded, and its recorder."""
    # As on a GPU, where nobody looks at the logits.
    monkeypatch.setattr(loop, "mend", lambda logits: logits.float().nan_to_num(nan=0.0, neginf=-torch.inf))

    def build(**options):
        tapes = Tapes()
        recorded = Graphs(tapes)
        tapes.arena = recorded.arena
        return SharedPromptDecoder(graphs=recorded, **options), tapes

    return build


def change(model) -> None:
    """Other weights where the present ones lie."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_recorded_steps_decode_what_others_do(kind, taped):
    # Padding, a cap, several samples, a spare prompt (5 of 6), buffers that grow, windows, rows that leave; then
    # weights that change where they are, for which the same recordings serve, and some that move, for which none does.
    model = make(kind, FAMILIES[kind])
    decoder, tapes = taped(look_every=4)
    settings = GenerationSettings(36, PAD, Sampling(0.7, top_p=0.9, top_k=20), max_greedy_tokens=11)
    expected = decode(SharedPromptDecoder(), model, settings, samples=2)
    assert expected.sampled.answer_lengths.max() > BLOCK
    assert_same(decode(decoder, model, settings, samples=2), expected, 1e-5)
    assert (2 if kind == "gemma2" else 3) <= tapes.counts["recorded"] < tapes.counts["repeated"] / 2
    first = {step: repeat for step, repeat in decoder.graphs.steps.items() if repeat}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    expected, answers = (decode(one, model, settings, samples=2) for one in (SharedPromptDecoder(), decoder))
    assert_same(answers, expected, 1e-5)
    assert all(decoder.graphs.steps[step] is repeat for step, repeat in first.items())
    weight = model.get_output_embeddings().weight
    weight.data = weight.data.clone()
    assert_same(decode(decoder, model, settings, samples=2), expected, 1e-5)
    assert not set(first.values()) & set(decoder.graphs.steps.values())


def test_parts_of_a_batch_and_kinds_of_answers(taped):
    model, settings = make("llama", FAMILIES["llama"]), GenerationSettings(10, PAD)
    decoder, tapes = taped(cache_bytes=9000)
    for options in ({}, {"samples": 0}, {"samples": 2, "greedy": False, "logprobs": False}):
        got, expected = (decode(one, model, settings, **options) for one in (decoder, SharedPromptDecoder()))
        if options.get("logprobs", True):
            assert_same(got, expected, 1e-5)
        else:
            assert torch.equal(got.sampled.input_ids, expected.sampled.input_ids) and got.logprobs is None
    assert tapes.counts["repeated"]


def test_rows_that_go_on_are_regular():
    # Every set of ended rows of 4 prompts with 2 sampled answers and a greedy one.
    of_row = list(range(4)) * 3
    for ended in map(list, itertools.product((False, True), repeat=12)):
        if all(ended):
            continue
        rows = regular_rows(of_row, 8, ended)
        assert len(set(rows)) == len(rows) and {row for row in range(12) if not ended[row]} <= set(rows)
        assert [row < 8 for row in rows] == sorted((row < 8 for row in rows), reverse=True)
        number = {prompt: i for i, prompt in enumerate(sorted({of_row[row] for row in rows}))}
        slots = Slots([number[of_row[row]] for row in rows], len(number), torch.device("cpu"))
        assert slots.regular and len(number) == rounded_up(len({of_row[row] for row in range(12) if not ended[row]}))
    # 5 of 8 prompts go on with one of their 4 answers: those, and one that has ended
    ended = [True] * 32
    for row in (0, 9, 18, 27, 4):
        ended[row] = False
    assert regular_rows(list(range(8)) * 4, 32, ended) == [0, 9, 18, 27, 4, 5]


def test_numbers_are_rounded_up():
    found = [rounded_up(number) for number in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 48, 49, 64)]
    assert found == [0, 1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32, 48, 64, 64]


def test_an_arena_keeps_its_places():
    arena = Arena()
    first = arena.place("keys", torch.arange(4.0).view(2, 2), room=6)
    second = arena.place("keys", first[:1] + 1)
    assert second.tolist() == [[1.0, 2.0]] and second.data_ptr() == first.data_ptr() and arena.bytes == 24
    assert arena.place("keys", torch.ones(7)).data_ptr() != first.data_ptr() and arena.bytes == 28
    assert arena.place("keys", torch.ones(2, dtype=torch.long)).dtype == torch.long


def test_few_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    tapes = Tapes()
    recorded, seen = Graphs(tapes), []
    for kind in "abacba":  # b is the oldest when c comes, and a when b comes again
        recorded.take(kind, lambda kind=kind: seen.append(kind))
    assert tapes.counts["warm"] == 5 and list(recorded.steps) == ["b", "a"]


def test_what_cannot_be_recorded_is_decoded_all_the_same(taped, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(graphs, "warn", said.append)
    settings, (decoder, tapes) = GenerationSettings(9, PAD), taped()
    reads = make("llama", USUAL)
    reads.lm_head.register_forward_hook(lambda module, args, output: print(output[0, 0, 0].item()))
    for _ in range(2):
        assert_same(decode(decoder, reads, settings), decode(SharedPromptDecoder(), reads, settings), 1e-5)
    what = "operation not permitted when stream is capturing: aten._local_scalar_dense.default"
    assert said == [f"CUDA graphs: a decode step cannot be recorded ({what}); decoding goes on without"]
    assert decoder.graphs is None and tapes.counts["warm"] == tapes.counts["recorded"] == 1


def test_ranks_that_decode_in_step_record_nothing(taped):
    model, settings, (decoder, tapes) = make("llama", USUAL), GenerationSettings(9, PAD), taped()
    assert_same(
        decode(decoder, model, settings, synced_gpus=True), decode(SharedPromptDecoder(), model, settings), 1e-5
    )
    assert not tapes.counts
