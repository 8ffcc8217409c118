"""Plain text: endless batches, every block once an epoch, in an order of its own."""

import json
from itertools import islice

import pytest

from utils.data.text import plain_text_batches


@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
def test_every_epoch_has_every_block_once_in_a_new_order(tokenizer, tmp_path, capsys):
    texts = [" ".join(f"{i} and {k}." for k in range(30)) for i in range(20)]  # no block is like another
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def read(seed: int, rank: int = 0, ranks: int = 1):
        options = {"block": 16, "batch_size": 4 // ranks, "cache_dir": str(tmp_path), "rank": rank, "world_size": ranks}
        path = str(tmp_path / "text.jsonl")
        return plain_text_batches(path, configuration=None, tokenizer=tokenizer, seed=seed, **options)

    def blocks(batches) -> list[tuple[int, ...]]:
        return [tuple(ids) for batch in batches for ids in batch.input_ids.tolist()]

    batches = read(0)
    told = capsys.readouterr().out.split()  # "...: 51 blocks of 16 tokens"
    epoch = int(told[-5]) // 4 * 4  # an incomplete step is left out
    first, second = (blocks(islice(batches, epoch // 4)) for _ in range(2))
    assert len(set(first)) == len(set(second)) == epoch > 12
    assert first != second and len(set(first) & set(second)) > epoch - 4
    assert blocks(islice(read(0), 3)) == first[:12] != blocks(islice(read(1), 3))
    half, rest = read(0), read(0)
    blocks(islice(half, epoch // 4 + 2))
    rest.load_state_dict(half.state_dict())
    assert blocks(islice(rest, 3)) == second[8:20]  # goes on in the second epoch
    shares = [blocks(islice(read(0, rank, 2), 3)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(first[:12])  # a step has the same blocks on any number of ranks
    assert all(batch.prompt_lengths.tolist() == [1] * 4 for batch in islice(read(0), 2))
