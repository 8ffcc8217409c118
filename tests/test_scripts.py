"""Every shipped training script runs to its end on a tiny stand-in of its architecture, with two ranks; and the command
lines of the ReMax authors' own scripts work here as they are."""

import itertools
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from remax.checkpoint.export import export
from remax.cli.validate import parse_step1, parse_step2, parse_step3
from remax.models.hydra import load_hydra
from tests import zygote
from utils.run import UserError
from utils.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step1_supervised_finetuning", "step2_reward_model_finetuning", "step3_rlhf_finetuning")
SCRIPTS = sorted(ROOT.glob("step*/training_scripts/**/*.sh"))
EVALUATION_SCRIPTS = sorted(ROOT.glob("step*/evaluation_scripts/*.sh"))
ARCHITECTURE = {"demo": "llama", "gpt2": "gpt2", "opt": "opt", "llama2": "llama", "mistral": "mistral"}
ARCHITECTURE |= {"hydra": "llama"}  # steps 1 and 2 at once
PACKED = ("opt", "mistral")  # families whose scripts of steps 1 and 2 are run with --packing
STREAMED = "gpt2"  # its scripts run with --streaming
# What makes a paper's setting small; the rest of each script is run as it stands.
SMALLER = {
    1: "--max_seq_len 64 --per_device_train_batch_size 4 --per_device_eval_batch_size 4",
    2: "--max_seq_len 64 --per_device_train_batch_size 4 --per_device_eval_batch_size 4",
    3: "--max_prompt_seq_len 56 --max_answer_seq_len 8 --per_device_generation_batch_size 2"
    " --per_device_training_batch_size 2 --per_device_eval_batch_size 2 --save_at_final",
}


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stage_of(script: Path) -> int:
    return STAGES.index(script.relative_to(ROOT).parts[0]) + 1


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_exported(folder: Path, stage: int) -> None:
    """Plain transformers loads the folder: every weight is there, finite, and the tokenizer fits."""
    loaders = {"score.weight": AutoModelForSequenceClassification, "lm_head.weight": AutoModelForCausalLM}
    both = len(json.loads((folder / "config.json").read_text())["architectures"]) == 2
    for head in loaders if both else ["score.weight" if stage == 2 else "lm_head.weight"]:
        model, info = loaders[head].from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and set(info["unexpected_keys"]) <= (loaders.keys() - {head} if both else set())
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size


def assert_trained(folder: Path, start: Path) -> None:
    """The weights that both folders name differ."""
    before, after = weights(start), weights(folder)
    shared = before.keys() & after.keys()
    assert len(shared) > 10 and any(not torch.equal(before[name], after[name].float()) for name in shared)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_scripts_for_each_family(stage):
    found = {script.parent.name for script in SCRIPTS if short(script).startswith(stage)}
    assert found - {"hydra"} == ARCHITECTURE.keys() - {"hydra"} and ("hydra" in found) == (stage != STAGES[0])


def several_rewards(folder: Path, model: Path) -> list[str]:
    """Flags for two normalised reward models and two functions, scored in two micro-batches."""
    for name, statistics in {"helpful": (0.5, 2.0), "harmless": (-1.0, 0.25)}.items():
        shutil.copytree(model, folder / name)
        config = json.loads((model / "config.json").read_text())
        config |= dict(zip(("score_mean", "score_std"), statistics, strict=True))
        (folder / name / "config.json").write_text(json.dumps(config))
    functions = ROOT / STAGES[2] / "example_rewards.py"
    return shlex.split(
        "--reward_model_name_or_path helpful harmless:0.5 --normalize_reward --per_device_generation_batch_size 4"
        f" --reward_fn {functions}:finished {functions}:words:-0.1"
    )


