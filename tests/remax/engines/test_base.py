"""DeepSpeed at every ZeRO stage, on one and two ranks, against plain PyTorch with the whole batch in one process."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from remax.core.losses import ranking_losses, supervised_loss
from remax.core.sampling import Sampling
from remax.core.sequences import Sequences
from remax.engines.optimizer import optimizer_groups
from remax.models.hydra import load_hydra
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from utils.tokenizer import load_tokenizer

pytestmark = pytest.mark.ranks

ROWS, STEPS = 8, 3
RATE, EPSILON, DECAY = 3e-3, 1e-3, 0.1  # as worker.py


def plain_training(model: torch.nn.Module, loss_of, steps: int = STEPS, checkpoint: int | None = None) -> dict:
    """AdamW, gradients clipped to norm 1, cosine schedule with 2 warm-up steps of 10; loss_of(step) -> scalar."""
    optimizer = torch.optim.AdamW(optimizer_groups(model, DECAY), lr=RATE, betas=(0.9, 0.95), eps=EPSILON)
    schedule = get_scheduler("cosine", optimizer, 2, 10)
    figures = {"losses": [], "grad_norms": [], "learning_rates": []}
    model.train()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        figures["losses"].append(loss.item())
        figures["grad_norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        figures["learning_rates"].append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return figures | {"weights": {name: p.detach().clone() for name, p in model.hf.named_parameters()}}


def load(folder, loader=load_policy, **options):
    tokenizer = load_tokenizer(str(folder))
    return loader(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def plain(make_policy, make_scorer, save_rows, tmp_path_factory):
    """{model: figures of plain training}, and the checks that the worker must do to be compared with them."""
    files = [save_rows(seed, ROWS, 300) for seed in range(2)]
    rows = [Sequences(**torch.load(path)) for path in files]
    figures, models = {}, {}
    for family in ("llama", "gpt2"):
        models[family] = {"check": "train_policy", "model": str(make_policy(family)), "rows": files, "steps": STEPS}
        policy = load(make_policy(family))

        def policy_loss(step: int, policy=policy) -> torch.Tensor:
            sequences = rows[step % 2]
            return supervised_loss(policy(sequences)[0], sequences.answer_mask, int(sequences.answer_lengths.sum()))

        figures[family] = plain_training(policy, policy_loss)
    models["reward"] = {"check": "train_reward", "model": str(make_scorer("opt")), "rows": files, "steps": STEPS}
    scorer = load(make_scorer("opt"), load_reward_model)

    def reward_loss(step: int) -> torch.Tensor:
        scores = scorer(rows[step % 2])
        return ranking_losses(scores[0::2], scores[1::2]).mean()

    figures["reward"] = plain_training(scorer, reward_loss)
    torch.manual_seed(0)
    hydra, folder = load(make_policy("qwen2"), load_hydra, new_head=True), tmp_path_factory.mktemp("hydra")
    hydra.hf.save_pretrained(folder)
    load_tokenizer(str(make_policy("qwen2"))).save_pretrained(folder)
    models["hydra"] = {"check": "train_hydra", "model": str(folder), "rows": files, "steps": STEPS}

    def joint_loss(step: int) -> torch.Tensor:
        chosen, rejected = (rows[step % 2].select(torch.arange(side, ROWS, 2)) for side in (0, 1))
        likelihood = -hydra(chosen)[0][chosen.answer_mask].mean()
        scores = [hydra(side, head="score") for side in (chosen, rejected)]
        return likelihood + 0.3 * ranking_losses(*scores).mean()

    figures["hydra"] = plain_training(hydra, joint_loss)
    assert all(max(f["grad_norms"]) > 1.5 for f in figures.values())  # clipping acts
    return figures, models


def grid(models: dict, spreads: list[dict], micro_batch: int, **extra) -> list[dict]:
    checks = []
    for kind, check in models.items():
        for spread in spreads:
            name = "-".join([kind, *map(str, spread.values()), str(micro_batch)])
            rows = micro_batch // 2 if kind in ("reward", "hydra") else micro_batch
            checks.append(check | spread | extra | {"name": name, "micro_batch": max(rows, 1)})
    return checks


def compare(results: dict, folder, figures: dict, losses: float, norms: float, weights: float) -> None:
    """Relative tolerance of losses and gradient norms, absolute of the weights after the last step."""
    for name, result in results.items():
        expected = figures[name.split("-")[0]]
        assert result["losses"] == pytest.approx(expected["losses"], rel=losses), name
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=norms), name
        assert result["learning_rates"] == pytest.approx(expected["learning_rates"]), name
        state = torch.load(folder / f"{name}.pt")
        assert state.keys() == expected["weights"].keys(), name
        for key, weight in expected["weights"].items():
            difference = (state[key].float() - weight).abs().max().item()
            assert difference < weights, (name, key, difference)


STAGES = [{"zero_stage": stage} for stage in range(4)]
OFFLOAD = [{"zero_stage": stage, "offload": True} for stage in (1, 2, 3)]
OFFLOAD += [{"zero_stage": 3, "offload": True, "offload_parameters": True}]


def stage_checks(models: dict) -> list[dict]:
    """Several micro-batches before a step (on one rank 4 of 2 rows), and for one model all rows at once."""
    return grid(models, STAGES, micro_batch=2) + grid({"llama": models["llama"]}, STAGES, micro_batch=8)


@pytest.fixture(scope="module")
def two_ranks(plain, run_ranks):
    """Every number format at every stage, communication that overlaps, and packed rows, in one launch."""
    models = plain[1]
    packed = [{"zero_stage": stage, "packing": True} for stage in (2, 3)]
    half = [{"zero_stage": stage, "dtype": "bf16"} for stage in (1, 2, 3)]
    fp16 = [{"zero_stage": stage, "dtype": "fp16"} for stage in (1, 2, 3)]
    overlap = [{"zero_stage": stage, "overlap": True} for stage in (1, 2, 3)]
    checks = grid({kind: models[kind] for kind in ("llama", "reward")}, half, micro_batch=2)
    checks += grid({"llama": models["llama"]}, fp16, micro_batch=2)
    checks += grid({"reward": models["reward"]}, fp16[1:2], micro_batch=2)
    checks += grid({"overlap": models["llama"]}, overlap, micro_batch=2)
    common = {"check": "not_finite", "model": models["llama"]["model"], "rows": models["llama"]["rows"][0]}
    sums = common | {"check": "add_up", "times": 128, "micro_batch": 2}
    checks += [sums | spread | {"name": f"sum-{spread['zero_stage']}"} for spread in half]
    broken = [{"zero_stage": stage} for stage in range(4)] + half + fp16[2:]
    checks += [
        common | spread | {"name": "-".join(["broken", *map(str, spread.values())]), "micro_batch": 2}
        for spread in broken
    ]
    return run_ranks(stage_checks(models) + grid(models, packed, micro_batch=4) + checks, 2, timeout=600)


def test_every_stage_equals_plain_torch_on_one_rank(plain, run_ranks):
    figures, models = plain
    results, folder = run_ranks(stage_checks(models), 1)
    assert len(results) == 20
    compare(results, folder, figures, losses=1e-5, norms=1e-5, weights=1e-5)


def test_every_stage_equals_plain_torch_on_two_ranks(plain, two_ranks):
    results, folder = two_ranks
    others = ("bf16", "fp16", "overlap", "broken", "sum")
    exact = {name: result for name, result in results.items() if not any(other in name for other in others)}
    assert len(exact) == 20 + 8  # padded, packed
    compare(exact, folder, plain[0], losses=1e-5, norms=1e-5, weights=1e-5)


def test_bf16_is_close(plain, two_ranks):
    results, folder = two_ranks
    half = {name: result for name, result in results.items() if "bf16" in name and "broken" not in name}
    assert len(half) == 6
    rotary = {name: result["buffers"] for name, result in half.items() if name.startswith("llama")}
    assert set(map(tuple, rotary.values())) == {("torch.float32",)}  # rounded frequencies would misplace far tokens
    for kind, losses in (("llama", 1e-2), ("reward", 5e-2)):  # a difference of two scores is less exact
        some = {name: result for name, result in half.items() if name.startswith(kind)}
        compare(some, folder, plain[0], losses=losses, norms=6e-2, weights=1e-2)


def test_gradients_of_16_bits_are_added_up_in_float32(two_ranks):
    # 128 g; in bfloat16 the sum of 65 g and g is 65.5 g or 66 g.
    for stage in (1, 2, 3):
        once, many = two_ranks[0][f"sum-{stage}"]["norms"]
        assert many == pytest.approx(128 * once, rel=1e-4), stage


def test_fp16_is_close(plain, two_ranks):
    # The loss is scaled, and the gradient is scaled back: were it one of the two alone, norms or weights would tell.
    results, folder = two_ranks
    half = {name: result for name, result in results.items() if "fp16" in name and "broken" not in name}
    assert len(half) == 4
    for name, result in half.items():
        scales = result["scales"]  # after each step, skipped ones included
        assert any(result["skipped"]) and scales == sorted(scales, reverse=True), name  # 2^16 is too much here
        assert 2**12 <= scales[-1] < 2**16, name
    compare(half, folder, plain[0], losses=5e-3, norms=5e-3, weights=2e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overlapping_communication_changes_no_bit(stage, two_ranks):
    _, folder = two_ranks
    overlapping, in_turn = (torch.load(folder / f"{name}-2.pt") for name in (f"overlap-{stage}-True", f"llama-{stage}"))
    assert all(torch.equal(overlapping[key], weight) for key, weight in in_turn.items())


def test_a_step_without_a_finite_gradient_is_skipped(plain, two_ranks):
    results, folder = two_ranks
    broken = {name: result for name, result in results.items() if "broken" in name}
    assert len(broken) == 8
    for name, result in broken.items():
        skipped, other = result["skipped"]
        assert skipped == other and skipped[1], name
        assert "fp16" in name or skipped == [False, True, False, False], name  # fp16 is looking for its scale
        state = torch.load(folder / f"{name}.pt")
        assert all(weight.isfinite().all() for weight in state.values()), name
        assert result["finite"] == [not skip for skip in skipped], name
    same = torch.load(folder / "broken-0.pt")  # three ordinary steps; the schedule waits meanwhile, at every stage
    for stage in (1, 2, 3):
        state = torch.load(folder / f"broken-{stage}.pt")
        assert all((state[key] - weight).abs().max() < 1e-5 for key, weight in same.items()), stage


@pytest.mark.compiled
@pytest.mark.parametrize("ranks", [1, 2])
def test_offload_equals_plain_torch(ranks, plain, run_ranks):
    # Optimizer states, and at stage 3 parameters, in CPU memory. The first use compiles for minutes.
    figures, models = plain
    others = {kind: check for kind, check in models.items() if kind != "hydra"}
    checks = grid(others, OFFLOAD, micro_batch=2) + grid({"llama": models["llama"]}, OFFLOAD[1:2], micro_batch=8)
    results, folder = run_ranks(checks, ranks, timeout=900)
    compare(results, folder, figures, losses=1e-5, norms=1e-5, weights=1e-5)


# --- ZeRO-3: generation, frozen models


EOS_AT = 3  # greedy answers of the first prompt end after so many tokens
PROMPTS = {"input_ids": [[1, 1, 70, 80], [1, 90, 100, 110], [60, 61, 62, 63], [1, 1, 1, 64]], "lengths": [2, 3, 4, 1]}


@torch.no_grad()
def plain_greedy(hf, prompts: dict, eos_ids: list[int], max_new_tokens: int) -> list[list[int]]:
    """Each row alone, without cache or padding; prompt and answer."""
    texts = []
    for ids, length in zip(prompts["input_ids"], prompts["lengths"], strict=True):
        row, answer = ids[-length:], []
        while len(answer) < max_new_tokens and (not answer or answer[-1] not in eos_ids):
            answer.append(int(hf(torch.tensor([row + answer])).logits[0, -1].argmax()))
        texts.append(row + answer)
    return texts


@pytest.fixture(scope="module")
def zero3(make_policy, make_scorer, save_rows, run_ranks):
    """Everything that two ranks do with ZeRO-3 besides plain training, in one launch."""
    model, rows = load(make_policy("llama")).eval(), save_rows(3, ROWS, 300)
    # An end token that some rank's answers reach much earlier than the other's.
    free = plain_greedy(model.hf, PROMPTS, [], 16)
    eos_ids = [2, free[0][PROMPTS["lengths"][0] + EOS_AT - 1], free[2][PROMPTS["lengths"][2] + EOS_AT - 1]]
    common = {"model": str(make_policy("llama")), "rows": rows}
    decode = common | {"check": "generate", "prompts": PROMPTS, "eos_ids": eos_ids, "max_new_tokens": 16}
    score = common | {"check": "frozen", "scorer": str(make_scorer("llama"))}
    checks = [
        decode | {"name": "gathered", "gather": True, "zero_stage": 3, "micro_batch": 4},
        decode | {"name": "in step", "gather": False, "zero_stage": 3, "micro_batch": 4},
        decode | {"name": "plain stage", "gather": True, "zero_stage": 2, "micro_batch": 4},
        score | {"name": "frozen", "zero_stage": 3, "sampling": [1.0, 1.0, 0], "chunk_size": 1024},
        score | {"name": "frozen, small chunks", "zero_stage": 3, "sampling": [0.7, 0.9, 0], "chunk_size": 4},
        score
        | {
            "name": "frozen, offload",
            "zero_stage": 3,
            "sampling": [1.0, 1.0, 0],
            "chunk_size": 9,
            "offload_parameters": True,
        },
        score | {"name": "frozen, no ZeRO", "zero_stage": 0, "sampling": [0.7, 0.9, 0], "chunk_size": 4},
    ]
    results, folder = run_ranks(checks, 2)
    return results, folder, common, eos_ids


@pytest.mark.parametrize("way", ["gathered", "in step", "plain stage"])
def test_generation_and_training_in_turn(way, zero3, make_policy):
    results, folder, common, eos_ids = zero3
    result, model = results[way], load(make_policy("llama")).eval()
    expected = plain_greedy(model.hf, PROMPTS, eos_ids, 16)
    lengths = [len(text) - n for text, n in zip(expected, PROMPTS["lengths"], strict=True)]
    # Rank 0 has prompts 0 and 2, rank 1 the others: with ZeRO-3 the ranks must not wait for each other for ever.
    assert max(lengths[0], lengths[2]) <= EOS_AT and min(max(lengths[1], lengths[3]), 16) > EOS_AT
    assert result["before"] == expected
    rows = Sequences(**torch.load(common["rows"]))

    def loss_of(step: int) -> torch.Tensor:
        return supervised_loss(model(rows)[0], rows.answer_mask, int(rows.answer_lengths.sum()))

    figures = plain_training(model, loss_of)
    assert result["losses"] == pytest.approx(figures["losses"], rel=1e-5)
    state = torch.load(folder / f"{way}.pt")
    for name, weight in figures["weights"].items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-5)
    assert result["training"]  # evaluation mode ended with the decode
    assert result["after"] == plain_greedy(model.eval().hf, PROMPTS, eos_ids, 16)
    assert ("ZeRO-3" in result["backend"]) == (way != "plain stage")


@pytest.mark.parametrize("case", ["frozen", "frozen, small chunks", "frozen, offload", "frozen, no ZeRO"])
@torch.no_grad()
def test_frozen_models_give_the_plain_models_numbers(case, zero3, make_policy, make_scorer):
    results, _, common, _ = zero3
    sampling = Sampling() if case in ("frozen", "frozen, offload") else Sampling(0.7, 0.9)
    rows = Sequences(**torch.load(common["rows"]))
    reference, scorer = load(make_policy("llama")).eval(), load(make_scorer("llama"), load_reward_model).eval()
    policy = load(make_policy("llama")).eval()
    for parameter in policy.parameters():
        parameter.mul_(1.05)
    table = results[case]["rows"]
    assert sorted(map(int, table)) == [i for i in range(ROWS) if i != 6]  # rank 0 left its last row out
    for i in map(int, table):
        start, length = int(rows.prompt_lengths[i]), int(rows.lengths[i])
        n, ids, got = length - start, rows.input_ids[i, :length], table[str(i)]
        logq = (reference.hf(ids[None]).logits[0, start - 1 : -1] / sampling.temperature).log_softmax(-1)  # (n, V)
        logits = policy.hf(ids[None]).logits[0, start - 1 : -1]
        logp = sampling.apply(logits, ids[start:]).log_softmax(-1)
        drawn = torch.arange(n), ids[start:]
        assert got["reference_logprobs"][:n] == pytest.approx(logq[drawn].tolist(), abs=1e-4)
        assert got["logprobs"][:n] == pytest.approx(logp[drawn].tolist(), abs=1e-4)
        kl = (logp.exp() * (logp - logq)).nan_to_num(0.0).sum(-1)
        assert got["full_kl"][:n] == pytest.approx(kl.tolist(), abs=1e-4)
        assert got["scores"] == pytest.approx(scorer.hf(ids[None]).logits.item(), abs=1e-4)
