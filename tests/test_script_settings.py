"""What the training scripts call: a stub in deepspeed's place prints its arguments.

The settings of every script are compared with those of the ReMax paper (arXiv 2310.10505) and of its authors' scripts,
which are written out here.
"""

import argparse
import os
import runpy
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from remax.cli.validate import parse_step1, parse_step2, parse_step3

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step1_supervised_finetuning", "step2_reward_model_finetuning", "step3_rlhf_finetuning")
SCRIPTS = sorted(ROOT.glob("step*/training_scripts/*/*.sh"))
OPT = f"{STAGES[0]}/training_scripts/opt/run_opt_1.3b.sh"
DEMO = f"{STAGES[2]}/training_scripts/demo/run_demo.sh"

DEEPSPEED = """#!/bin/bash
printf 'argument %s\\n' "$@"
echo "accelerator ${DS_ACCELERATOR:-}"
echo "memory ${PYTORCH_CUDA_ALLOC_CONF:-}"
echo "compiled ${TORCH_EXTENSIONS_DIR:-}"
if [[ -n ${DS_ENV_FILE:-} ]]; then echo "environment $(stat -c %a "$DS_ENV_FILE") $DS_ENV_FILE"; cat "$DS_ENV_FILE"; fi
echo "a warning" >&2
exit "${STATUS:-0}"
"""
# The Python beside the launcher: without a GPU, on whatever machine the tests run.
PYTHON = """#!/bin/bash
if [[ $* == *device_count* ]]; then echo "${GPUS:-0}"; else exec python3 "$@"; fi
"""


class Call(NamedTuple):
    """What a script did: the launcher's arguments up to main.py, main.py, its arguments, and what came of it."""

    launcher: dict[str, str]
    main: Path
    words: list[str]
    accelerator: str
    status: int
    console: str
    clone: Path


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def call(tmp_path_factory, run_command) -> Callable[..., Call]:
    """call(script, *flags, **variables): runs a copy of the script, so that its default OUTPUT is not the clone's."""
    folder = tmp_path_factory.mktemp("clone with a space")
    for path in (*SCRIPTS, ROOT / "utils/launch.sh"):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"deepspeed": DEEPSPEED, "python": PYTHON}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(script: str, *flags: str, **variables: object) -> Call:
        environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"} | variables  # and nothing else
        pairs = [f"{name}={value}" for name, value in environment.items()]
        done = run_command(["env", "-i", *pairs, "bash", folder / script, *flags], cwd=folder, timeout=60)
        lines = done.stdout.splitlines()
        arguments = [line.removeprefix("argument ") for line in lines if line.startswith("argument ")]
        if not arguments:
            return Call({}, Path(), [], "", done.returncode, done.stdout, folder)
        start = next(i for i, word in enumerate(arguments) if word.endswith("/main.py"))
        launcher = dict(zip(arguments[:start:2], arguments[1:start:2], strict=True))
        accelerator = next(line for line in lines if line.startswith("accelerator")).removeprefix("accelerator ")
        main = Path(arguments[start])
        return Call(launcher, main, arguments[start + 1 :], accelerator, done.returncode, done.stdout, folder)

    return run


def effective(words: list[str]) -> dict[str, Any]:
    """The last value of each flag; numbers as numbers, True for a flag alone."""
    flags: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            flags[name] = True
        else:
            assert flags[name] is True, f"--{name} has several values"
            try:
                flags[name] = float(word)
            except ValueError:
                flags[name] = word
    return flags


# ---------------------------------------------------------------------------------------------------------- launch.sh


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_num_gpus_is_the_number_of_ranks(call, ranks):
    assert call(OPT, NUM_GPUS=ranks).launcher["--num_gpus"] == str(ranks)


@pytest.mark.parametrize("variables", [{}, {"DS_ACCELERATOR": "cpu"}], ids=["no GPU", "CPU chosen"])
def test_two_ranks_run_on_the_cpu(call, variables):
    done = call(OPT, **variables)
    assert done.launcher["--num_gpus"] == "2" and done.accelerator == "cpu"
    assert "--hostfile" not in done.launcher