def assert_several_rewards(output: Path) -> None:
    """Every record's reward is that of its parts: sum of weight * (score - mean) / std."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4  # two steps, an evaluation before and one after
    for record in records:
        group = "train" if "train/reward" in record else "eval"
        part = {name: record[f"{group}/reward/{name}"] for name in ("helpful", "harmless", "finished", "words")}
        expected = (part["helpful"] - 0.5) / 2.0 + 0.5 * (part["harmless"] + 1.0) / 0.25
        expected += part["finished"] - 0.1 * part["words"]
        assert record[f"{group}/reward"] == pytest.approx(expected, rel=1e-4)
        assert part["words"] > 0


# Whether a function is given what belongs to each prompt and answer.
ASKED = """
def asked(prompts, answers, question, answer, ended, tokens):
    rows = zip(prompts, question, answer, ended, tokens)
    return [q[-15:] in p and "####" in a and (e or t == 8) for p, q, a, e, t in rows]  # prompts are cut at their front
"""


def verifiable_rewards(folder: Path) -> list[str]:
    """Flags for functions alone, on questions with reference answers."""
    (folder / "asked.py").write_text(ASKED)
    functions = ROOT / STAGES[2] / "example_rewards.py"
    return shlex.split(
        f"--prompt_column question --data_split 0,0,1 --reward_fn {functions}:words {functions}:gsm8k asked.py:asked"
    )


def assert_verifiable_rewards(output: Path) -> None:
    """Every answer was scored with its own row."""
    for record in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        group = "train" if "train/reward" in record else "eval"
        assert record[f"{group}/reward/asked"] == 1.0 and record[f"{group}/reward/gsm8k"] <= 1.0


def script_flags(script: Path, folder: Path, reward: Path, can_compile: bool) -> list[str]:
    """What is typed behind the script's name."""
    stage, architecture = stage_of(script), ARCHITECTURE[script.parent.name]
    flags = shlex.split(SMALLER[stage]) + ["--max_steps", "2", "--max_eval_batches", "1"]
    if architecture == STREAMED:
        flags += ["--streaming", "--shuffle_buffer", "20"]
    if not can_compile:
        flags += ["--offload", "false"]
    flags += ["--packing"] * (stage < 3 and architecture in PACKED)
    if stage == 3 and architecture == "gpt2":
        flags += several_rewards(folder, reward)
    if stage == 3 and script.parent.name == "demo":
        flags += verifiable_rewards(folder)
    if stage == 2 and architecture == "gpt2":
        flags += ["--ranked_loss", "plackett-luce", "--center_rewards_coefficient", "0.01"]
    return flags


@pytest.fixture(scope="module")
def tiny_hydra(tmp_path_factory, tiny_model):
    """tiny_hydra("llama"): as tiny_model, with a score head beside the language head."""

    def make(architecture: str) -> Path:
        tokenizer = load_tokenizer(str(tiny_model(architecture)))
        options = {"dtype": torch.float32, "tokenizer": tokenizer, "new_head": True}
        folder = tmp_path_factory.mktemp(f"{architecture}_hydra")
        export(load_hydra(str(tiny_model(architecture)), "--model", **options), tokenizer, folder, zero3=False)
        return folder

    return make


@pytest.fixture(scope="module")
def prepare_script(tmp_path_factory, corpus, rank_answers, tiny_model, tiny_hydra, tiny_reward_model, can_compile):
    """prepare_script(script) -> (its folder, the flags behind its name, its environment).

    The folder is neither the repository nor the stage's, and OUTPUT is relative to it.
    """

    def prepare(script: Path) -> tuple[Path, list[str], dict[str, str]]:
        stage, architecture = stage_of(script), ARCHITECTURE[script.parent.name]
        folder = tmp_path_factory.mktemp(script.stem)
        data, reward = corpus, tiny_reward_model(architecture)
        if stage == 2 and architecture == "gpt2":
            (folder / "ranked").mkdir()
            data = rank_answers(corpus, folder / "ranked")
        flags = script_flags(script, folder, reward, can_compile)
        alone = stage == 3 and script.parent.name == "demo"
        if alone:
            data = ROOT / "examples/gsm8k.jsonl"
        shared = stage == 3 and script.parent.name == "hydra"
        model = tiny_hydra(architecture) if shared else tiny_model(architecture)
        names = {"MODEL": model, "REWARD_MODEL": "" if alone or shared else reward, "DATA": data}
        return folder, flags, {k: str(v) for k, v in names.items()} | {"OUTPUT": "result", "NUM_GPUS": "2"}

    return prepare


