"""The same answers give the same update however they are cut: micro-batches, ranks, ZeRO stages, offload, gradient
checkpointing, order, padding, rollouts per step. And the loop round it: cadence, best model, early stop."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from remax.algorithms import build_algorithm
from remax.algorithms.kl import KLPenalty
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences
from remax.core.sums import reduce
from remax.engines.base import StepResult
from remax.evaluation.policy import PolicyEvaluation
from remax.training.loop import Cadence, TrainState
from remax.training.trainer import Timer, Trainer, TrainerSettings
from utils.data.batches import SupervisedBatch
from utils.run import TrainingStopped

ROWS = 8
ALGORITHMS = {
    "remax": {},
    "full_kl": {"algorithm": {"name": "remax", "penalty": {"penalty": "full_kl_full_step"}, "entropy_coef": 0.1}},
    "ppo": {"algorithm": {"name": "ppo"}, "mini_batches": 2},
    "text": {"sampling": [0.7, 0.9, 0]},  # plain text mixed in, log-probs of answers as they are sampled
}


@pytest.fixture(scope="module")
def saved(make_policy, make_scorer, sequences_of, save_rows, tmp_path_factory):
    """Two rollouts of 8 answers and the models, as the worker takes them."""
    folder, paths = tmp_path_factory.mktemp("rollouts"), []
    for seed in range(2):
        sequences = sequences_of(seed, ROWS, 300)
        noise = torch.Generator().manual_seed(seed)
        mask = sequences.answer_mask
        rollout = {
            "sequences": {f.name: getattr(sequences, f.name) for f in dataclasses.fields(sequences)},
            "rewards": 2 * torch.randn(ROWS, generator=noise),
            "baseline": torch.randn(ROWS, generator=noise),
            "reference_logprobs": (-6 + torch.randn(mask.shape, generator=noise)) * mask,
        }
        paths.append(str(folder / f"{seed}.pt"))
        torch.save(rollout, paths[-1])
    common = {"check": "trainer_update", "model": str(make_policy("llama")), "rollouts": paths}
    critic = {"model": str(make_scorer("llama")), "zero_stage": 1, "gradient_checkpointing": False}
    extra = {"ppo": {"critic": critic}, "text": {"texts": [save_rows(seed, ROWS, 300) for seed in (20, 21)]}}
    return {name: common | settings | extra.get(name, {}) for name, settings in ALGORITHMS.items()}


def checks_of(saved: dict, variations: dict[str, dict], algorithm: str = "remax") -> list[dict]:
    return [saved[algorithm] | {"name": f"{algorithm}-{name}"} | settings for name, settings in variations.items()]


@pytest.fixture(scope="module")
def expected(saved, run_ranks):
    """Every algorithm on one rank with all rows in one micro-batch, no ZeRO."""
    whole = {"whole": {"micro_batch": ROWS}}
    single = {
        "2x4": {"micro_batch": 4},
        "8x1": {"micro_batch": 1},
        "3, 3, 2": {"micro_batch": 3},
        "order": {"micro_batch": 3, "order": [5, 2, 7, 0, 1, 6, 4, 3]},
        "padded": {"micro_batch": 4, "extra_columns": 9},
        "two rollouts a step": {"micro_batch": 4, "rollouts_per_step": 2},
        "checkpointing": {"micro_batch": 4, "gradient_checkpointing": True},
    }
    checks = [check for algorithm in ALGORITHMS for check in checks_of(saved, whole, algorithm)]
    checks += checks_of(saved, single) + checks_of(saved, {"8x1": single["8x1"]}, "full_kl")
    checks += checks_of(saved, {"2x4": single["2x4"]}, "ppo") + checks_of(saved, {"2x4": single["2x4"]}, "text")
    first = {"rollouts": saved["ppo"]["rollouts"][:1]}
    checks += checks_of(saved, {"one rollout": first, "critic alone": first | {"critic_warmup_steps": 1}}, "ppo")
    return run_ranks(checks, 1)


def same_update(name: str, results: dict, folder, expected: tuple[dict, object]) -> None:
    """Weights after two steps to 1e-6, and all figures that the step reports."""
    algorithm = name.split("-")[0]
    reference, reference_folder = expected
    reference_name = f"{algorithm}-whole"
    for suffix in ("", "-critic")[: 1 + (algorithm == "ppo")]:
        got = torch.load(folder / f"{name}{suffix}.pt")
        wanted = torch.load(reference_folder / f"{reference_name}{suffix}.pt")
        assert got.keys() == wanted.keys()
        differences = {key: (got[key] - wanted[key]).abs().max().item() for key in wanted}
        assert max(differences.values()) < 1e-6, (name, max(differences.items(), key=lambda item: item[1]))
    for got, wanted in zip(results[name]["figures"], reference[reference_name]["figures"], strict=True):
        assert got.keys() == wanted.keys()
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5), name


@pytest.mark.ranks
def test_a_critic_that_learns_alone_learns_the_same_and_the_policy_stays(expected, saved):
    # Of the same answers: the critic's update does not depend on the policy's, which follows them.
    results, folder = expected
    alone, together, twice = (
        torch.load(folder / f"ppo-{name}-critic.pt") for name in ("critic alone", "one rollout", "whole")
    )
    assert all(torch.equal(alone[name], together[name]) for name in together)
    assert any(not torch.equal(twice[name], together[name]) for name in together)  # it does learn
    stayed, moved = (torch.load(folder / f"ppo-{name}.pt") for name in ("critic alone", "one rollout"))
    start = load_file(Path(saved["ppo"]["model"]) / "model.safetensors")
    assert start.keys() <= stayed.keys() and all(torch.equal(stayed[name], start[name]) for name in start)
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    (figures,), (usual,) = (results[f"ppo-{name}"]["figures"] for name in ("critic alone", "one rollout"))
    assert figures.keys() == usual.keys() and figures["lr"] > 0
    assert figures["value_loss"] == pytest.approx(usual["value_loss"])


@pytest.mark.ranks
def test_micro_batches_order_and_padding(expected, make_policy):
    results, folder = expected
    for name in set(results) - {"ppo-one rollout", "ppo-critic alone"}:
        same_update(name, results, folder, expected)
    after, before = torch.load(folder / "remax-whole.pt"), load_file(make_policy("llama") / "model.safetensors")
    assert max((after[key] - before[key]).abs().max().item() for key in after) > 1e-3  # the weights did move


SHARED = "--actor_lora_dim 4 --only_optimize_lora --actor_lora_learning_rate 2e-2 --num_warmup_steps 0"
SHARED += " --max_prompt_seq_len 48 --max_answer_seq_len 8 --per_device_training_batch_size 2"
SHARED += " --per_device_generation_batch_size 2 --gradient_clipping 0"
SHARED_PPO = " --algo ppo --critic_lora_dim 3 --critic_learning_rate 1e-2"


def sharing_checks(make_two_headed) -> list[dict]:
    """Short trainings by their flags, with separate copies of the same weights and with shared ones."""
    both, scorer = make_two_headed("llama")
    checks = []
    for stage in (0, 2, 3):
        for algorithm in ("", SHARED_PPO):
            for share in ("none", "reference", "all"):
                line = (
                    f"--actor_model_name_or_path {both} {SHARED} --actor_zero_stage {stage} --share {share}{algorithm}"
                )
                line += "" if share == "all" else f" --reward_model_name_or_path {scorer}"
                line += " --actor_gradient_checkpointing" if share == "all" else ""
                name = f"share {stage} {'ppo' if algorithm else 'remax'} {share}"
                prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15]]
                check = {"check": "training_by_flags", "name": name, "flags": line.split(), "prompts": prompts}
                checks.append(check | {"steps": 2})
    return checks


@pytest.fixture(scope="module")
def two_ranks(saved, run_ranks, make_two_headed):
    """What two ranks do, in one launch."""
    variations = {f"stage {stage}": {"micro_batch": 2, "zero_stage": stage} for stage in range(4)}
    variations |= {f"stage {stage}, 1x4": {"micro_batch": 4, "zero_stage": stage} for stage in (1, 3)}
    variations["stage 3, all"] = {
        "micro_batch": 1,
        "zero_stage": 3,
        "gradient_checkpointing": True,
        "order": [3, 1, 2, 0, 7, 6, 5, 4],
        "extra_columns": 5,
        "rollouts_per_step": 2,
    }
    checks = checks_of(saved, variations)
    some = {name: variations[name] for name in ("stage 2", "stage 3")}
    checks += checks_of(saved, some, "full_kl") + checks_of(saved, some, "text") + checks_of(saved, some, "ppo")
    checks[-1]["critic"] = checks[-1]["critic"] | {"zero_stage": 3}
    return run_ranks(checks + sharing_checks(make_two_headed), 2)


@pytest.mark.ranks
def test_ranks_and_stages(two_ranks, expected):
    results, folder = two_ranks
    updates = [name for name in results if not name.startswith("share")]
    assert len(updates) == 13
    for name in updates:
        same_update(name, results, folder, expected)


@pytest.mark.ranks
@pytest.mark.parametrize("algorithm", ["remax", "ppo"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_shared_weights_learn_what_separate_copies_learn_on_two_ranks(stage, algorithm, two_ranks):
    results, folder = two_ranks
    separate, *shared = (f"share {stage} {algorithm} {share}" for share in ("none", "reference", "all"))
    wanted = torch.load(folder / f"{separate}.pt")
    assert max(x.abs().max().item() for name, x in wanted.items() if ".lora_B." in name) > 1e-2
    for name, engines in zip(shared, (1 + (algorithm == "ppo"), 1), strict=True):
        found = torch.load(folder / f"{name}.pt")
        assert found.keys() == wanted.keys()
        assert max((found[key] - x).abs().max().item() for key, x in wanted.items()) < 1e-6, name
        figures = [results[x]["figures"] for x in (name, separate)]
        for of_step in zip(*figures, strict=True):
            kept = [{k: v for k, v in x.items() if k != "grad_norm"} for x in of_step]  # ppo, all: of both
            assert kept[0] == pytest.approx(kept[1], rel=1e-4, abs=1e-5), name
        assert results[name]["engines"] == engines and results[name]["frozen"] and not results[name]["moved"]
        assert set(results[name]["active"]) == {None} or "reference" in name


@pytest.mark.ranks
@torch.no_grad()
def test_plain_text_is_learned_with_the_models_own_probabilities(saved, expected, make_policy):
    # Mean negative log-likelihood per token, though answers are drawn at another temperature and truncated.
    model = AutoModelForCausalLM.from_pretrained(make_policy("llama")).eval()
    rows, total = Sequences(**torch.load(saved["text"]["texts"][0])), 0.0
    for i in range(ROWS):
        start, length = int(rows.prompt_lengths[i]), int(rows.lengths[i])
        ids = rows.input_ids[i, :length]
        logp = model(ids[None]).logits[0].log_softmax(-1)
        total -= logp[torch.arange(start - 1, length - 1), ids[start:]].sum().item()
    figures = expected[0]["text-whole"]["figures"][0]
    assert figures["unsupervised_loss"] == pytest.approx(total / int(rows.answer_lengths.sum()), rel=1e-5)
    assert "unsupervised_loss" not in expected[0]["remax-whole"]["figures"][0]


@pytest.mark.ranks
@pytest.mark.compiled
def test_offload(saved, expected, run_ranks):
    variations = {
        f"stage {stage}": {"micro_batch": 2, "zero_stage": stage, "offload": True, "offload_parameters": stage == 3}
        for stage in (2, 3)
    }
    results, folder = run_ranks(checks_of(saved, variations), 2, timeout=900)
    for name in results:
        same_update(name, results, folder, expected)


@pytest.mark.parametrize(("rows", "micro_batch", "cut"), [(4, 16, [4]), (5, 2, [2, 2, 1]), (3, 1, [1, 1, 1])])
def test_plain_text_is_read_in_micro_batches(sequences_of, rows, micro_batch, cut):
    read, ends = [], []

    def logprobs(sequences: Sequences, sampling) -> SimpleNamespace:
        read.append(len(sequences))
        return SimpleNamespace(logprobs=-2.0 * sequences.answer_mask)

    actor = SimpleNamespace(logprobs=logprobs, backward=lambda loss, *, last: ends.append((float(loss), last)))
    settings = TrainerSettings(micro_batch_size=micro_batch, unsupervised_coefficient=0.5)
    trainer = SimpleNamespace(actor=actor, settings=settings)
    trainer.forwards = lambda batch: Trainer.forwards(trainer, batch)
    texts = sequences_of(0, rows, 300)
    lengths = {"lengths": texts.lengths, "prompt_lengths": texts.prompt_lengths}
    batch = SupervisedBatch(input_ids=texts.input_ids, **lengths, weight=torch.ones(rows))
    figures = Trainer.learn_plain_text(trainer, batch)
    assert read == cut and [end for _, end in ends] == [False] * (len(cut) - 1) + [True]
    assert sum(loss for loss, _ in ends) == pytest.approx(0.5 * 2)  # of the mean over all tokens, weighted
    assert reduce(figures)["unsupervised_loss"] == pytest.approx(2)


def test_figures_of_a_step_that_was_skipped(sequences_of):
    # The sentinel counts such steps; the norm is the one that was seen.
    answers = sequences_of(0, 4, 300)
    hf = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[5]))
    trainer = SimpleNamespace(
        actor=SimpleNamespace(model=SimpleNamespace(hf=hf)),
        algorithm=build_algorithm("remax"),
        settings=TrainerSettings(),
    )
    rollout, timer = Rollout(answers, torch.ones(4), advantages=torch.ones(4, 1)), Timer()
    timer.seconds, timer.tokens = {"update": 2.0}, 10
    for skipped in (False, True):
        result = StepResult(learning_rate=0.1, grad_norm=7.0, skipped=skipped, loss_scale=64.0 if skipped else None)
        figures = Trainer.summarise(trainer, rollout, {}, timer, result)
        assert figures.get("skipped") == (1.0 if skipped else None)
        assert figures.get("loss_scale") == (64.0 if skipped else None)
        assert (figures["grad_norm"], figures["lr"], figures["tokens"]) == (7.0, 0.1, 10.0)


# --- the loop


class Recorder:
    """A trainer's surroundings: evaluations with the given rewards and KLs, and a note of everything that is called."""

    def __init__(self, rewards: list[float], kls: list[float] | None = None):
        self.figures = iter(zip(rewards, kls or [0.0] * len(rewards), strict=True))
        self.steps, self.logged, self.evaluated = [], [], []

    def evaluate(self) -> PolicyEvaluation:
        reward, kl = next(self.figures)
        return PolicyEvaluation({"reward": reward, "kl": 10 * kl, "kl_per_token": kl})

    def log(self, step: int, values: dict, epoch: float) -> None:
        self.logged.append((step, epoch, *values))

    def on_evaluation(self, step: int, evaluation: PolicyEvaluation, best: bool) -> None:
        self.evaluated.append((step, evaluation.figures["reward"], best))


