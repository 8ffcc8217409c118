"""Draws by inversion: put through all numbers of [0, 1), they have the law of `Sampling.apply`."""

from __future__ import annotations

import math

import pytest
import torch

from remax.core.sampling import Sampling
from remax.generation import sampler
from remax.generation.sampler import draw, mend, uniform_numbers

SAMPLINGS = [
    Sampling(),
    Sampling(0.6),
    Sampling(top_k=3),
    Sampling(top_k=100),
    Sampling(top_p=0.7),
    Sampling(top_p=1e-9),
    Sampling(1.4, top_p=0.8, top_k=5),
]
LOGITS = {
    "spread": [[2.0, -1.0, 0.5, 0.1, 3.0, -4.0, 1.2], [0.0, 0.3, 0.9, -0.2, -9.0, 0.4, 0.8]],
    "ties": [[1.0, 1.0, 1.0, 0.0, 2.0, 0.0, -1.0]],  # top_k = 3 keeps all three that are third
    "impossible ones": [[-math.inf, 0.0, -math.inf, 1.0, -math.inf, 0.5, -math.inf]],
    "one": [[0.0, 0.0, 900.0, 0.0, 0.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("candidates", [2, 128])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_the_law_is_that_of_the_replay(name, sampling, candidates, monkeypatch):
    # N numbers evenly spread over [0, 1): a token of probability p takes N p of them, to one at each of its two edges.
    monkeypatch.setattr(sampler, "CANDIDATES", candidates)
    n = 4000
    for row in torch.tensor(LOGITS[name]):
        ids, logprobs = draw(row.expand(n, -1), sampling, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
        p = sampling.apply(row[None].double(), row.argmax()[None]).softmax(-1)[0]
        if name == "ties" and sampling.top_p < 1.0:  # which of the ties top_p keeps is a matter of the sort
            p[:3], ids = p[:3].sort().values, ids.clone()
            counts = torch.bincount(ids, minlength=7)
            counts[:3] = counts[:3].sort().values
        else:
            counts = torch.bincount(ids, minlength=7)
            torch.testing.assert_close(logprobs.double(), p.log()[ids], atol=1e-6, rtol=1e-5)
        assert (counts - n * p).abs().max() <= 2, (counts, n * p)
        assert (counts[p == 0] == 0).all()


def test_the_last_number_and_the_rarest_words():
    # 1 - 2^-53 is the largest number below 1; 4000 words of e^-20 each stand behind a sum of almost 1, where float32
    # has steps of 6e-8.
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert draw(torch.tensor([[0.0, 5.0, -200.0]]), Sampling(), last)[0].item() == 1  # e^-205 is 0 in float32
    assert draw(torch.tensor([[-math.inf, 0.0, -math.inf]]), Sampling(), last * 0)[0].item() == 1
    rare, share = 4000, 4000 * math.exp(-20)
    logits = torch.cat([torch.zeros(1), torch.full((rare,), -20.0)])
    numbers = 1 / (1 + share) + share / (1 + share) * (torch.arange(rare, dtype=torch.float64) + 0.5) / rare
    ids, logprobs = draw(logits.expand(rare, -1), Sampling(), numbers)
    assert torch.equal(ids, torch.arange(1, rare + 1))
    assert logprobs[0].item() == pytest.approx(-20 - math.log1p(share))


def test_top_p_sorts_all_words_only_where_a_few_are_not_enough(monkeypatch):
    calls, nucleus = [], sampler._draw_of_nucleus

    def counted(logits, top_p, uniform, candidates):
        calls.append((len(logits), candidates))
        return nucleus(logits, top_p, uniform, candidates)

    monkeypatch.setattr(sampler, "_draw_of_nucleus", counted)
    peaked, flat = torch.arange(1000.0), torch.zeros(1000)
    ids, logprobs = draw(torch.stack([peaked, flat, peaked]), Sampling(top_p=0.9), torch.full((3,), 0.5).double())
    assert calls == [(3, sampler.CANDIDATES), (1, 1000)]
    assert ids[0] == ids[2] == 999 and logprobs[1].item() == pytest.approx(-math.log(900), abs=2e-3)


def test_logits_that_are_not_numbers_are_drawn_from_all_the_same():
    logits = mend(torch.tensor([[math.nan, math.nan, math.nan], [0.0, math.inf, 1.0], [0.0, -math.inf, math.nan]]))
    ids, _ = draw(logits, Sampling(), torch.tensor([0.9, 0.1, 0.9], dtype=torch.float64))
    assert ids.tolist() == [2, 1, 2]


def test_numbers_come_from_the_random_state():
    torch.manual_seed(4)
    first, again = uniform_numbers(2, 3, torch.device("cpu")), uniform_numbers(2, 3, torch.device("cpu"))
    torch.manual_seed(4)
    assert torch.equal(uniform_numbers(2, 3, torch.device("cpu")), first) and not torch.equal(first, again)
    assert first.dtype == torch.float64
