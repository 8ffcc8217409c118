"""Going on with a run: whose checkpoint it is, and what may be otherwise than it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remax.checkpoint.checkpoints import Checkpoints, Found, Saving
from remax.checkpoint.state import RunState
from remax.cli.flags import Step1Arguments, Step2Arguments, Step3Arguments
from remax.cli.parser import flags_of
from remax.cli.validate import parse_step1, parse_step3
from remax.stages import resume
from utils.run import UserError, start_run

# What decides which objective is optimised, on which rows, from which weights: a resume gives it as it was.
FIXED = """
    loss ranking_weight use_margin label_smoothing center_rewards_coefficient ranked_loss dpo_beta length_alpha train_on
    algo samples_per_prompt baseline baseline_decay gamma clip_reward_value clip_on loss_aggregation advantage_scaling
    entropy_coef unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef enable_ema log_variance
    penalty kl_ctl kl_in kl_estimator normalize_kl adaptive_kl adaptive_kl_target adaptive_kl_horizon
    ppo_epochs ppo_mini_batches cliprange cliprange_value lam critic_warmup_steps inpo_eta inpo_tau
    reward_fn normalize_reward
    temperature top_p top_k logprobs_of max_prompt_seq_len max_answer_seq_len max_greedy_seq_len max_seq_len
    lora_dim lora_module_name lora_alpha lora_dropout only_optimize_lora
    actor_lora_dim actor_lora_module_name actor_lora_alpha actor_lora_dropout
    share joint_critic critic_lora_dim dtype bf16 actor_dtype actor_bf16 reward_dtype reward_bf16 critic_dtype
    disable_dropout disable_actor_dropout disable_reward_dropout adam_beta1 adam_beta2 seed
    data_split data_seed streaming shuffle_buffer overlong chat_template prompt_column chosen_column rejected_column
""".split()


def test_every_flag_either_stays_or_may_differ():
    # A new flag wants a decision: is a run with another value of it still the same training?
    flags = {name for stage in (Step1Arguments, Step2Arguments, Step3Arguments) for name in flags_of(stage)}
    assert set(FIXED) | resume.MAY_DIFFER | (resume.OF_NO_INTEREST - {"notices"}) == flags
    assert not set(FIXED) & (resume.MAY_DIFFER | resume.OF_NO_INTEREST)


DATA = {
    "stage": 1,
    "order_seed": 5,
    "data": [{"data": "--data_path here", "split": "train", "fingerprint": "f1", "rows": 9}],
    "tokenizer": {"name": "here", "fingerprint": "t1"},
    "code": {"order": 1},
}


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch):
    """run(flags, data) -> (arguments, output): as a stage's program has them when its data was read."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "output"
    output.mkdir()

    def make(flags: str = "", data: dict = DATA):
        (output / "data.json").write_text(json.dumps(data))
        line = f"--model_name_or_path {tiny_model('llama')} --data_path {tmp_path} --output_dir {output} --resume auto"
        return parse_step1([*line.split(), *flags.split()]), output

    return make


def found(args, output: Path) -> Found:
    """A checkpoint as that run would have written it."""
    made_of = json.loads(json.dumps(resume.description(args, output)))
    return Found(output / "checkpoints" / "step_000004", {"step": 4, "made_of": made_of})


def notices(before: Found, args, output: Path) -> list[str]:
    return resume.differences(before, resume.description(args, output))


def test_the_same_run_goes_on_without_a_word(run):
    args, output = run()
    assert notices(found(args, output), args, output) == []


def test_what_only_says_how_is_listed(run):
    before = found(*run("--eval_steps 5"))
    listed = notices(before, *run("--zero_stage 2 --learning_rate 1e-6 --eval_steps 5 --save_steps 7"))
    assert [line for line in listed if "zero" in line] == ["goes on with --zero_stage 2, was 0"]
    assert {line.split()[3] for line in listed} == {"--zero_stage", "--learning_rate", "--save_steps"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 6", "was made with --seed 2023, not 6: that would be another training"),
        ("--max_seq_len 99", "--max_seq_len 512, not 99"),
        ("--lora_dim 4", "--lora_dim 0, not 4"),
    ],
)
def test_another_objective_is_refused(run, flags, words):
    before = found(*run())
    with pytest.raises(UserError, match=words):
        notices(before, *run(flags))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data", [{**DATA["data"][0], "fingerprint": "f2"}], "the rows of --data_path .* .fingerprint was f1, is f2"),
        ("tokenizer", {"name": "here", "fingerprint": "t2"}, "the tokenizer differs .* .fingerprint was t1, is t2"),
        ("code", {"order": 2}, "the code that reads data differs from what it was .order was 1, is 2"),
        ("order_seed", 6, "order_seed differs from what it was .was 5, is 6"),
    ],
)
def test_other_data_are_refused(run, key, value, words):
    before = found(*run())
    with pytest.raises(UserError, match=words):
        notices(before, *run(data=DATA | {key: value}))