class Epochs(torch.utils.data.Sampler):
    """A loader's sampler that notes the epochs that it is told."""

    def __init__(self, rows: int, length: int | None = None):
        self.rows, self.length, self.epochs, self.resume_at = rows, length or rows, [], 0

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def state_dict(self) -> dict[str, int]:
        return {}

    def __iter__(self):
        return iter(range(self.rows))

    def __len__(self) -> int:
        return self.length


SPENT = ("run/seconds", "run/peak_memory_gib")
TIMES = tuple(f"train/{x}" for x in ("seconds_data", "seconds_rest", "seconds_per_step", "tokens_per_second"))
CADENCE = [f.name for f in dataclasses.fields(Cadence)]


def run_loop(
    recorder: Recorder, batches: int, length: int | None = None, sentinel=None, watchers=(), **settings
) -> tuple[dict, list[int]]:
    """Trainer.train on a loader of so many batches, its `step` replaced by a note of the batches."""

    class Loop(Trainer):
        def __post_init__(self):
            pass

        def step(self, batches):
            recorder.steps.append([int(x) for x in torch.cat(batches)])
            return None, {"loss": 0.5, "reward": 1.0, "grad_norm": 1.0, "tokens": 1.0}

    sampler = Epochs(batches, length)
    loader = torch.utils.data.DataLoader(torch.arange(batches), sampler=sampler)
    loop = Loop(
        actor=SimpleNamespace(backend="nothing", engine=SimpleNamespace(model=torch.nn.Linear(3, 2))),
        reference=None,
        reward=None,
        algorithm=build_algorithm("remax", kl=KLPenalty(0.2, reach="one_step")),
        settings=TrainerSettings(
            Cadence(**{name: settings.pop(name) for name in CADENCE if name in settings}), **settings
        ),
        measure=recorder.evaluate,
        metrics=recorder,
        pad_id=0,
        on_evaluation=recorder.on_evaluation,
        sentinel=sentinel,
        watchers=list(watchers),
    )
    return loop.train(loader).results, sampler.epochs


