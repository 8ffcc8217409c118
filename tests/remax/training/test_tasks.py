"""The joint loss of both heads, written out by hand: its value, its gradient, and what it is a mean of."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from remax.core.logprobs import PolicyOutput
from remax.core.sequences import Sequences
from remax.engines.base import StepResult
from remax.models.hydra import HydraModel, load_hydra
from remax.training.finetune import optimizer_step
from remax.training.tasks import Hydra
from utils.data.batches import PairBatch
from utils.tokenizer import load_tokenizer

PROMPTS, CHOSEN, REJECTED = (3, 1, 4, 2, 5), (6, 2, 9, 1, 4), (4, 7, 3, 8, 1)  # tokens of five pairs
MARGINS = (0.5, 0.0, 1.0, 0.25, 0.75)


class Learner:
    """Both heads in one process, without an optimizer."""

    def __init__(self, model: HydraModel):
        self.model, self.engine = model, self

    def slots(self, sequences: Sequences) -> int:
        return sequences.input_ids.numel()

    def logprobs(self, sequences: Sequences, **options) -> PolicyOutput:
        return PolicyOutput(self.model(sequences, **options)[0])

    def score(self, sequences: Sequences) -> torch.Tensor:
        return self.model(sequences, head="score")

    def logprobs_and_scores(self, sequences: Sequences, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(sequences, head="both", rows=rows, chunks=2)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> StepResult:
        return StepResult(0.0, 0.0, False)


@pytest.fixture
def make_learner(make_policy):
    def make(family: str, **options) -> Learner:
        folder = str(make_policy(family))
        options = {"dtype": torch.float32, "tokenizer": load_tokenizer(folder), "new_head": True} | options
        torch.manual_seed(0)
        model = load_hydra(folder, "--model", **options).eval()
        with torch.no_grad():
            model.score_head.weight.mul_(20)  # so that scores differ
        return Learner(model)

    return make


def pairs(rows: range) -> PairBatch:
    """Some of five pairs of random tokens."""
    noise = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (14,), generator=noise).tolist() for _ in range(10)]
    prompts = [ids[k][: PROMPTS[k]] for k in range(5)]
    sides = {}
    for name, first, lengths in (("chosen", 0, CHOSEN), ("rejected", 5, REJECTED)):
        answers = [prompts[k] + ids[first + k][5:][: lengths[k]] for k in rows]
        width = max(map(len, answers))
        sides[f"{name}_ids"] = torch.tensor([answer + [0] * (width - len(answer)) for answer in answers])
        sides[f"{name}_lengths"] = torch.tensor([len(answer) for answer in answers])
    of_rows = {"prompt_lengths": [PROMPTS[k] for k in rows], "margin": [MARGINS[k] for k in rows]}
    return PairBatch(**sides, **{k: torch.tensor(v) for k, v in of_rows.items()}, weight=torch.ones(len(rows)))


def by_hand(learner: Learner, folder, batch: PairBatch, weight: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with plain transformers, row by row and without padding, over the whole vocabulary."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = learner.model.score_head.weight.detach().clone().requires_grad_()
    nll, tokens, ranking = torch.zeros(()), 0, torch.zeros(())
    for k in range(len(batch)):
        scores = []
        for ids, lengths in ((batch.chosen_ids, batch.chosen_lengths), (batch.rejected_ids, batch.rejected_lengths)):
            row = ids[k : k + 1, : lengths[k]]
            output = hf(row, output_hidden_states=True)
            scores.append((output.hidden_states[-1][0, -1] * head[0]).sum())
            if ids is batch.chosen_ids:
                start = int(batch.prompt_lengths[k])
                logits, targets = output.logits[0, start - 1 : -1], row[0, start:]
                nll = nll + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                tokens += len(targets)
        ranking = ranking - torch.nn.functional.logsigmoid(scores[0] - scores[1] - batch.margin[k])
    loss = nll / tokens + weight * ranking / len(batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in hf.named_parameters()} | {"score.weight": head.grad}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_loss_and_gradient_are_those_written_out_by_hand(family, packing, make_learner, make_policy):
    learner, batch = make_learner(family, packing=packing), pairs(range(5))
    expected, gradients = by_hand(learner, make_policy(family), batch, weight=0.3)
    task = Hydra(learner, [], ranking_weight=0.3, use_margin=True)
    assert task.count(batch) == {"tokens": 22, "pairs": 5}
    loss, _ = task.loss(batch, task.count(batch))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    found = {name: p.grad for name, p in learner.model.hf.named_parameters()}
    assert found.keys() == gradients.keys()
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm > 0.1 and gradients["score.weight"].norm() > 0.01
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-6 * norm, name


@pytest.mark.parametrize("cut", [[5], [2, 3], [1, 1, 1, 1, 1]])
def test_a_step_does_not_depend_on_how_its_rows_are_cut(cut, make_learner):
    # A mean of the micro-batches' means would weigh the one token of the fourth pair as the nine of the third.
    learner, starts = make_learner("llama"), [sum(cut[:k]) for k in range(len(cut))]
    task = Hydra(learner, [], ranking_weight=0.3, label_smoothing=0.1, centring=0.05)
    batches = [pairs(range(start, start + n)) for start, n in zip(starts, cut, strict=True)]
    figures = optimizer_step(task, batches)
    with torch.no_grad():
        whole, parts = task.loss(pairs(range(5)), {"tokens": 22, "pairs": 5})
        scores = learner.score(Sequences.from_pairs(pairs(range(5)))).chunk(2)
    assert figures["loss"] == pytest.approx(whole.item(), rel=1e-5)
    for name in ("cross_entropy", "ranking_loss"):
        assert figures[name] == pytest.approx(parts[name].total.item() / parts[name].count, rel=1e-5)
    assert figures["loss"] == pytest.approx(figures["cross_entropy"] + 0.3 * figures["ranking_loss"], rel=1e-5)
    assert figures["margin"] == pytest.approx((scores[0] - scores[1]).mean().item(), rel=1e-4)
    differences = zip(*(side.tolist() for side in scores), strict=True)
    losses = [
        0.9 * math.log1p(math.exp(r - c)) + 0.1 * math.log1p(math.exp(c - r)) + 0.05 * (c + r) ** 2
        for c, r in differences
    ]
    assert figures["ranking_loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    gradient = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
    again = make_learner("llama")
    task = Hydra(again, [], ranking_weight=0.3, label_smoothing=0.1, centring=0.05)
    optimizer_step(task, [pairs(range(5))])
    expected = torch.cat([p.grad.flatten() for p in again.model.parameters()])
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_held_out_pairs_are_read_by_both_heads(make_learner):
    learner = make_learner("llama")
    batches = [pairs(range(3)), pairs(range(3, 5))]
    figures = Hydra(learner, batches).evaluate()
    everything = pairs(range(5))
    with torch.no_grad():
        chosen = Sequences.from_batch(everything.of_chosen)
        nll = -(learner.logprobs(chosen).logprobs * chosen.answer_mask).sum().item() / 22
        scores = learner.score(Sequences.from_pairs(everything))
    assert figures["cross_entropy"] == pytest.approx(nll, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert figures["accuracy"] == (scores[:5] > scores[5:]).double().mean().item() == 0.8
    assert figures["score_mean"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert learner.model.training is False
