"""Every vectorised mask and gather of `remax.sequences` against a slow loop over python lists, on random rows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remax.core.rollout import Rollout
from remax.core.sequences import Prompts, Sequences, learned_mask, length_mask, places
from utils.data.batches import SupervisedBatch

PAD = 0
SEEDS = range(25)


def random_rows(seed: int, vocabulary: int = 6) -> list[tuple[list[int], list[int]]]:
    """[(prompt, answer)], each of at least one token; the ids include PAD, which proves that no mask looks at them."""
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(vocabulary) for _ in range(draw.randint(1, 5))],
            [draw.randrange(vocabulary) for _ in range(draw.randint(1, 6))],
        )
        for _ in range(draw.randint(1, 5))
    ]


def batch(rows: list[tuple[list[int], list[int]]], extra_columns: int = 0) -> Sequences:
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + extra_columns
    ids = [prompt + answer + [PAD] * (width - len(prompt) - len(answer)) for prompt, answer in rows]
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    return Sequences(torch.tensor(ids), prompt_lengths, torch.tensor([len(answer) for _, answer in rows]))


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_and_gathers_against_a_loop(seed):
    rows = random_rows(seed)
    sequences = batch(rows, extra_columns=seed % 3)
    values = torch.randn(*sequences.input_ids.shape, 2, generator=torch.Generator().manual_seed(seed))
    answers, predictors = sequences.answer(values), sequences.at(values, sequences.predictor_columns)
    width = max(len(answer) for _, answer in rows)
    assert sequences.answer_width == width == answers.shape[1] == sequences.answer_mask.shape[1]
    for i, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        assert sequences.mask[i].tolist() == [t < length for t in range(sequences.input_ids.shape[1])]
        assert sequences.answer_mask[i].tolist() == [j < len(answer) for j in range(width)]
        assert sequences.lengths[i] == length
        assert sequences.input_ids[i, sequences.end_index[i]] == answer[-1]
        assert sequences.answer_ids[i, : len(answer)].tolist() == answer
        for j in range(len(answer)):
            # answer token j stands in column p + j, and column p + j - 1 predicts it
            assert torch.equal(answers[i, j], values[i, len(prompt) + j])
            assert torch.equal(predictors[i, j], values[i, len(prompt) + j - 1])


@pytest.mark.parametrize("seed", SEEDS)
def test_select_and_trim_keep_the_rows(seed):
    rows = random_rows(seed)
    sequences = batch(rows, extra_columns=2)
    chosen = torch.tensor(random.Random(seed).sample(range(len(rows)), random.Random(seed).randint(1, len(rows))))
    expected = batch([rows[i] for i in chosen.tolist()])
    for got in (sequences.select(chosen), sequences.trim().select(chosen)):
        assert torch.equal(got.input_ids, expected.input_ids)
        assert torch.equal(got.prompt_lengths, expected.prompt_lengths)
        assert torch.equal(got.answer_lengths, expected.answer_lengths)


def test_concatenate_pads_to_the_widest():
    rows = random_rows(3) + random_rows(4)
    parts = [batch(rows[:2]), batch(rows[2:], extra_columns=3)]
    joined = Sequences.concatenate(parts, PAD).trim()
    assert torch.equal(joined.input_ids, batch(rows).input_ids)
    assert torch.equal(joined.lengths, batch(rows).lengths)


@pytest.mark.parametrize("seed", SEEDS)
def test_places_are_those_of_the_masks(seed):
    sequences = batch(random_rows(seed), extra_columns=1)
    of_all = places(sequences.lengths, sequences.tokens)
    for found, mask in ((sequences.answer_places, sequences.answer_mask), (of_all, sequences.mask)):
        assert [x.tolist() for x in found] == [x.tolist() for x in mask.nonzero(as_tuple=True)]


def test_counts_come_along():
    # They were read once; whatever is made of these rows need not read them again.
    first, second = batch(random_rows(3)).trim(), batch(random_rows(4)).trim()
    joined = Sequences.concatenate([first, second], PAD)
    for made in (first, joined, joined.select(slice(1, 3)), *joined.in_parts(2), joined.in_parts(3)[2].trim()):
        assert made.__dict__["counts"] == [made.prompt_lengths.tolist(), made.answer_lengths.tolist()]
    assert joined.select(torch.tensor([2, 0])).counts == [[side[2], side[0]] for side in joined.counts]


# --- generation


def cut_at_eos(answer: list[int], eos_ids: list[int]) -> list[int]:
    """Up to the first EOS, which belongs to the answer; all of it without one."""
    for j, token in enumerate(answer):
        if token in eos_ids:
            return answer[: j + 1]
    return answer


@pytest.mark.parametrize("eos_ids", [[5], [PAD], [5, PAD], [5, 2, 4]], ids=["own", "pad", "pad and own", "several"])
@pytest.mark.parametrize("seed", SEEDS)
def test_from_generation_against_a_loop(seed, eos_ids):
    # Prompts and answers are drawn from all ids, so EOS and pad stand in prompts too, and answers end at once, early or
    # never. Behind its EOS an answer holds whatever generation left there.
    draw = random.Random(seed)
    prompts = [[draw.randrange(6) for _ in range(draw.randint(1, 5))] for _ in range(4)]
    width, answer_width = max(map(len, prompts)) + seed % 2, draw.randint(1, 6)
    answers = [[draw.randrange(6) for _ in range(answer_width)] for _ in prompts]
    left_padded = Prompts(
        torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts]),
        torch.tensor([len(prompt) for prompt in prompts]),
    )
    got = Sequences.from_generation(left_padded, torch.tensor(answers), eos_ids, PAD)
    expected = batch([(prompt, cut_at_eos(answer, eos_ids)) for prompt, answer in zip(prompts, answers, strict=True)])
    assert torch.equal(got.input_ids, expected.input_ids)
    assert torch.equal(got.prompt_lengths, expected.prompt_lengths)
    assert torch.equal(got.answer_lengths, expected.answer_lengths)


def test_an_answer_of_eos_alone_has_one_token():
    prompts = Prompts(torch.tensor([[9, 7, 3], [5, 7, 8]]), torch.tensor([2, 3]))
    got = Sequences.from_generation(prompts, torch.tensor([[5, 4], [1, 2]]), [5], pad_id=9)
    assert got.input_ids.tolist() == [[7, 3, 5, 9, 9], [5, 7, 8, 1, 2]]  # the EOS in the second prompt is just a token
    assert got.answer_lengths.tolist() == [1, 2]
    assert got.end_index.tolist() == [2, 4]


def test_attention_mask_of_prompts():
    prompts = Prompts(torch.tensor([[0, 0, 3], [4, 0, 3]]), torch.tensor([1, 3]))
    assert prompts.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert prompts.repeat(2).input_ids.tolist() == [[0, 0, 3], [0, 0, 3], [4, 0, 3], [4, 0, 3]]
    assert prompts.repeat(2).lengths.tolist() == [1, 1, 3, 3]


def test_length_mask():
    assert length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


# --- rollouts


def random_rollout(seed: int, advantages_per_token: bool = True) -> Rollout:
    """Per-token fields hold 100 * row + column behind the mask too, so that every misplaced number shows."""
    rows = random_rows(seed) + random_rows(seed + 1)
    sequences = batch(rows)
    numbers = 100.0 * torch.arange(len(rows))[:, None] + torch.arange(sequences.answer_width)  # (B, A)
    return Rollout(
        sequences,
        rewards=torch.arange(len(rows)).float(),
        reference_logprobs=numbers,
        old_logprobs=-numbers,
        advantages=numbers + 0.5 if advantages_per_token else numbers[:, :1],
        reference_hidden=torch.stack([numbers, numbers + 0.25], 2),
    )


def as_rows(rollout: Rollout) -> list[tuple]:
    """What each row says, without padding."""
    rows = []
    for i in range(len(rollout)):
        n, length = int(rollout.sequences.answer_lengths[i]), int(rollout.sequences.lengths[i])
        advantages = rollout.advantages.expand(-1, rollout.sequences.answer_width)
        per_token = (rollout.reference_logprobs, rollout.old_logprobs, advantages, rollout.reference_hidden)
        rows.append(
            (
                tuple(rollout.sequences.input_ids[i, :length].tolist()),
                int(rollout.sequences.prompt_lengths[i]),
                float(rollout.rewards[i]),
                *(str(x[i, :n].tolist()) for x in per_token),
            )
        )
    return rows


@pytest.mark.parametrize("advantages_per_token", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_split_is_a_partition(size, advantages_per_token):
    for seed in range(5):
        rollout = random_rollout(seed, advantages_per_token)
        parts = list(rollout.split(size))
        assert len(parts) == -(-len(rollout) // size)  # the same number on every rank with as many rows
        assert all(len(part) <= size for part in parts)
        got = [row for part in parts for row in as_rows(part)]
        assert sorted(got) == sorted(as_rows(rollout))
        for part in parts:
            assert part.reference_logprobs.shape == part.sequences.answer_mask.shape
            assert part.sequences.input_ids.shape[1] == part.sequences.lengths.max()
            assert part.baseline is None
        lengths = [int(n) for part in parts for n in part.sequences.lengths]
        assert lengths == sorted(lengths)


def test_split_keeps_groups_together():
    # Six rows in three groups of two, in micro-batches of two groups: the groups by their longest row, each as it was.
    whole = random_rollout(0, advantages_per_token=False)
    rollout = Rollout.concatenate([whole, whole.select(slice(0, 12 - len(whole)))], PAD).select(slice(0, 6))
    parts = list(rollout.split(4, group=2))
    assert [len(part) for part in parts] == [4, 2]
    got = [row for part in parts for row in as_rows(part)]
    pairs = [tuple(got[i : i + 2]) for i in (0, 2, 4)]
    expected = as_rows(rollout)
    assert sorted(pairs) == sorted(tuple(expected[i : i + 2]) for i in (0, 2, 4))
    longest = [max(len(row[0]) for row in pair) for pair in pairs]
    assert longest == sorted(longest)
    for size, rows in ((3, 6), (4, 5)):
        with pytest.raises(ValueError, match="cannot keep groups of 2 together"):
            list(rollout.select(slice(0, rows)).split(size, group=2))


def test_split_without_padding_balances_tokens():
    # Prompts of one token, answers of 1 to 9: the heaviest row first, each goes to the lighter part.
    answers = [3, 9, 1, 8, 1, 7]
    ids, one = torch.arange(60).view(6, 10), torch.ones(6, dtype=torch.long)
    rollout = Rollout(Sequences(ids, one, torch.tensor(answers)), torch.tensor(answers).float())
    parts = list(rollout.split(3, packed=True))
    # 10 | 9, then 10 | 17, 14 | 17, 16 | 17, 18 | 17 tokens
    assert [part.rewards.tolist() for part in parts] == [[9, 3, 1, 1], [8, 7]]
    assert [part.sequences.tokens for part in parts] == [18, 17]
    for part in parts:
        known = part.sequences.counts
        del part.sequences.__dict__["counts"]
        assert part.sequences.counts == known  # what was not read is what would have been
    # Groups of two, (3, 9), (1, 8), (1, 7), of 14, 11 and 10 tokens, stay together.
    parts = list(rollout.split(4, group=2, packed=True))
    assert [part.rewards.tolist() for part in parts] == [[3, 9], [1, 8, 1, 7]]


def test_only_the_answers_of_a_dialogue_are_learned():
    ids = torch.arange(12).view(2, 6)
    lengths = {"lengths": torch.tensor([6, 3]), "prompt_lengths": torch.tensor([2, 1])}
    loaded = SupervisedBatch(input_ids=ids, **lengths, weight=torch.ones(2))
    sequences = Sequences.from_batch(loaded)
    assert learned_mask(loaded, sequences).tolist() == [[True] * 4, [True, True, False, False]]
    loaded = replace(loaded, loss_mask=torch.tensor([[True, False, False, True], [True, True, True, True]]))
    # The mask's padding counts as little as the answer's.
    assert learned_mask(loaded, sequences).tolist() == [[True, False, False, True], [True, True, False, False]]
    assert sequences.answer_ids[learned_mask(loaded, sequences)].tolist() == [2, 5, 7, 8]


def test_select_then_concatenate_gives_the_rows_back():
    for seed in range(10):
        rollout = random_rollout(seed, advantages_per_token=seed % 2 == 0)
        order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(seed))
        joined = Rollout.concatenate([rollout.select(rows) for rows in order.split(2)], PAD)
        assert as_rows(joined) == [as_rows(rollout)[i] for i in order.tolist()]
        assert joined.values is None


@given(rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=9), data=st.data())
def test_balanced_parts_hold_each_row_once_and_about_as_many_tokens(rows, data):
    prompts, answers = (torch.tensor(lengths) for lengths in zip(*rows, strict=True))
    ids = torch.randint(0, 2, (len(rows), 18), generator=torch.Generator().manual_seed(len(rows)))
    sequences = Sequences(ids, prompts, answers)
    parts = data.draw(st.integers(1, len(rows)))
    together = data.draw(st.booleans())
    found = sequences.balanced(parts, together=together)
    assert len(found) == parts and all(found) and sorted(sum(found, [])) == list(range(len(rows)))
    sizes = [int(sequences.lengths[some].sum()) for some in found]
    groups = list(sequences.rows_of_prompts.values())
    if together and len(groups) >= parts:
        assert all(any(set(group) <= set(some) for some in found) for group in groups)
    else:
        groups = [[i] for i in range(len(rows))]
        longest = [int(sequences.lengths[some].max()) for some in found]
        assert longest == sorted(longest)
    largest = max(int(sequences.lengths[group].sum()) for group in groups)
    assert max(sizes) <= int(sequences.lengths.sum()) / parts + largest  # a part ends where its share does


def test_rows_of_prompts_tell_equal_prompts_from_longer_ones():
    ids = torch.tensor([[1, 2, 3], [1, 2, 9], [1, 2, 3], [1, 4, 0]])
    rows = Sequences(ids, torch.tensor([2, 2, 3, 1]), torch.tensor([1, 1, 0, 1]))
    assert rows.first_rows == [0, 0, 2, 3] and rows.rows_of_prompts == {0: [0, 1], 2: [2], 3: [3]}
    some = rows.select([2, 0])
    assert some.counts == [[3, 2], [0, 1]] and some.input_ids.tolist() == [[1, 2, 3]] * 2
