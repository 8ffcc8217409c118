"""--config: flags from a file, and a run started again from its run.json."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch

from remax.cli.evaluation import parse_reward_eval
from remax.cli.validate import parse_step1, parse_step2, parse_step3
from utils import run
from utils.run import UserError, describe_run

STEP1 = (parse_step1, "--model_name_or_path me/model ")
STEP2 = (parse_step2, "--model_name_or_path me/model ")
STEP3 = (parse_step3, "--actor_model_name_or_path me/actor --reward_model_name_or_path me/a me/b:0.5 ")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def write(folder: Path, text: str, name: str = "flags.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_sets_flags_and_the_command_line_wins(tmp_path):
    file = write(
        tmp_path,
        """
        model_name_or_path: me/model   # a required flag
        learning_rate: 1e-4            # yaml 1.1 reads a text
        weight-decay: 1
        zero_stage: 2
        gradient_checkpointing: true
        packing: no
        data_path: [me/a, me/b:0.5]
        sft_only_data_path: me/c       # one of a list
        data_split: 1,2,3
        chat_template: null
        local_rank: 7
        """,
    )
    args = parse_step1(["--config", file, "--zero_stage", "1", "--packing"])
    assert (args.model_name_or_path, args.learning_rate, args.weight_decay) == ("me/model", 1e-4, 1.0)
    assert (args.zero_stage, args.packing, args.gradient_checkpointing) == (1, True, True)  # 1 and true: command line
    assert (args.data_path, args.sft_only_data_path) == (["me/a", "me/b:0.5"], ["me/c"])
    assert (args.data_split, args.chat_template) == ("1,2,3", None)
    assert args.local_rank == -1  # the launcher's
    assert args.config == file
    assert parse_step1(["--config", file, "--sft_only_data_path"]).sft_only_data_path == []


def test_json_works_too_and_checks_of_several_flags_still_hold(tmp_path):
    file = write(tmp_path, json.dumps({"model_name_or_path": "me/model", "learning_rate": 1e-5}), "flags.json")
    assert parse_step1(["--config", file]).learning_rate == 1e-5
    file = write(tmp_path, json.dumps({"model_name_or_path": "me/model", "offload": True}), "flags.json")
    with pytest.raises(UserError, match=r"--offload with --zero_stage 0"):
        parse_step1(["--config", file])
    with pytest.raises(UserError, match=r"required: --model_name_or_path"):
        parse_step1(["--config", write(tmp_path, "{}")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"learning_rat: unknown flag; did you mean --learning_rate\?"),
        ("per_device_mini_train_batch_size: 1", r"unknown flag; use --per_device_training_batch_size"),
        ("3: 1", r"3: unknown flag"),
        ("config: other.yaml", r"config: a file cannot name another one"),
        ("learning_rate: fast", r"learning_rate: is 'fast'; expected a number"),
        ("learning_rate: -1", r"learning_rate: is -1.0; must be above 0"),
        ("learning_rate: .nan", r"learning_rate: is nan; must be above 0"),
        ("learning_rate: true", r"learning_rate: is True; expected a number"),
        ("learning_rate: {peak: 1}", r"learning_rate: is {'peak': 1}; expected a number"),
        ("num_train_epochs: 1.5", r"num_train_epochs: is 1.5; expected a whole number"),
        ("num_train_epochs: 0", r"num_train_epochs: is 0; must be at least 1"),
        ("num_train_epochs: [1, 2]", r"num_train_epochs: is a list; expected a whole number"),
        ("zero_stage: 4", r"zero_stage: is 4; expected one of 0, 1, 2, 3"),
        ("lr_scheduler_type: cosin", r"lr_scheduler_type: is 'cosin'; expected one of linear, cosine"),
        ("packing: maybe", r"packing: is 'maybe'; expected true or false"),
        ("output_dir: 5", r"output_dir: is 5; expected text"),
        ("output_dir: [a]", r"output_dir: is a list; expected text"),
        ("data_path: [a, 5]", r"data_path: is 5; expected text"),
        ("- learning_rate", r"is a list; expected a mapping from flags to values"),
        ("learning_rate", r"is a str; expected a mapping"),
        ("", r"is empty; expected a mapping"),
        ("seed: 1\nmax_steps: 3\nseed: 1", r"seed: is set 2 times; expected once"),
        ("max_steps: 3\n'max_steps': null", r"max_steps: is set 2 times"),
        ("stage: step1\narguments: {seed: 1, seed: 2}", r"seed: is set 2 times"),
        ("max_steps: 3\nmax-steps: 4", r"max-steps: is the same flag as max_steps; expected once"),
        ("a: b: c", r"is no yaml \(mapping values are not allowed here"),
    ],
)
def test_a_bad_file_is_one_line_naming_file_and_key(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        parse_step1(["--config", file])
    assert str(error.value).startswith(f"--config {file}: ") and "\n" not in str(error.value)


def test_a_key_is_there_once_in_json_and_in_yaml_with_merges(tmp_path):
    file = write(tmp_path, '{"seed": 1, "arguments": {"seed": 1, "max_steps": 3, "seed": 2}}', "flags.json")
    with pytest.raises(UserError, match=r"^--config .*flags.json: seed: is set 2 times; expected once$"):
        parse_step1(["--config", file])
    file = write(tmp_path, "<<: {seed: 1, max_steps: 3}\nseed: 2\nmodel_name_or_path: me/model\n")
    args = parse_step1(["--config", file])  # the file's own value comes before the merged one
    assert (args.seed, args.max_steps) == (2, 3)


def test_files_that_cannot_be_read(tmp_path):
    for file, message in [
        (tmp_path / "none.yaml", r"none.yaml: no such file \(looked from "),
        (tmp_path, r"is a folder; expected a yaml or json file"),
        (write(tmp_path, "{", "flags.json"), r"flags.json: is no json \(Expecting property name"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_step1(["--config", str(file)])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes.yaml: line 1 is not UTF-8"):
        parse_step1(["--config", str(tmp_path / "bytes.yaml")])
    with pytest.raises(UserError, match=r"--config: expected one argument"):
        parse_step1(["--config"])


# ------------------------------------------------------------------------------------------------------------- run.json


def arguments(args) -> dict:
    """All that a run is made of; what was printed about it, and where the flags came from, are no part of it."""
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in ("notices", "config")}


ROUND_TRIPS = [
    (*STEP1, ""),
    (*STEP1, "--bf16 --streaming --max_steps 5 --shuffle_buffer 7 --data_path me/a me/b:0.5 --deepspeed"),
    (*STEP2, ""),
    (*STEP2, "--loss r-dpo --length_alpha 0.02 --offload_reference_model --num_padding_at_beginning 0"),
    (*STEP3, ""),
    (*STEP3, "--algo reinforce --baseline_decay 0.9 --penalty none --test_stop_step 4"),
    (*STEP3, "--algo rloo --penalty kl --reward_bf16 --reward_zero_stage 1"),
    (*STEP3, "--algo grpo --adaptive_kl --offload_reward_model --loss_aggregation token"),
    (*STEP3, "--penalty full_kl --kl_ctl 0.01 --inference_tp_size 1 --enable_hybrid_engine"),
    (*STEP3, "--penalty full_kl_onestep --gamma 1"),
    (*STEP3, "--algo ppo --actor_bf16 --ppo_epochs 2"),
    (*STEP3, "--algo ppo --offload --actor_zero_stage 2 --critic_zero_stage 1 --critic_dtype bf16 --kl_estimator k3"),
]


@pytest.mark.parametrize(("parse", "required", "line"), ROUND_TRIPS)
def test_a_run_starts_again_from_its_run_json(tmp_path, monkeypatch, parse, required, line):
    monkeypatch.setattr(run, "git_commit", lambda: None)
    first = parse(shlex.split(required + line))
    record = describe_run(first, first.stage)
    record["arguments"]["local_rank"] = 3  # whatever the launcher said then
    again = parse(["--config", write(tmp_path, json.dumps(record), "run.json")])
    assert arguments(again) == arguments(first)
    third = parse(["--config", write(tmp_path, json.dumps(describe_run(again, again.stage)), "again.json")])
    assert arguments(third) == arguments(first)  # the file that `again` names was not read a second time
    assert third.config.endswith("again.json")


def test_a_run_is_started_again_with_changes(tmp_path):
    first = parse_step1(["--model_name_or_path", "me/model", "--learning_rate", "1e-4", "--max_seq_len", "99"])
    file = write(tmp_path, json.dumps(describe_run(first, "step1")), "run.json")
    again = parse_step1(["--config", file, "--learning_rate", "1e-3"])
    assert (again.learning_rate, again.max_seq_len) == (1e-3, 99)


def test_leave_to_overwrite_is_not_handed_on(tmp_path):
    first = parse_step1(["--model_name_or_path", "me/model", "--overwrite_output_dir"])
    file = write(tmp_path, json.dumps(describe_run(first, "step1")), "run.json")
    assert first.overwrite_output_dir and not parse_step1(["--config", file]).overwrite_output_dir
    mine = write(tmp_path, json.dumps({"model_name_or_path": "me/model", "overwrite_output_dir": True}), "mine.json")
    assert parse_step1(["--config", mine]).overwrite_output_dir


def test_a_run_of_another_stage_is_refused(tmp_path):
    first = parse_step1(["--model_name_or_path", "me/model"])
    file = write(tmp_path, json.dumps(describe_run(first, "step1")), "run.json")
    with pytest.raises(UserError, match=r"--config .*run.json: is a run of step1, not of step2"):
        parse_step2(["--config", file])
    with pytest.raises(UserError, match=r"is a run of step1, not of this program"):
        parse_reward_eval(["--config", file])


def test_keys_of_a_run_that_are_no_flags_are_left_out(tmp_path):
    file = write(tmp_path, json.dumps({"stage": "step1", "arguments": {"model_name_or_path": "a", "gone": 3}}))
    assert parse_step1(["--config", file]).model_name_or_path == "a"


def test_programs_that_train_nothing_read_files_too(tmp_path):
    file = write(tmp_path, "model_name_or_path: me/model\nbatch_size: 3\ndtype: fp32\n")
    assert parse_reward_eval(["--config", file]).batch_size == 3