def run_mains(base: Path, ranks: int) -> str:
    """Runs base/jobs.json, see tests/mains.py; what was printed where that failed."""
    logs = [base / f"rank{rank}" for rank in range(ranks)]
    try:
        zygote.run_ranks(ROOT / "tests/mains.py", [base / "jobs.json"], folder=base, logs=logs, timeout=600)
        return ""
    except RuntimeError as error:
        return str(error)


@pytest.fixture(scope="module")
def in_one_start(tmp_path_factory, prepare_script, run_command):
    """{script: (its folder, exit status, what it printed)} of all scripts, run by the same two ranks.

    What each script would hand to the launcher is told by a stand-in for `deepspeed`.
    """
    base, jobs = tmp_path_factory.mktemp("one_start"), []
    stand_in = base / "bin" / "deepspeed"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$HANDED_ON"\n')
    stand_in.chmod(0o755)
    for script in SCRIPTS:
        folder, flags, environment = prepare_script(script)
        path = f"{stand_in.parent}:{os.environ['PATH']}"
        done = run_command(["bash", script, *flags], folder, PATH=path, HANDED_ON=folder / "handed_on", **environment)
        assert done.returncode == 0, done.stdout
        words = (folder / "handed_on").read_text().splitlines()
        (program,) = [i for i, word in enumerate(words) if word.endswith("/main.py")]
        assert words[:program][-2:] == ["--num_gpus", "2"]
        job = {"program": words[program], "flags": words[program + 1 :], "folder": str(folder)}
        jobs.append(job | {"log": str(folder / "printed.txt")})
    (base / "jobs.json").write_text(json.dumps(jobs))
    failed = run_mains(base, ranks=2)
    finished = json.loads((base / "jobs.done").read_text()) if (base / "jobs.done").exists() else []
    results = {}
    for script, job, end in itertools.zip_longest(SCRIPTS, jobs, finished):
        printed = Path(job["log"]).read_text() if Path(job["log"]).exists() else ""
        results[script] = (
            Path(job["folder"]),
            end.get("status") if end else None,
            printed + (failed if not end or "status" not in end else ""),
        )
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("script", SCRIPTS, ids=short)
def test_script_runs_to_the_end(script, in_one_start, tiny_model):
    folder, status, printed = in_one_start[script]
    assert status == 0, printed
    assert_script_did_its_work(script, folder / "result", printed, tiny_model)


# From bash through the real launcher, one for each stage.
WHOLE_WAY = [
    ROOT / STAGES[0] / "training_scripts/gpt2/run_gpt2.sh",
    ROOT / STAGES[1] / "training_scripts/mistral/run_mistral_7b.sh",
    ROOT / STAGES[2] / "training_scripts/llama2/run_llama2_7b.sh",
]


# Another machine, as ssh and pdsh show it: the command gets none of this one's variables. Both lie on the loopback.
OTHER_MACHINE = {
    "ssh": """#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
if [[ ${*:2} == "hostname -I" ]]; then echo 127.0.0.1; else "${@:2}"; fi
""",
    "pdsh": """#!/bin/bash
[[ $1 == -S && $2 == -f && $4 == -w ]] || exit 9
IFS=, read -ra hosts <<<"$5"
shift 5
command=$* pids=() status=0
for n in "${!hosts[@]}"; do
    env -i HOME=/nowhere PATH=/usr/bin:/bin bash -c "${command//%n/$n}" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
""",
}