def test_the_same_data_in_another_place_are_the_same(run):
    before = found(*run())
    moved = [{**DATA["data"][0], "data": "--data_path there"}]
    assert not notices(before, *run(data=DATA | {"data": moved, "tokenizer": {"name": "there", "fingerprint": "t1"}}))


def test_of_a_stream_what_was_read_so_far_is_no_difference(run):
    entry = {**DATA["data"][0], "held_out": 3, "kept": 5, "shape": "x"}
    stream = DATA | {"streaming": True, "data": [entry], "first_epoch_complete": False}
    before = found(*run(data=stream))
    read_on = {**entry, "kept": 50, "rows": 90, "fingerprint": "f9"}
    assert not notices(before, *run(data=stream | {"data": [read_on], "first_epoch_complete": True}))
    with pytest.raises(UserError, match="shape was x, is y"):
        notices(before, *run(data=stream | {"data": [{**entry, "shape": "y"}]}))


def test_other_weights_are_refused(run, tiny_model, tmp_path):
    args, output = run()
    before = found(args, output)
    shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    args.model_name_or_path = str(tmp_path / "copy")
    assert [line for line in notices(before, args, output)][0].startswith("goes on with --model_name_or_path")
    weights = tmp_path / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="the weights of --model_name_or_path are others than they were"):
        notices(before, args, output)