def test_the_hostfile_says_how_many_ranks_each_machine_has(call, tmp_path):
    hosts = tmp_path / "my hosts"
    hosts.write_text("# the first one is this one\nnode-1 slots=8\nnode-2 slots=8\n")
    done = call(OPT, HOSTFILE=hosts)
    assert done.launcher["--hostfile"] == str(hosts)
    assert "--num_gpus" not in done.launcher and done.accelerator == ""
    assert effective(call(DEMO, HOSTFILE=hosts).words)["per_device_generation_batch_size"] == 64 / 8
    done = call(OPT, HOSTFILE=hosts, NUM_GPUS=4)
    assert done.launcher["--hostfile"] == str(hosts) and done.launcher["--num_gpus"] == "4"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HOSTFILE": "nowhere"}, "error: HOSTFILE nowhere: no such file"),
        ({"HOSTFILE": "bin/python"}, 'error: HOSTFILE bin/python: expected lines such as "name slots=8"'),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5f2c"}, "error: CUDA_VISIBLE_DEVICES GPU-5f2c: the launcher takes numbers only"),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "NUM_GPUS": 3}, "error: NUM_GPUS 3: CUDA_VISIBLE_DEVICES has 2"),
    ],
)
def test_what_the_launcher_would_misread_is_refused(call, variables, message):
    # A wrong hostfile would train on one machine, and other names of devices end the launcher in a traceback.
    gpus = {} if "HOSTFILE" in variables else {"DS_ACCELERATOR": "cuda", "GPUS": 2}
    done = call(OPT, **gpus | variables)
    assert done.status == 2 and not done.words and done.console.startswith(message), done.console
    assert done.console.count("\n") == 1


def test_the_gpus_that_the_user_chose_are_used(call):
    # Told a number of ranks, the launcher would take the first ones of the machine, whoever uses them.
    gpus = {"DS_ACCELERATOR": "cuda", "GPUS": 4, "CUDA_VISIBLE_DEVICES": "2,3,5,7"}
    done = call(OPT, **gpus, NUM_GPUS=2)
    assert done.launcher["--include"] == "localhost:2,3" and "--num_gpus" not in done.launcher
    done = call(DEMO, **gpus)
    assert done.launcher["--include"] == "localhost:2,3,5,7"
    assert effective(done.words)["per_device_generation_batch_size"] == 64 / 4
    assert "memory expandable_segments:True" in done.console
    done = call(OPT, DS_ACCELERATOR="cuda", GPUS=4)
    assert not {"--include", "--num_gpus"} & done.launcher.keys()
    assert "memory \n" in call(OPT).console  # nothing of the kind without a GPU