def two_machines(folder: Path) -> dict[str, str]:
    """The environment of a run on two machines of one rank each, by a hostfile."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in OTHER_MACHINE.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"HOSTFILE": "hosts", "PATH": path, "DS_ACCELERATOR": "cpu"}


@pytest.mark.ranks
@pytest.mark.parametrize("script", WHOLE_WAY, ids=short)
def test_script_through_the_launcher(script, prepare_script, run_command, tiny_model):
    folder, flags, environment = prepare_script(script)
    if stage_of(script) == 1:
        environment = {**environment, **two_machines(folder)}
        del environment["NUM_GPUS"]
    done = run_command(["bash", script, *flags], folder, **environment)
    assert done.returncode == 0, done.stdout
    assert (folder / "result/training.log").read_text() == done.stdout  # the console and the log file both
    assert_script_did_its_work(script, folder / "result", done.stdout, tiny_model)


def assert_script_did_its_work(script: Path, output: Path, printed: str, tiny_model) -> None:
    stage, architecture = stage_of(script), ARCHITECTURE[script.parent.name]
    run = json.loads((output / "run.json").read_text())
    assert run["world_size"] == 2 and run["arguments"]["max_steps"] == 2
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2
    if stage < 3:
        padding = [line["train/padding_share"] for line in lines if "train/loss" in line]
        packed = architecture in PACKED
        assert len(padding) == 2 and all(share == 0 if packed else 0 < share < 1 for share in padding)
    if stage == 3 and architecture == "gpt2":
        assert_several_rewards(output)
    if stage == 3 and script.parent.name == "demo":
        assert_verifiable_rewards(output)
    assert ("functions score" in printed) == (stage == 3 and script.parent.name == "demo")
    if stage == 2:
        results = json.loads((output / "results.json").read_text())
        assert ("best_of_k_accuracy" in results["after"]) == (architecture == "gpt2")
        assert ("perplexity" in results["after"]) == (script.parent.name == "hydra")
    assert_report(output, stage, printed)
    record = json.loads((output / "data.json").read_text())
    assert record.get("streaming", False) == (architecture == STREAMED)
    if stage == 3:
        assert_exported(output / "actor", stage)  # the best one
        output = output / "actor_final"
    assert_exported(output, stage)
    assert_trained(output, tiny_model(architecture))


def assert_report(output: Path, stage: int, printed: str) -> None:
    """Each stage ends with a page, and has kept what it shows."""
    assert printed.count("report: ") == 1 and "no report" not in printed
    assert (output / "report.md").read_text().startswith("# Report: result\n")
    data = re.search(r'id="data">(.*?)</script>', (output / "report.html").read_text(), flags=re.DOTALL)
    (run,) = json.loads(data[1])["runs"]
    assert run["stage"] == f"step{stage}" and run["facts"]["state"] == "finished" and run["facts"]["steps"] == "2"
    assert len(run["train"]["steps"]) == 2 and run["eval"]["steps"][0] == 0
    assert bool(run["calibration"]) == (stage == 2)
    close_ups = sorted(path.stem for path in output.glob("close_ups/*"))
    assert close_ups == [f"step_{step:06d}" for step in run["eval"]["steps"] if stage == 3]
    rows = json.loads(data[1])["rows"]
    assert all(len(row["tokens"]) == row["length"] == len(row["token_advantage"]) for row in rows if "greedy" in row)
    assert (stage == 3) == any("tokens" in row for row in rows)


@pytest.mark.ranks
def test_script_keeps_the_exit_status_and_the_last_flag_wins(tmp_path, corpus, tiny_model, run_command):
    script = ROOT / STAGES[0] / "training_scripts/gpt2/run_gpt2.sh"
    flags = ["--learning_rate", "1e-3", "--learning_rate", "-1"]
    done = run_command(
        ["bash", script, *flags], cwd=tmp_path, MODEL=tiny_model("gpt2"), DATA=corpus, OUTPUT=tmp_path, NUM_GPUS=2
    )
    assert done.returncode == 2
    assert done.stdout == (tmp_path / "training.log").read_text()
    assert done.stdout.count("error:") == 1 and "--learning_rate -1" in done.stdout


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_training_ends_with_one_line(stage, tmp_path, corpus, tiny_model, tiny_reward_model):
    flags = f"--data_path {corpus} --output_dir result --max_steps 5 --max_eval_batches 1"
    last = "last"
    if stage == STAGES[2]:
        flags += f" --actor_model_name_or_path {tiny_model('llama')} --max_answer_seq_len 8 --num_warmup_steps 0"
        flags += f" --reward_model_name_or_path {tiny_reward_model('llama')} --actor_learning_rate 1e30 --skip_doctor"
        last = "actor_last"
    else:
        flags += f" --model_name_or_path {tiny_model('llama')} --max_seq_len 64 --learning_rate 1e30"
        flags += " --per_device_train_batch_size 4"
    log = tmp_path / "console"
    status = zygote.wait(zygote.start(ROOT / stage / "main.py", shlex.split(flags), folder=tmp_path, out=log), 200)
    printed = log.read_text()
    assert status == 3 and "Traceback" not in printed, printed
    assert "training stopped. step " in printed.splitlines()[-1]
    assert "learning rate" in printed.splitlines()[-1] and f"result/{last}" in printed.splitlines()[-1]
    assert (tmp_path / f"result/{last}/model.safetensors").is_file()
    assert "**Did not go well.** Stopped at step " in (tmp_path / "result/report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "result/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] is None and lines[-1]["step"] >= 2  # the step that was lost is there too


@pytest.mark.ranks
@pytest.mark.parametrize("script", EVALUATION_SCRIPTS, ids=short)
def test_evaluation_script_runs(script, tmp_path, corpus, tiny_model, tiny_reward_model, run_command):
    if script.name == "run_rw_eval.sh":
        model, flags = tiny_reward_model("opt"), ["--data_path", corpus / "test.jsonl"]
    else:
        model, flags = tiny_model("opt"), ["--max_new_tokens", "4", "--num_prompts", "2"]
    done = run_command(
        ["bash", script, *flags, "--output", "rows.jsonl"], cwd=tmp_path, MODEL=model, BASELINE=tiny_model("opt")
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == (24 if script.name == "run_rw_eval.sh" else 5)


def test_script_without_deepspeed_says_what_to_do(tmp_path, run_command):
    # A clone without .venv and a PATH without the launcher.
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils/launch.sh").write_bytes((ROOT / "utils/launch.sh").read_bytes())
    script = tmp_path / "step1/training_scripts/gpt2/run_gpt2.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes((ROOT / STAGES[0] / "training_scripts/gpt2/run_gpt2.sh").read_bytes())
    done = run_command(["/bin/bash", script], PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert done.stdout.startswith("error: deepspeed is not on the PATH") and done.stdout.count("\n") == 1


# ------------------------------------------------------------------------------------------ the authors' command lines

FINETUNE = (
    "--data_path {data} --data_output_path {cache} --data_split 2,4,4 --model_name_or_path {model}"
    " --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --max_seq_len 512 --learning_rate 1e-5"
    " --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --zero_stage 2 --deepspeed"
    " --gradient_checkpointing --output_dir {output} --enable_tensorboard --print_loss"
)
REMAX = (
    "--algo remax --data_path {data} --data_output_path {cache} --data_split 2,4,4 --actor_model_name_or_path {model}"
    " --reward_model_name_or_path {reward} --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256"
    " --max_prompt_seq_len 256 --actor_learning_rate 1e-6 --actor_weight_decay 0.1 --num_train_epochs 1"
    " --lr_scheduler_type cosine --gradient_accumulation_steps 1 --actor_gradient_checkpointing"
    " --disable_actor_dropout --disable_reward_dropout --num_warmup_steps 0 --kl_ctl 0.05 --gamma 0.99 --deepspeed"
    " --seed 2023 --actor_zero_stage 2 --reward_zero_stage 3 --reference_zero_stage 3 --enable_hybrid_engine"
    " --output_dir {output} --enable_tensorboard --print_answers --save_answers"
)
PADDING = " --num_padding_at_beginning "
# The flags of the six scripts in the authors' repository: (stage, architecture, flags).
AUTHORS = {
    "step1 llama2": (1, "llama", FINETUNE + " --num_train_epochs 2 --weight_decay 0. --offload"),
    "step1 opt": (1, "opt", FINETUNE + " --num_train_epochs 4 --weight_decay 0. --seed 2023"),
    "step2 llama2": (2, "llama", FINETUNE + " --num_train_epochs 2 --weight_decay 0.1 --seed 1234" + PADDING + "0"),
    "step2 opt": (2, "opt", FINETUNE + " --num_train_epochs 4 --weight_decay 0.1 --seed 1234" + PADDING + "1"),
    "step3 llama2": (
        3,
        "llama",
        REMAX + PADDING + "0 --per_device_generation_batch_size 1 --per_device_training_batch_size 1"
        " --per_device_eval_batch_size 1 --offload --offload_reward_model --offload_reference_model --actor_bf16"
        " --reward_bf16 --save_at_final",
    ),
    "step3 opt": (
        3,
        "opt",
        REMAX + PADDING + "1 --per_device_generation_batch_size 4 --per_device_training_batch_size 4"
        " --per_device_eval_batch_size 4",
    ),
}


def authors_flags(name: str, folder: Path, corpus: Path, tiny_model, tiny_reward_model) -> list[str]:
    stage, architecture, flags = AUTHORS[name]
    model, reward = tiny_model(architecture), tiny_reward_model(architecture)
    cache, output = folder / "cache", folder / "output"
    return shlex.split(flags.format(data=corpus, cache=cache, model=model, reward=reward, output=output))


@pytest.mark.parametrize("name", AUTHORS)
def test_authors_line_is_understood(name, tmp_path, corpus, tiny_model, tiny_reward_model):
    parse = {1: parse_step1, 2: parse_step2, 3: parse_step3}[AUTHORS[name][0]]
    flags = authors_flags(name, tmp_path, corpus, tiny_model, tiny_reward_model)
    args = parse(flags)
    # Each flag of the line has its value, but for the retired ones, and each of those gets a line that says so.
    words = iter(flags)
    given = {word.removeprefix("--") for word in words if word.startswith("--")}
    assert given <= vars(args).keys()
    retired = {"deepspeed", "enable_hybrid_engine", "num_padding_at_beginning"}
    assert all(any(f"--{flag}" in notice for notice in args.notices) for flag in given & retired)


def test_a_misspelt_flag_is_refused(tmp_path, corpus, tiny_model, tiny_reward_model):
    flags = authors_flags("step1 opt", tmp_path, corpus, tiny_model, tiny_reward_model)
    with pytest.raises(UserError, match="--learning_rates"):
        parse_step1([*flags, "--learning_rates", "1"])


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory):
    """few_rows(n): a folder with n training rows and 4 to evaluate, so that whole epochs take seconds."""
    from remax.demo.corpus import make_corpus

    return lambda n: make_corpus(tmp_path_factory.mktemp("few_rows"), seed=1, train_rows=n, test_rows=4)


@pytest.fixture(scope="module")
def authors_lines(tmp_path_factory, few_rows, tiny_model, tiny_reward_model, can_compile):
    """{name: (output folder, exit status, what it printed)} of the authors' lines, run in one process."""
    # Whole epochs: one batch of 16 in a fifth of the rows (step 1) or two fifths (step 2), two batches for step 3.
    rows, base, jobs = (
        {"step1": 80, "step2": 40, "step3 llama2": 5, "step3 opt": 20},
        tmp_path_factory.mktemp("lines"),
        [],
    )
    for name, (stage, *_) in AUTHORS.items():
        folder = base / name.replace(" ", "_")
        folder.mkdir()
        data = few_rows(rows.get(name) or rows[name.split()[0]])
        flags = authors_flags(name, folder, data, tiny_model, tiny_reward_model)
        if not can_compile:
            flags = [flag for flag in flags if flag != "--offload"]
        job = {"program": str(ROOT / STAGES[stage - 1] / "main.py"), "flags": flags, "folder": str(folder)}
        jobs.append(job | {"log": str(folder / "printed.txt")})
    (base / "jobs.json").write_text(json.dumps(jobs))
    failed = run_mains(base, ranks=1)
    finished = json.loads((base / "jobs.done").read_text()) if (base / "jobs.done").exists() else []
    ends = itertools.zip_longest(AUTHORS, jobs, finished)
    return {name: (Path(job["folder"]) / "output", end and end["status"], failed) for name, job, end in ends}


@pytest.mark.ranks
@pytest.mark.parametrize("name", AUTHORS)
def test_authors_line_runs(name, authors_lines):
    output, status, printed = authors_lines[name]
    assert status == 0, printed
    stage = AUTHORS[name][0]
    assert_exported(output / ("actor" if stage == 3 else ""), stage)
    events = b"".join(file.read_bytes() for file in output.glob("tensorboard/*"))
    assert (b"| prompt | answer | length | reward | greedy | greedy_reward |\n" in events) == (stage == 3)
