"""The loop of steps 1 and 2: what an optimizer step is a mean of, and when it evaluates, logs and stops."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from remax.core.batches import groups
from remax.core.logprobs import PolicyOutput
from remax.core.sequences import Sequences
from remax.engines.base import StepResult
from remax.models.reward_model import load_reward_model
from remax.training.finetune import (
    finetune,
    optimizer_step,
)
from remax.training.loop import Cadence
from remax.training.tasks import DirectPreference, Ranking, Supervised
from utils.data.batches import PairBatch, RankedBatch, SupervisedBatch
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.metrics import MetricsLogger
from utils.run import TrainingStopped, UserError
from utils.tokenizer import load_tokenizer


class Learner:
    """One weight w, trained by plain gradient descent; the log-prob of every token is w * id, the score w * last id."""

    def __init__(self, weight: float = 0.5, rate: float = 0.01):
        self.w, self.rate = torch.tensor(weight, requires_grad=True), rate
        self.model, self.lasts, self.training = torch.nn.Module(), [], None
        self.engine = self

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def slots(self, sequences: Sequences) -> int:
        return sequences.input_ids.numel()

    def logprobs(self, sequences: Sequences) -> PolicyOutput:
        return PolicyOutput(self.w * sequences.answer_ids)

    def score(self, sequences: Sequences) -> torch.Tensor:
        return self.w * sequences.input_ids[torch.arange(len(sequences)), sequences.end_index]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()
        self.lasts.append(last)

    def step(self) -> StepResult:
        gradient = self.w.grad.item()
        with torch.no_grad():
            self.w -= self.rate * self.w.grad
        self.w.grad = None
        return StepResult(self.rate, abs(gradient), False)


def supervised(ids: list[list[int]], prompt_lengths: list[int], lengths: list[int]) -> SupervisedBatch:
    tensors = {"input_ids": ids, "prompt_lengths": prompt_lengths, "lengths": lengths, "weight": [1.0] * len(ids)}
    return SupervisedBatch(**{name: torch.tensor(values) for name, values in tensors.items()})


BATCHES = [supervised([[9, 1, 2], [9, 9, 4]], [1, 2], [3, 3]), supervised([[9, 5, 7]], [1], [2])]


def learned(figures: dict[str, float]) -> dict[str, float]:
    """Without what every step reports of its tokens and time."""
    assert figures.keys() >= READING
    return {name: value for name, value in figures.items() if name not in READING}


READING = {"padding_share", "seconds_update", "tokens"}


def test_a_step_is_a_mean_over_the_answer_tokens_of_all_its_micro_batches():
    # Answers 1 2 / 4 / 5 (the prompt's 9s and the 7 behind the end do not count): mean of -w * id over 4 tokens is
    # -0.5 * 12 / 4, the gradient -12 / 4. A mean of the micro-batches' means would give (-7 / 3 - 5 / 1) / 2 instead.
    learner = Learner()
    figures = learned(optimizer_step(Supervised(learner, []), list(BATCHES)))
    assert figures == pytest.approx({"loss": -1.5, "grad_norm": 3.0, "lr": 0.01})
    assert learner.lasts == [False, True]
    assert learner.w.item() == pytest.approx(0.5 + 0.01 * 3)


def test_a_step_on_dialogues_is_a_mean_over_the_learned_tokens():
    # Of 1 2 / 4 / 5 only 2 and 5 are learned: mean of -w * id over these two.
    masks = [torch.tensor([[False, True], [False, False]]), torch.tensor([[True]])]
    batches = [replace(batch, loss_mask=mask) for batch, mask in zip(BATCHES, masks, strict=True)]
    assert [Supervised(Learner(), []).count(batch) for batch in batches] == [{"tokens": 1}] * 2
    figures = optimizer_step(Supervised(Learner(), []), batches)
    assert figures["loss"] == pytest.approx(-0.5 * (2 + 5) / 2) and figures["grad_norm"] == pytest.approx(3.5)


def pairs(chosen: list[int], rejected: list[int], margin: list[float] | None = None) -> PairBatch:
    """Answers of one token each behind a prompt of one."""
    n = torch.tensor([2] * len(chosen))
    lengths = {"prompt_lengths": n - 1, "chosen_lengths": n, "rejected_lengths": n}
    ids = {"chosen_ids": chosen, "rejected_ids": rejected}
    tensors = {name: torch.tensor([[9, i] for i in last]) for name, last in ids.items()}
    margins = None if margin is None else torch.tensor(margin)
    return PairBatch(**lengths, **tensors, weight=torch.ones(len(chosen)), margin=margins)


def test_margins_and_smoothing_act_where_they_are_asked_for():
    # One pair (4, 2) of difference d = 0.5 * 2 and margin 0.75.
    def loss(**options) -> float:
        return optimizer_step(Ranking(Learner(), [], **options), [pairs([4], [2], [0.75])])["loss"]

    def cost(d: float) -> float:
        return math.log1p(math.exp(-d))

    assert loss() == pytest.approx(cost(1.0))
    assert loss(use_margin=True) == pytest.approx(cost(0.25))
    assert loss(label_smoothing=0.1) == pytest.approx(0.9 * cost(1.0) + 0.1 * cost(-1.0))
    assert loss(centring=0.1) == pytest.approx(cost(1.0) + 0.1 * (0.5 * 6) ** 2)


def test_a_ranking_step_is_a_mean_over_pairs():
    # Pairs (4, 2), (3, 3), (1, 5) of last tokens, scores w times that: -log sigmoid(w * (c - r)).
    figures = optimizer_step(Ranking(Learner(), []), [pairs([4, 3], [2, 3]), pairs([1], [5])])
    losses = [math.log1p(math.exp(-0.5 * d)) for d in (2, 0, -4)]
    assert figures["loss"] == pytest.approx(sum(losses) / 3)
    assert figures["margin"] == pytest.approx(0.5 * (2 + 0 - 4) / 3)
    assert figures["accuracy"] == pytest.approx(1 / 3)  # a tie is no success


def rankings(ids: list[list[int]], ranks: list[list[int]]) -> RankedBatch:
    """Answers of one token each behind a prompt of one."""
    flat = torch.tensor([i for row in ids for i in row])
    return RankedBatch(
        input_ids=torch.stack([torch.full_like(flat, 9), flat], 1),
        prompt_lengths=torch.ones_like(flat),
        lengths=torch.full_like(flat, 2),
        row=torch.tensor([k for k, row in enumerate(ids) for _ in row]),
        ranks=torch.tensor([rank for row in ranks for rank in row]),
        weight=torch.ones(len(ids)),
    )


@pytest.mark.parametrize("loss", ["pairs", "plackett-luce"])
def test_a_ranked_step_is_a_mean_over_prompts(loss):
    # Scores w * id, w = 0.5. Three prompts: last tokens 4 > 2 > 1, 3 > 5 = 1, 2 > 6.
    batches = [rankings([[4, 2, 1], [3, 5, 1]], [[1, 2, 3], [1, 2, 2]]), rankings([[6, 2]], [[2, 1]])]
    figures = optimizer_step(Ranking(Learner(), [], ranked_loss=loss), batches)

    def lose(d: float) -> float:
        return math.log1p(math.exp(-0.5 * d))

    e = [math.exp(0.5 * i) for i in range(6)]
    expected = {
        "pairs": ((lose(2) + lose(3) + lose(1)) / 3 + (lose(-2) + lose(2)) / 2 + lose(-4)) / 3,
        "plackett-luce": (
            math.log((e[4] + e[2] + e[1]) / e[4]) + lose(1) + math.log((e[3] + e[5] + e[1]) / e[3]) + lose(-4)
        )
        / 3,
    }
    assert figures["loss"] == pytest.approx(expected[loss])
    assert figures["accuracy"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert figures["margin"] == pytest.approx(0.5 * ((2 + 3 + 1) / 3 + (-2 + 2) / 2 - 4) / 3)


def test_a_ranked_step_takes_the_options_of_pairs():
    # Scores 0.5 * id: tokens 4 > 2 > 1, so 2 > 1 > 0.5; differences 1, 1.5, 0.5 and sums 3, 2.5, 1.5.
    batches = [rankings([[4, 2, 1]], [[1, 2, 3]])]
    centre = 0.2 * (3**2 + 2.5**2 + 1.5**2) / 3

    def lose(d: float) -> float:
        return math.log1p(math.exp(-d))

    smooth = optimizer_step(Ranking(Learner(), [], label_smoothing=0.1, centring=0.2), batches)
    expected = sum(0.9 * lose(d) + 0.1 * lose(-d) for d in (1, 1.5, 0.5)) / 3
    assert smooth["loss"] == pytest.approx(expected + centre)
    listwise = optimizer_step(Ranking(Learner(), [], ranked_loss="plackett-luce", centring=0.2), batches)
    expected = math.log(1 + math.exp(-1) + math.exp(-1.5)) + lose(0.5)
    assert listwise["loss"] == pytest.approx(expected + centre)


class Trained:
    """A reward model in this process, trained by Adam."""

    def __init__(self, model: torch.nn.Module, rate: float):
        self.model, self.optimizer = model, torch.optim.Adam(model.parameters(), rate)
        self.engine = self

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def score(self, sequences: Sequences) -> torch.Tensor:
        return self.model(sequences)

    def slots(self, sequences: Sequences) -> int:
        return sequences.input_ids.numel()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> StepResult:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(0.0, 0.0, False)


@pytest.mark.parametrize("loss", ["pairs", "plackett-luce"])
def test_rankings_are_learned_from_a_file(loss, tmp_path, make_scorer):
    # The order is that of one word; the length of an answer is drawn and says nothing.
    draw, words = random.Random(0), ["superb", "good", "poor", "awful"]
    for split, count in (("train", 96), ("test", 48)):
        rows = []
        for i in range(count):
            answers = [f"It is {word}" + " indeed" * draw.randint(0, 3) for word in words]
            order = draw.sample(range(4), 4)
            row = {"answers": [answers[k] for k in order], "scores": [-k for k in order]}
            rows.append(json.dumps({"prompt": f"How is {split} number {i}?", **row}) + "\n")
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    folder = str(make_scorer("llama"))
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, "--model", dtype=torch.float32, tokenizer=tokenizer)
    config = DataConfig(data_path=[str(tmp_path)], cache_dir=str(tmp_path), data_split="0,1,0")
    sizes = {"max_len": 96, "train_batch_size": 4, "eval_batch_size": 16}
    train, held_out = build_loaders(config, stage=1, tokenizer=tokenizer, **sizes)
    task, metrics = Ranking(Trained(model, 2e-3), held_out, ranked_loss=loss), MetricsLogger(tmp_path)
    results = finetune(task, train, Cadence(epochs=3), metrics)
    metrics.close()
    before, after = results["before"], results["after"]
    assert before["best_of_k_chance"] == after["best_of_k_chance"] == 0.25
    assert abs(after["longer_wins"] - 0.5) < 0.1
    assert before["best_of_k_accuracy"] < 0.5 and after["best_of_k_accuracy"] > 0.9
    assert before["accuracy"] < 0.7 and after["accuracy"] > 0.9


class Fixed:
    """A reference under which every token has the log-prob -0.25 * id."""

    def logprobs(self, sequences: Sequences) -> torch.Tensor:
        return -0.25 * sequences.answer_ids


def test_a_step_of_direct_preference():
    # Chosen answer 1 2, rejected 4: log-ratios (w + 0.25) * 3 and (w + 0.25) * 4, w = 0.5, beta = 2:
    # -log sigmoid(2 * 0.75 * (3 - 4) + alpha * (2 - 1)); what stands behind the rejected answer does not count.
    chosen = {"chosen_ids": torch.tensor([[9, 1, 2]]), "chosen_lengths": torch.tensor([3])}
    rejected = {"rejected_ids": torch.tensor([[9, 4, 8]]), "rejected_lengths": torch.tensor([2])}
    batch = PairBatch(**chosen, **rejected, prompt_lengths=torch.tensor([1]), weight=torch.ones(1))
    for alpha in (0.0, 0.3):
        task = DirectPreference(Learner(), Fixed(), [batch], beta=2.0, alpha=alpha)
        figures = learned(optimizer_step(task, [batch, batch]))
        logit = 2 * 0.75 * (3 - 4) + alpha
        gradient = 2 * (4 - 3) / (1 + math.exp(logit))  # d loss / d w = -sigmoid(-logit) * beta * (3 - 4)
        assert figures == pytest.approx(
            {"loss": math.log1p(math.exp(-logit)), "accuracy": 0.0, "margin": -1.5, "grad_norm": gradient, "lr": 0.01}
        )
    held_out = DirectPreference(Learner(), Fixed(), [batch], beta=2.0).evaluate()
    assert (held_out["accuracy"], held_out["margin"], held_out["longer_wins"]) == pytest.approx((0.0, -1.5, 1.0))


def test_padding_is_told():
    def padding(task, batches) -> float:
        return optimizer_step(task, batches)["padding_share"]

    # Rows of 3 and 3 tokens in 2 * 3 slots, one of 2 in 1 * 3.
    assert padding(Supervised(Learner(), []), list(BATCHES)) == pytest.approx(1 - 8 / 9)
    # Chosen 3 and 4, rejected 2 and 1 tokens; the rejected rows are padded to the chosen ones' four columns.
    lengths = {"chosen_lengths": [3, 4], "rejected_lengths": [2, 1], "prompt_lengths": [1, 0]}
    ids = {"chosen_ids": torch.zeros(2, 4), "rejected_ids": torch.zeros(2, 2)}
    tensors = {name: torch.tensor(values) for name, values in lengths.items()}
    pairs = PairBatch(**ids, **tensors, weight=torch.ones(2))
    for task in (Ranking(Learner(), []), DirectPreference(Learner(), Fixed(), [])):
        assert padding(task, [pairs]) == pytest.approx(1 - 10 / 16)
    five = rankings([[4, 2, 1], [3, 5]], [[1, 2, 3], [1, 2]])  # answers of one token behind prompts of one
    assert padding(Ranking(Learner(), []), [five]) == 0.0


def test_steps():
    assert [list(groups(range(5), 2)), Cadence(batches_per_step=2).steps_per_epoch(5)] == [[[0, 1], [2, 3], [4]], 3]
    assert Cadence(epochs=2, batches_per_step=2).total_steps(5) == 6
    assert Cadence(epochs=2, batches_per_step=2, max_steps=4).total_steps(5) == 4
    assert Cadence(epochs=2, max_steps=400).total_steps(5) == 10


class Loader(list):
    """Batches with a sampler that notes its epochs."""

    def __init__(self, batches):
        super().__init__(batches)
        self.sampler, self.epochs, self.resume_at = self, [], 0

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def state_dict(self) -> dict[str, int]:
        return {}


class Noting(Supervised):
    """Evaluation counts its calls, and must happen in evaluation mode."""

    calls = 0

    def evaluate(self) -> dict[str, float]:
        assert self.learner.training is False
        self.calls += 1
        return {"loss": 1.0 / self.calls, "perplexity": 10.0 - self.calls}


def run(tmp_path, loader: Loader | None = None, **cadence) -> tuple[Noting, Loader, list[int], dict, list[dict]]:
    """-> task, loader, the steps of the evaluations after the first one, results, metrics."""
    task, loader = Noting(Learner(), []), loader if loader is not None else Loader(BATCHES * 2)
    metrics = MetricsLogger(tmp_path, drop_after=-1)
    results = finetune(task, loader, Cadence(**cadence), metrics)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return task, loader, [line["step"] for line in lines if "eval/loss" in line][1:], results, lines


def test_evaluation_before_at_each_epochs_end_and_after(tmp_path):
    task, loader, seen, results, lines = run(tmp_path, epochs=2, batches_per_step=3)
    assert loader.epochs == [0, 1] and seen == [2, 4] and task.calls == 3
    assert results == {"before": {"loss": 1.0, "perplexity": 9.0}, "after": {"loss": 1 / 3, "perplexity": 7.0}}
    assert [(line["step"], line["epoch"], "eval/loss" in line) for line in lines] == [
        (0, 0.0, True),
        (1, 0.5, False),
        (2, 1.0, False),
        (2, 1.0, True),
        (3, 1.5, False),
        (4, 2.0, False),
        (4, 2.0, True),
    ]
    assert task.learner.lasts == [False, False, True, True] * 2  # an epoch's last step has what is left


def test_evaluation_every_n_steps_and_max_steps(tmp_path):
    task, _, seen, _, lines = run(tmp_path, epochs=5, max_steps=7, evaluate_every=3)
    assert seen == [3, 6, 7]
    assert max(line["step"] for line in lines) == 7
    # The two batches in turn: 6 tokens in 6 slots, 2 in 3.
    shares = {line["step"]: line["train/padding_share"] for line in lines if "train/loss" in line}
    assert [shares[step] for step in (1, 2)] == pytest.approx([0.0, 1 / 3])


class Stream(Loader):
    """As long as the whole training, as far as anybody knows."""

    def __len__(self) -> int:
        return 9


def test_data_that_end_before_max_steps_end_the_training(tmp_path, capsys):
    # Two epochs of four batches; nobody knew it, so that the loop counts on 9 steps.
    _, loader, seen, results, _ = run(tmp_path, Stream(BATCHES * 2), epochs=2, max_steps=9, evaluate_every=5)
    assert sum(1 for _ in loader) == 4
    assert loader.epochs == [0, 1] and seen == [5, 8] and results["after"]["perplexity"] == 7.0
    assert "8 steps in" in (said := capsys.readouterr().out)
    assert "(of --max_steps 9: the data ended with --num_train_epochs 2, before" in said
    loader.epochs.clear()
    run(tmp_path, loader, epochs=3, max_steps=9)
    assert loader.epochs == [0, 1, 2] and "the data ended" not in capsys.readouterr().out


def test_a_faulty_row_of_a_stream_stops(tmp_path):
    # The stages write the model as it is on TrainingStopped; a UserError would lose it.
    class Faulty(Stream):
        def __iter__(self):
            yield from BATCHES
            raise UserError("--data_path x.jsonl, line 7: not valid JSON")

    metrics = MetricsLogger(tmp_path)
    with pytest.raises(TrainingStopped, match="cannot be read any further: --data_path x.jsonl, line 7"):
        finetune(Noting(Learner(), []), Faulty([]), Cadence(epochs=1, max_steps=9), metrics)
    metrics.close()
    seen = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen == [0, 1, 2]


def test_a_loss_that_is_not_finite_stops(tmp_path):
    task = Noting(Learner(weight=float("nan")), [])
    metrics = MetricsLogger(tmp_path)
    whose = r"\. Not finite: on rank 0 the loss of 2 rows, the first of which is '\[9\]'$"
    with pytest.raises(TrainingStopped, match=f"step 1: loss is nan .*learning rate{whose}"):
        finetune(task, Loader(BATCHES), Cadence(epochs=1), metrics)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["train/loss"] is None