def test_evaluation_at_the_start_every_n_steps_and_at_the_end(capsys):
    recorder = Recorder([1.0, 0.5, 0.8, 0.7])
    results, epochs = run_loop(recorder, batches=4, epochs=2, evaluate_every=3)
    assert recorder.steps == [[0], [1], [2], [3]] * 2 and epochs == [0, 1]
    # The untrained policy scored most, so it stays the best.
    assert recorder.evaluated == [(0, 1.0, True), (3, 0.5, False), (6, 0.8, False), (8, 0.7, False)]
    assert results["before"]["reward"] == 1.0 == results["best"]["reward"] and results["after"]["reward"] == 0.7
    assert "reward 1 -> 0.7 (best: 1 at step 0)" in capsys.readouterr().out
    assert [line for line in recorder.logged if line[0] == 6] == [
        (6, 1.5, "train/loss", "train/reward", "train/grad_norm", *TIMES),
        (6, 1.5, "eval/reward", "eval/kl", "eval/kl_per_token", "eval/objective", *SPENT),
    ]
    assert recorder.logged[0][-4:] == (*SPENT, "run/parameters", "run/trained_share")


def test_once_per_epoch_by_default_and_several_batches_a_step():
    recorder = Recorder([0.0, 1.0, 2.0])
    run_loop(recorder, batches=5, epochs=2, batches_per_step=2)
    assert recorder.steps == [[0, 1], [2, 3], [4]] * 2  # the last step of an epoch may have fewer
    assert [step for step, *_ in recorder.evaluated] == [0, 3, 6]
    assert Cadence(epochs=2, batches_per_step=2).total_steps(5) == 6


