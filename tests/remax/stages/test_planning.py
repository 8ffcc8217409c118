"""Which flag reaches the planner, and what step 3 refuses before it loads anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remax.cli.flags import Step3Arguments
from remax.cli.validate import parse_step1, parse_step2, parse_step3
from remax.core.sampling import Sampling
from remax.planning.phases import plan
from remax.planning.states import Machine
from remax.stages import planning, rlhf
from remax.stages.planning import finetuning_job, fit_to_memory, job_of
from utils.run import UserError


@pytest.fixture(scope="module")
def arguments(tiny_model, tiny_reward_model, corpus):
    """arguments(flags): those of step 3 on tiny models."""
    models = ["--actor_model_name_or_path", str(tiny_model("llama")), "--data_path", str(corpus)]
    models += ["--reward_model_name_or_path", str(tiny_reward_model("llama"))]
    sizes = "--per_device_generation_batch_size 8 --per_device_training_batch_size 4 --actor_dtype fp32"
    sizes += " --max_prompt_seq_len 32 --max_answer_seq_len 16 --per_device_eval_batch_size 5"

    def parse(flags: str = "") -> Step3Arguments:
        return parse_step3([*models, *sizes.split(), *flags.split()])

    return parse


def test_flags_reach_the_job(arguments):
    flags = "--algo rloo --samples_per_prompt 3 --generation_batches 2 --actor_zero_stage 2 --top_p 0.9 --enable_ema"
    flags += " --actor_gradient_checkpointing --offload --reference_zero_stage 3 --logprob_chunk_size 7"
    job = job_of(arguments(flags), Machine(4))
    rows = job.rows
    assert (rows.prompts, rows.samples, rows.greedy, rows.micro, rows.batches) == (8, 3, False, 4, 2)
    assert (rows.prompt, rows.answer, rows.evaluated, rows.chunk) == (32, 16, 5, 7)
    assert rows.sampling == rows.measured_in == Sampling(top_p=0.9)
    assert job.actor.engine.offload and job.actor.sketch.checkpointing and job.average
    assert job.reference.engine.zero_stage == 3 and len(job.rewards) == 1 and job.critic is None
    args = arguments()
    args.cuda_graphs = True  # which no command line on a CPU may say
    assert job_of(args, Machine(4)).cuda_graphs and not job.cuda_graphs
    assert not job_of(arguments(), Machine()).average
    assert job_of(arguments(), Machine()).rows.decoded == 16
    assert job_of(arguments("--logprobs_of model --top_p 0.9"), Machine()).rows.measured_in == Sampling()


def test_algorithms_hold_what_they_need(arguments):
    remax, ppo = (job_of(arguments(f"--algo {algo}"), Machine()) for algo in ("remax", "ppo"))
    assert remax.rows.greedy and not remax.old_logprobs and remax.critic is None
    assert ppo.critic is not None and ppo.old_logprobs and not ppo.rows.greedy
    full = job_of(arguments("--penalty full_kl_one_step"), Machine())
    assert full.full_kl and not remax.full_kl
    assert plan(full).of("update") > plan(remax).of("update")
    assert job_of(arguments("--entropy_coef 0.1"), Machine()).stats_grad
    raft, superhf, inpo = (job_of(arguments(f"--algo {algo}"), Machine()) for algo in ("raft", "superhf", "inpo"))
    assert (raft.rows.answers, raft.rows.learned, raft.rows.micro_batches) == (32, 8, 2)  # of 8 prompts, by 4 rows
    assert (inpo.rows.answers, inpo.rows.learned, inpo.old_logprobs) == (64, 16, True)
    assert superhf.full_kl and superhf.stats_grad and not raft.full_kl and not raft.old_logprobs
    assert remax.rows.learned == remax.rows.answers == 8


def test_shared_weights_are_held_once(arguments):
    lora = "--actor_lora_dim 4 --only_optimize_lora"
    apart, one = job_of(arguments(lora), Machine()), job_of(arguments(f"{lora} --share reference"), Machine())
    assert apart.reference is not None and one.reference is None
    weights = plan(apart).of("step") - plan(one).of("step")
    assert weights == pytest.approx(4 * apart.reference.size.parameters)
    assert one.actor.size.trained < one.actor.size.parameters / 4


def test_steps_1_and_2(tiny_model, corpus):
    same = ["--model_name_or_path", str(tiny_model("llama")), "--data_path", str(corpus), "--max_seq_len", "48"]
    same += ["--per_device_train_batch_size", "3", "--dtype", "fp32"]
    sft, reward, dpo = (
        finetuning_job(args, Machine())
        for args in (parse_step1(same), parse_step2(same), parse_step2([*same, "--loss", "dpo"]))
    )
    assert (sft.rows.micro, reward.rows.micro, sft.rows.tokens) == (3, 6, 48)
    assert reward.actor.sketch.scores and not sft.actor.sketch.scores
    assert sft.reference is None and dpo.reference is not None
    assert plan(sft).phases == ["update", "step", "evaluation"]


def test_what_clearly_does_not_fit_is_refused(arguments, monkeypatch):
    args = arguments()
    needs = int(plan(job_of(args, Machine())).peak)
    fit_to_memory(args, 1, None)  # no GPU
    fit_to_memory(args, 1, needs)
    fit_to_memory(args, 1, int(needs / 1.05))  # not clearly
    assert not args.notices
    with pytest.raises(UserError, match="memory: a GPU of 0 GiB does not hold the .*; use more GPUs, smaller batches"):
        fit_to_memory(args, 1, needs // 2)
    fit_to_memory(arguments("--skip_doctor"), 1, needs // 2)

    # With room for what a GPU needs beside, a way that spreads or recomputes more is named.
    monkeypatch.setattr("remax.planning.phases.CONTEXT", 0.0)
    monkeypatch.setattr("remax.planning.phases.FRAGMENTS", 0.0)
    with pytest.raises(UserError, match="; use --actor_zero_stage 2.*; `python -m remax.plan`"):
        fit_to_memory(args, 64, int(needs / 1.2))


def test_cuda_graphs_are_the_default_where_they_have_room(arguments):
    args = arguments()
    kept = plan(replace(job_of(args, Machine()), cuda_graphs=True))
    room = int(kept.peak + kept.allowance) + 1
    for flags, memory, expected in (
        ("", None, False),  # no GPU
        ("", room, True),
        ("", room - 2**20, False),
        ("--cuda_graphs false", room, False),
        ("--actor_zero_stage 3", 2 * room, False),
    ):
        args = arguments(flags)
        fit_to_memory(args, 1, memory)
        assert args.cuda_graphs is expected, (flags, memory)
        assert [note[:30] for note in args.notices] == ["memory: no room for CUDA graph"] * (memory == room - 2**20)
    args = arguments()
    args.cuda_graphs = True  # which no command line on a CPU may say
    fit_to_memory(args, 1, room - 2**20)
    assert args.cuda_graphs


def test_models_that_cannot_be_counted_are_no_reason_to_stop(arguments, monkeypatch):
    def fails(*args, **options):
        raise NotImplementedError("an operator")

    args = arguments()
    monkeypatch.setattr(planning, "plan", fails)
    fit_to_memory(args, 1, 1)
    assert args.notices == ["memory: no estimate for these models (NotImplementedError: an operator)"]


def test_step_3_asks_before_it_reads_data_or_weights(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(rlhf, "init_distributed", lambda rank: None)
    monkeypatch.setattr(rlhf, "device_memory", lambda: 1000)
    with pytest.raises(UserError, match="memory: a GPU of 0 GiB"):
        rlhf.run_rlhf(arguments(f"--output_dir {tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()