def test_other_machines_get_the_variables_that_the_launcher_leaves_behind(call, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=1\nnode-2 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/theirs\n")
    mine = {"HF_TOKEN": 'a "b" $c `d` \\e', "HF_HUB_OFFLINE": 1, "DEEPSPEED_TIMEOUT": 90, "OMP_NUM_THREADS": 8}
    mine |= {"HF_HOME": "/mine", "https_proxy": "http://proxy:1", "SECRET": "stays", "HOME": tmp_path}
    printed = call(OPT, HOSTFILE=hosts, **mine).console
    (line,) = [line for line in printed.splitlines() if line.startswith("environment ")]
    mode, file = line.split()[1:]
    assert mode == "600" and not Path(file).exists()  # its owner's alone, and gone at the end
    assert "SECRET" not in printed and printed.index("HF_HOME=/mine") < printed.index("HF_HOME=/theirs")
    # What the launcher makes of it: quotes round a value, for the shell of the other machine.
    runner = PDSHRunner(argparse.Namespace(user_args=[], user_script="x"), "")
    for text in printed[printed.index(line) :].splitlines()[1:]:
        runner.add_export(*text.split("=", maxsplit=1)) if "=" in text else None
    shell = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    names = [name for name in mine if name not in ("SECRET", "HOME")]
    told = subprocess.run(["bash", "-c", shell + "".join(f'echo "${name}"; ' for name in names)], capture_output=True)
    assert told.stdout.decode().splitlines() == [str({**mine, "HF_HOME": "/theirs"}[name]) for name in names]
    assert "environment" not in call(OPT).console  # one machine: nothing is left behind
    assert f"environment 644 {hosts}" in call(OPT, HOSTFILE=hosts, DS_ENV_FILE=hosts).console  # the user's own


def test_compiled_operators_lie_where_make_keeps_them(call):
    assert "compiled \n" in call(OPT).console
    ready = call(OPT).clone / ".ready"
    ready.touch()
    try:
        assert f"compiled {ready.parent}/torch_extensions\n" in call(OPT).console
        assert "compiled /mine\n" in call(OPT, TORCH_EXTENSIONS_DIR="/mine").console
    finally:
        ready.unlink()


def test_the_port_is_the_users_or_a_free_one(call):
    assert call(OPT, MASTER_PORT=12345).launcher["--master_port"] == "12345"
    with socket.create_server(("", int(call(OPT).launcher["--master_port"]))) as taken:
        port = int(call(OPT).launcher["--master_port"])
        assert port != taken.getsockname()[1]
        with socket.create_server(("", port)):
            pass


@pytest.mark.parametrize("status", [0, 3])
def test_exit_status_and_log_are_the_launchers(call, tmp_path, status):
    first = call(OPT, STATUS=status, OUTPUT=tmp_path / "a/b c")
    assert first.status == status
    assert "a warning" in first.console  # the launcher's stderr too
    log = tmp_path / "a/b c/training.log"
    assert log.read_text() == first.console
    second = call(OPT, STATUS=status, OUTPUT=tmp_path / "a/b c", MASTER_PORT=1)
    assert log.read_text() == second.console != first.console  # of this run alone
    refused = call(OPT, STATUS=2, OUTPUT=tmp_path / "a/b c", MASTER_PORT=2)
    assert refused.status == 2 and log.read_text() == second.console  # a run that is refused changes nothing
    assert [path.name for path in log.parent.iterdir()] == ["training.log"]


def test_the_log_of_a_run_that_goes_on_is_kept(call, tmp_path):
    # The flag says so as well as the variable: utils/slurm.sh adds it.
    log = tmp_path / "training.log"
    expected = call(OPT, OUTPUT=tmp_path).console
    for flags, variables in (["--resume", "auto"], {}), (["--resume=auto"], {}), ([], {"RESUME": "auto"}):
        expected += call(OPT, *flags, OUTPUT=tmp_path, **variables).console
        assert log.read_text() == expected
    afresh = call(OPT, "--resume", "never", OUTPUT=tmp_path, RESUME="auto")
    assert log.read_text() == afresh.console


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_demos_batch_does_not_depend_on_the_ranks(call, ranks):
    flags = effective(call(DEMO, NUM_GPUS=ranks).words)
    assert flags["per_device_generation_batch_size"] * ranks == 64
    assert flags["per_device_training_batch_size"] * ranks == 64
    for stage in STAGES[:2]:
        flags = effective(call(f"{stage}/training_scripts/demo/run_demo.sh", NUM_GPUS=ranks).words)
        assert flags["per_device_train_batch_size"] * ranks == 32


# ---------------------------------------------------------------------------------------- the settings of each script

# Steps 1 and 2: `opt` and `llama2` are as in the authors' scripts, `hh` as in Part I of the paper. The paper has no
# settings for these steps of `gpt2` and `mistral`: theirs are the authors', for texts as long as in the paper's step 3.
SHARED = {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine", "num_warmup_steps": 0, "zero_stage": 2}
AUTHORS = {"data_split": "2,4,4", "report_to": "tensorboard"}
STEP_1 = SHARED | AUTHORS | {"weight_decay": 0, "seed": 2023, "print_loss": True}
STEP_2 = SHARED | AUTHORS | {"weight_decay": 0.1, "seed": 1234, "print_loss": True}
HYDRA = {"loss": "hydra", "data_split": "0,6,4"}  # steps 1 and 2 at once, of the rows of both
COLUMNS = ("per_device_train_batch_size", "max_seq_len", "learning_rate", "num_train_epochs", "data_path")
RM_STATIC, FULL_HH, ULTRA = "Dahoas/rm-static", "Dahoas/full-hh-rlhf", "HuggingFaceH4/ultrafeedback_binarized"
SHORT_TEXTS = "Dahoas/synthetic-instruct-gptj-pairwise"
CHECKPOINTING = {"gradient_checkpointing": True}
OFFLOAD = {"offload": True}


def finetuning(stage: dict[str, Any], *values: object, **more: object) -> dict[str, Any]:
    columns = dict(zip(COLUMNS, values, strict=True))
    return stage | columns | {"per_device_eval_batch_size": values[0]} | more


# Step 3: `opt` and `llama2` are as in the authors' scripts, `hh` as in Part I of the paper, `mistral` as in its Part
# II; `gpt2` has the 64 + 48 tokens of the paper's GPT-2 experiment.
RL_SHARED = {
    "algo": "remax",
    "lr_scheduler_type": "cosine",
    "seed": 2023,
    "actor_zero_stage": 2,
    "reference_zero_stage": 3,
    "reward_zero_stage": 3,
    "disable_actor_dropout": True,
    "disable_reward_dropout": True,
    "save_answers": True,
}
STEP_3 = {
    **RL_SHARED,
    **AUTHORS,
    "actor_weight_decay": 0.1,
    "num_train_epochs": 1,
    "num_warmup_steps": 0,
    "top_p": 0.9,
    "top_k": 50,  # what transformers 4.31 added to the authors' temperature and top_p by itself
    "logprobs_of": "model",
    "loss_aggregation": "token",
    "per_device_eval_batch_size": 32,  # theirs is that of the training, and so is its time: hours
    "print_answers": True,
}
RL_COLUMNS = ("max_prompt_seq_len", "max_answer_seq_len", "actor_learning_rate", "kl_ctl", "gamma", "clip_reward_value")
RL_COLUMNS += ("temperature", "data_path")
RL_CHECKPOINTING = {"actor_gradient_checkpointing": True}
RL_OFFLOAD = {"offload": True, "offload_reference_model": True, "offload_reward_model": True}
# Their loss is the mean over the tokens of a rank's micro-batch, then over the ranks. Of one row, this is:
ONE_ROW = {"loss_aggregation": "sequence_mean"}


def remax(rows: int, *values: object, **more: object) -> dict[str, Any]:
    rows_of = {f"per_device_{name}_batch_size": rows for name in ("generation", "training")}
    return STEP_3 | rows_of | dict(zip(RL_COLUMNS, values, strict=True)) | more


DEMO_FINETUNING = {
    **SHARED,
    "data_split": "4,4,2",
    "per_device_train_batch_size": 16,  # with two ranks
    "per_device_eval_batch_size": 50,
    "max_seq_len": 96,
    "report_to": "tensorboard",
}
DEMO_REMAX = {
    **RL_SHARED,
    "data_split": "4,4,2",
    "per_device_generation_batch_size": 32,  # with two ranks
    "per_device_training_batch_size": 32,
    "per_device_eval_batch_size": 50,
    "max_prompt_seq_len": 48,
    "max_answer_seq_len": 40,
    "actor_learning_rate": 6e-4,
    "actor_weight_decay": 0,
    "num_train_epochs": 3,
    "max_steps": 60,
    "num_warmup_steps": 5,
    "kl_ctl": 0.3,
    "gamma": 1,
    "report_to": "tensorboard",
    "save_at_final": True,
}
FINAL = {"save_at_final": True}
# Every flag of every script but for the models and the output folder. The columns, as above, are
# rows per GPU, tokens, learning rate, epochs; in step 3
# rows per GPU, prompt and answer tokens, learning rate, KL coefficient, gamma, clip, temperature.
HYDRA_REMAX = {
    "share": "all",
    "only_optimize_lora": True,
    "actor_lora_dim": 16,
    "actor_lora_alpha": 32,
    "actor_lora_module_name": "all-linear",
}
TABLE = {
    (1, "gpt2"): finetuning(STEP_1, 32, 112, 1e-5, 2, SHORT_TEXTS),
    (1, "opt_1.3b"): finetuning(STEP_1, 16, 512, 1e-5, 4, RM_STATIC, **CHECKPOINTING),
    (1, "llama2_7b"): finetuning(STEP_1, 16, 512, 1e-5, 2, RM_STATIC, **CHECKPOINTING, **OFFLOAD),
    (1, "llama2_7b_hh"): finetuning(STEP_1, 30, 512, 1e-5, 2, FULL_HH, **CHECKPOINTING, **OFFLOAD),
    (1, "mistral_7b"): finetuning(STEP_1, 8, 768, 1e-5, 2, ULTRA, **CHECKPOINTING, **OFFLOAD),
    (2, "gpt2"): finetuning(STEP_2, 32, 112, 1e-5, 2, SHORT_TEXTS),
    (2, "opt_350m"): finetuning(STEP_2, 16, 512, 1e-5, 4, RM_STATIC, **CHECKPOINTING),
    (2, "llama2_7b"): finetuning(STEP_2, 16, 512, 1e-5, 2, RM_STATIC, **CHECKPOINTING),
    (2, "llama2_7b_hh"): finetuning(STEP_2, 36, 512, 1e-5, 2, FULL_HH, **CHECKPOINTING),
    (2, "mistral_7b"): finetuning(STEP_2, 8, 768, 1e-5, 2, ULTRA, **CHECKPOINTING, **OFFLOAD),
    (2, "hydra_7b"): finetuning(STEP_2 | HYDRA, 16, 512, 1e-5, 2, RM_STATIC, **CHECKPOINTING, **OFFLOAD),
    (3, "gpt2"): remax(16, 64, 48, 1e-6, 0.05, 0.99, 5, 1, SHORT_TEXTS),
    (3, "opt_1.3b"): remax(4, 256, 256, 1e-6, 0.05, 0.99, 5, 1, RM_STATIC, **RL_CHECKPOINTING),
    (3, "llama2_7b"): remax(
        1, 256, 256, 1e-6, 0.05, 0.99, 5, 1, RM_STATIC, **RL_CHECKPOINTING, **RL_OFFLOAD, **FINAL, **ONE_ROW
    ),
    (3, "llama2_7b_hh"): remax(
        1, 256, 256, 1e-6, 0.1, 0.99, 5, 1, FULL_HH, **RL_CHECKPOINTING, **RL_OFFLOAD, **FINAL, **ONE_ROW
    ),
    (3, "llama2_7b_large_batch"): remax(
        32, 256, 256, 1e-6, 0.05, 0.99, 5, 1, RM_STATIC, **RL_CHECKPOINTING, **FINAL, **ONE_ROW
    )
    | {"per_device_training_batch_size": 8},
    (3, "mistral_7b"): remax(
        32, 384, 384, 5e-7, 0.1, 1, 1, 0.7, ULTRA, **RL_CHECKPOINTING, **RL_OFFLOAD, penalty="full_step"
    ),
    # The adapters' learning rate in the place of the model's; nothing is frozen beside the actor.
    (3, "hydra_7b"): {
        name.replace("actor_learning", "actor_lora_learning"): value
        for name, value in remax(
            4, 256, 256, 1e-5, 0.05, 0.99, 5, 1, RM_STATIC, **RL_CHECKPOINTING, **FINAL, **HYDRA_REMAX
        ).items()
        if name not in ("reference_zero_stage", "reward_zero_stage")
    },
    (1, "demo"): DEMO_FINETUNING
    | {"learning_rate": 3e-3, "weight_decay": 0, "num_train_epochs": 5, "seed": 2023, "logging_steps": 50},
    (2, "demo"): DEMO_FINETUNING | {"learning_rate": 2e-3, "weight_decay": 0.1, "num_train_epochs": 3, "seed": 1234},
    (3, "demo"): DEMO_REMAX,
}
# What steps 1 and 2 start from; `demo` has a model of its own for each, and step 3 starts from their results.
MODELS = {
    "gpt2": "openai-community/gpt2",
    "opt_1.3b": "facebook/opt-1.3b",
    "opt_350m": "facebook/opt-350m",
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "hydra_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_7b_hh": "meta-llama/Llama-2-7b-hf",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
}


def place(script: Path) -> tuple[int, str]:
    return STAGES.index(script.relative_to(ROOT).parts[0]) + 1, script.stem.removeprefix("run_")


def test_the_table_names_every_script():
    assert {place(script) for script in SCRIPTS} == set(TABLE)


@pytest.mark.parametrize("script", SCRIPTS, ids=short)
def test_script_has_the_papers_settings(script, call):
    stage, name = place(script)
    done = call(short(script))
    assert done.status == 0
    assert done.main == done.clone / STAGES[stage - 1] / "main.py"
    flags = effective([word.removeprefix(f"{done.clone}/") for word in done.words])
    result = {1: "sft", 2: "hydra_sft" if name == "hydra_7b" else "reward", 3: "remax"}[stage]
    assert flags.pop("output_dir") == f"output/{name}/{result}"
    if stage == 3:
        family = name.removesuffix("_large_batch")
        start = "mistralai/Mistral-7B-Instruct-v0.2" if name == "mistral_7b" else f"output/{family}/sft"
        start = f"output/{family}/hydra_sft" if name == "hydra_7b" else start
        assert flags.pop("actor_model_name_or_path") == start
        reward = "opt_350m" if name == "opt_1.3b" else family
        reward = None if name == "hydra_7b" else f"output/{reward}/reward"  # its own score head
        assert flags.pop("reward_model_name_or_path", None) == reward
    else:
        start = f"output/demo/models/{('actor', 'reward')[stage - 1]}" if name == "demo" else MODELS[name]
        assert flags.pop("model_name_or_path") == start
    assert flags == {"data_path": "output/demo/data"} | TABLE[stage, name]


def test_data_may_be_several_names(call, tmp_path):
    names = ["me/a:0.5", f"{tmp_path}/b.jsonl:0.5"]
    assert call(OPT, DATA=" ".join(names)).words[:4] == ["--data_path", *names, "--output_dir"]
    whole = tmp_path / "one name"
    whole.touch()
    assert call(OPT, DATA=whole).words[:3] == ["--data_path", str(whole), "--output_dir"]


@pytest.mark.parametrize("script", ["opt/run_opt_1.3b", "llama2/run_llama2_7b_hh"])
def test_the_scripts_own_data_never_mix_in(call, script):
    script = f"{STAGES[0]}/training_scripts/{script}.sh"
    for flag in (["--sft_only_data_path", "me/mine"], ["--sft-only-data-path=me/mine"]):
        assert "--data_path" not in call(script, *flag).words
        assert call(script, *flag, DATA="me/pairs").words[:2] == ["--data_path", "me/pairs"]
    assert "--data_path" in call(script).words


def test_a_rank_that_was_killed_is_explained(call, tmp_path):
    # The launcher of a rank that signal 9 has ended exits with -9, which a shell sees as 256 - 9.
    done = call(OPT, OUTPUT=tmp_path, STATUS="247")
    assert done.status == 137  # 128 + 9
    assert done.console.splitlines()[-1].startswith("error: a rank was killed by signal 9 (by hand, or by the system")
    assert (tmp_path / "training.log").read_text() == done.console
    assert "was killed" not in call(OPT, OUTPUT=tmp_path, STATUS="1").console


@pytest.mark.parametrize("script", SCRIPTS, ids=short)
def test_script_takes_the_users_variables_and_flags(script, call, tmp_path):
    stage, _ = place(script)
    (tmp_path / "my data").mkdir()
    mine = ["--output_dir", "else where", "--data_split", "1,1,1", "--reward_fn", "a.py:b", "c.py:d"]
    done = call(
        short(script),
        *mine,
        MODEL="my model",
        REWARD_MODEL="my reward",
        DATA=tmp_path / "my data",
        OUTPUT=tmp_path / "my output",
    )
    assert done.words[-len(mine) :] == mine
    flags = effective(done.words[: -len(mine)])
    assert flags["data_path"] == str(tmp_path / "my data") and flags["output_dir"] == str(tmp_path / "my output")
    assert flags["actor_model_name_or_path" if stage == 3 else "model_name_or_path"] == "my model"
    assert flags.get("reward_model_name_or_path") == ("my reward" if stage == 3 else None)
    if stage == 3:  # an empty name: a reward function alone
        assert "--reward_model_name_or_path" not in call(short(script), REWARD_MODEL="").words


@pytest.mark.parametrize("script", SCRIPTS, ids=short)
def test_the_stage_understands_the_script(script, call, tmp_path):
    stage, name = place(script)
    parse = {1: parse_step1, 2: parse_step2, 3: parse_step3}[stage]
    models = ("actor_model_name_or_path", "reward_model_name_or_path") if stage == 3 else ("model_name_or_path",)
    models = models[: 1 if name == "hydra_7b" else 2]
    here = [word for flag in (*models, "data_path") for word in (f"--{flag}", str(tmp_path))]  # a folder that is there
    (tmp_path / "config.json").write_text("{}")
    args = parse([*call(short(script)).words, *here])
    assert not args.notices  # no retired flag, none without effect
    for flag, value in TABLE[stage, name].items():
        assert flag == "data_path" or getattr(args, flag) in (value, [value]), flag


PLANNED = runpy.run_path(str(ROOT / "tests/script_memory.py"))


@pytest.mark.parametrize("script", PLANNED["SCRIPTS"], ids=short)
def test_the_script_says_what_gpus_hold_it(script, call, tmp_path):
    # `python tests/script_memory.py --write` after a change that moves memory
    (tmp_path / "config.json").write_text("{}")
    line = PLANNED["line_of"](script, call(short(script)).words, tmp_path)
    assert PLANNED["LINE"].findall(script.read_text(encoding="utf-8")) == [line]