def test_data_that_end_before_max_steps_end_the_loop(capsys):
    # A stream of four batches, which says that it has the nine of --max_steps.
    recorder = Recorder([0.0, 1.0, 2.0])
    results, epochs = run_loop(recorder, batches=4, length=9, epochs=2, max_steps=9, evaluate_every=5)
    assert recorder.steps == [[0], [1], [2], [3]] * 2 and epochs == [0, 1]
    assert recorder.evaluated == [(0, 0.0, True), (5, 1.0, True), (8, 2.0, True)]
    assert results["after"]["reward"] == results["best"]["reward"] == 2.0
    assert "8 steps in 0 s (of --max_steps 9: the data ended with --num_train_epochs 2" in capsys.readouterr().out


def test_max_steps_ends_the_loop_with_an_evaluation(capsys):
    recorder = Recorder([0.0, 1.0])
    run_loop(recorder, batches=4, epochs=3, max_steps=5, evaluate_every=100)
    assert len(recorder.steps) == 5 and [step for step, *_ in recorder.evaluated] == [0, 5]
    assert "5 steps in 0 s (--max_steps 5, of 12 with --num_train_epochs 3); reward 0 -> 1" in capsys.readouterr().out


def test_max_steps_alone_repeats_the_epochs():
    recorder = Recorder([0.0, 1.0, 2.0, 3.0])
    _, epochs = run_loop(recorder, batches=4, epochs=0, max_steps=9)
    assert recorder.steps == [[0], [1], [2], [3]] * 2 + [[0]] and epochs == [0, 1, 2]
    nothing = Recorder([0.0])
    run_loop(nothing, batches=0, length=9, epochs=0, max_steps=9)  # a stream without rows is not read for ever
    assert nothing.steps == []