def test_a_peft_folder_is_told_from_others_by_its_base_too(run, make_policy, save_adapters, tmp_path):
    # It has no config.json of its own.
    args, output = run()
    base = tmp_path / "base"
    shutil.copytree(make_policy("llama"), base)
    save_adapters(base, tmp_path / "adapters")
    args.model_name_or_path = str(tmp_path / "adapters")
    before = found(args, output)
    assert notices(before, args, output) == []
    for file in (tmp_path / "adapters" / "adapter_model.safetensors", base / "model.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match="the weights of --model_name_or_path are others than they were"):
            notices(before, args, output)
        file.write_bytes(content)
    assert notices(before, args, output) == []


def test_other_ranks_versions_and_functions_are_listed(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    (tmp_path / "own.py").write_text("def f(prompts, answers):\n    return [0.0 for _ in answers]\n")
    line = f"--actor_model_name_or_path {tiny_model('llama')} --reward_fn {tmp_path}/own.py:f --data_path {tmp_path}"
    args = parse_step3(line.split())
    before = found(args, tmp_path)
    (tmp_path / "own.py").write_text("def f(prompts, answers):\n    return [1.0 for _ in answers]\n")
    monkeypatch.setattr(resume, "world_size", lambda: 3)
    monkeypatch.setattr(resume, "versions", lambda: {"torch": "9.9"})
    listed = notices(before, args, tmp_path)
    assert f"goes on with another reward function {tmp_path}/own.py:f" in listed
    assert "goes on with 3 ranks, was 1: answers are drawn otherwise" in listed
    assert any(line.startswith("goes on with torch 9.9, was ") for line in listed)


def test_another_rank_does_not_look_for_what_rank_0_may_yet_be_writing(run, monkeypatch):
    # Its data.json is not there; what a run is made of comes from rank 0.
    args, output = run()
    of_rank_0 = resume.description(args, output)
    (output / "data.json").unlink()
    monkeypatch.setattr(resume, "is_main", lambda: False)
    monkeypatch.setattr(resume, "gather_objects", lambda mine: [of_rank_0, mine])
    assert resume.checkpoints(args, output, None).made_of == of_rank_0


def test_a_run_of_another_stage_is_refused(run):
    before = found(*run())
    before.manifest["made_of"]["stage"] = "step2"
    with pytest.raises(UserError, match="is of step2, not of step1"):
        notices(before, *run())


def write_checkpoint(output: Path, step: int) -> Path:
    checkpoints = Checkpoints(output, Saving(keep=0), {})
    checkpoints.begin(RunState({}))
    checkpoints.save(step)
    checkpoints.finish()
    return output / "checkpoints" / f"step_{step:06d}"


def test_which_checkpoint_is_meant(run, capsys, tmp_path):
    args, output = run()
    assert resume.find(args, output) is None
    assert f"no complete checkpoint in {output}, so the run starts afresh" in capsys.readouterr().out
    write_checkpoint(output, 2)
    folder = write_checkpoint(output, 4)
    assert resume.find(args, output).step == 4
    args.resume = "never"
    assert resume.find(args, output) is None
    args.resume = str(output / "checkpoints" / "step_000002")
    assert resume.find(args, output).step == 2
    args.resume = str(output)
    assert resume.find(args, output).folder == folder
    (tmp_path / "that one").symlink_to(folder)
    args.resume = str(tmp_path / "that one")
    assert resume.find(args, output).folder == folder  # a link that the user gives is meant
    args.resume = str(tmp_path)
    with pytest.raises(UserError, match="holds no complete checkpoint; expected one, or the folder of a run"):
        resume.find(args, output)
    (folder / "rank_0000.safetensors").unlink()
    args.resume = str(folder)
    with pytest.raises(UserError, match=f"--resume {folder}: .* is not complete"):
        resume.find(args, output)


def test_a_fresh_start_deletes_no_checkpoint_that_cannot_be_read(run):
    # It may be of another format, or lie on a disk that fails today; there is but one, by default.
    args, output = run("--resume auto")
    (write_checkpoint(output, 4) / "rank_0000.safetensors").unlink()
    with pytest.raises(UserError, match="--resume auto: none of the checkpoints in .* can be read"):
        resume.find(args, output)


def test_the_course_so_far_goes_along_into_another_folder(run, tmp_path):
    args, output = run()
    write_checkpoint(tmp_path / "before", 2) if (tmp_path / "before").mkdir() is None else None
    (tmp_path / "before" / "metrics.jsonl").write_text('{"step": 1}\n')
    args.resume = str(tmp_path / "before")
    resume.find(args, output)
    assert (output / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_that_has_come_to_its_end_is_left_alone(run):
    args, output = run("--max_steps 9")
    assert not resume.complete(args, output)
    start_run(output, args, args.stage)
    (output / "results.json").write_text("{}")
    assert resume.complete(args, output)
    args.max_steps = 12
    assert not resume.complete(args, output)
    args.max_steps, args.resume = 9, "never"
    assert not resume.complete(args, output)


def test_a_longer_run_goes_on(run):
    args, output = run("--num_train_epochs 2")
    start_run(output, args, args.stage)
    (output / "results.json").write_text("{}")
    assert resume.complete(args, output)
    args.num_train_epochs = 3
    assert not resume.complete(args, output)


def test_run_json_lists_the_starts(run):
    args, output = run()
    start_run(output, args, args.stage)
    first = json.loads((output / "run.json").read_text())
    assert "starts" not in first
    (output / "answers").mkdir()
    start_run(output, args, args.stage, resumed=4)
    start_run(output, args, args.stage, resumed=8)
    last = json.loads((output / "run.json").read_text())
    assert [start["resumed_after"] for start in last["starts"]] == [None, 4] and last["resumed_after"] == 8
    assert last["starts"][0]["started"] == first["started"] and (output / "answers").is_dir()


@pytest.mark.parametrize(
    ("flags", "before", "words"),
    [
        ("--resume auto --overwrite_output_dir", [], "contradict one another"),
        ("--resume nowhere", [], "--resume nowhere: no such folder .* expected auto, never"),
        ("--resume auto", ["config.json"], r"holds a model already \(config.json\); choose another folder$"),
        ("", ["run.json"], "holds another run already .run.json."),
        ("", ["run.json", "checkpoints/x"], "or --resume auto to go on from its checkpoint"),
    ],
)
def test_what_the_flags_refuse(tmp_path, flags, before, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in before:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    with pytest.raises(UserError, match=words):
        parse_step1(f"--model_name_or_path me/model --output_dir out {flags}".split())


def test_a_run_that_was_killed_before_its_first_checkpoint_may_start_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()
    (tmp_path / "out" / "metrics.jsonl").touch()
    assert parse_step1("--model_name_or_path me/model --output_dir out --resume auto".split()).resume == "auto"