def test_the_bound_that_comes_first_is_named(capsys):
    recorder = Recorder([0.0, 1.0])
    run_loop(recorder, batches=4, epochs=1, max_steps=60)
    printed = capsys.readouterr().out
    assert "4 steps: --num_train_epochs 1 ends before --max_steps 60" in printed.splitlines()[1]
    assert "4 steps in 0 s (--num_train_epochs 1 ends before --max_steps 60); reward 0 -> 1" in printed


def test_what_is_trained_is_said(capsys):
    run_loop(Recorder([0.0, 1.0]), batches=1)
    assert "actor: 8 parameters, of which 8 are trained (100.00%)" in capsys.readouterr().out


def test_a_start_without_a_number_gives_way():
    state = TrainState()
    assert state.record({"reward": math.nan}, "reward")
    state.step = 1
    assert state.record({"reward": -5.0}, "reward") and not state.record({"reward": math.nan}, "reward")
    assert state.best_step == 1


def test_a_lower_figure_may_be_the_better_one():
    state = TrainState()
    for state.step, perplexity in enumerate([9.0, 3.0, 4.0]):
        state.record({"perplexity": perplexity}, "perplexity", -1)
    assert state.course("perplexity") == "perplexity 9 -> 4 (best: 3 at step 1)"


def test_early_stop_on_the_evaluation_kl():
    recorder = Recorder([0.0, 1.0, 2.0, 3.0], kls=[0.0, 0.05, 0.2, 0.0])
    results, _ = run_loop(recorder, batches=4, evaluate_every=1, target_kl=0.1)
    assert len(recorder.steps) == 2 and results["after"]["reward"] == 2.0


def test_the_best_by_reward_minus_the_price_of_its_kl():
    # reward - 0.2 * KL per answer: 1 - 0.2 * 1 = 0.8, 3 - 0.2 * 12 = 0.6, 2 - 0.2 * 5 = 1.
    rewards, kls = [0.0, 1.0, 3.0, 2.0], [0.0, 0.1, 1.2, 0.5]
    recorder = Recorder(rewards, kls)
    results, _ = run_loop(recorder, batches=3, evaluate_every=1, best_by="objective")
    assert [best for *_, best in recorder.evaluated] == [True, True, False, True]
    assert results["best"]["objective"] == pytest.approx(1.0) and results["best"]["reward"] == 2.0
    recorder = Recorder(rewards, kls)
    results, _ = run_loop(recorder, batches=3, evaluate_every=1)
    assert [best for *_, best in recorder.evaluated] == [True, True, True, False]


class StopAt:
    """A sentinel that sees a fatal sign at one step."""

    def __init__(self, step: int):
        self.at, self.seen = step, []

    def __call__(self, step: int, rollout, figures: dict) -> dict:
        self.seen.append(step)
        return {"sign": float(step)}

    def stop_if_fatal(self, further: str = "") -> None:
        if self.at in self.seen:
            raise TrainingStopped(f"step {self.at}")


def test_the_sentinel_stops_the_training_after_the_log():
    recorder, sentinel = Recorder([0.0]), StopAt(2)
    with pytest.raises(TrainingStopped, match="step 2"):
        run_loop(recorder, batches=4, sentinel=sentinel)
    assert len(recorder.steps) == 2
    assert recorder.logged[-1] == (2, 0.5, "train/loss", "train/reward", "train/grad_norm", "train/sign", *TIMES)


def test_watchers_add_figures():
    recorder = Recorder([0.0, 1.0])
    run_loop(recorder, batches=1, watchers=[lambda step, rollout, figures: {"twice": 2 * figures["loss"]}])
    assert "train/twice" in recorder.logged[1]
