"""What each stage reads: from its flags to the rows of real files."""

from __future__ import annotations

import json
import shlex

import pytest

from remax.cli.validate import parse_step1, parse_step2, parse_step3
from remax.stages.data import data_config, finetune_loaders, load_data
from utils.data.config import DataConfig
from utils.tokenizer import load_tokenizer

DATA = (
    "--data_path a:1 b:2 --data_split 1,2,3 --data_seed 5 --seed 6 --data_output_path cache --overlong cut"
    " --prompt_column p --chosen_column c --rejected_column r --shuffle_buffer 7 --max_steps 8 --streaming"
)
EXPECTED = DataConfig(
    data_path=["a:1", "b:2"],
    columns={"prompt": "p", "chosen": "c", "rejected": "r"},
    data_split="1,2,3",
    data_seed=5,
    seed=6,
    cache_dir="cache",
    overlong="cut",
    streaming=True,
    shuffle_buffer=7,
    record_in="out",
)


def described(config: DataConfig) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}


@pytest.mark.parametrize(
    ("parse", "model", "line", "more"),
    [
        (parse_step1, "model", "--sft_only_data_path x", {"sft_only_data_path": ["x"]}),
        (parse_step1, "model", "--train_on all", {"train_on": "all"}),
        (parse_step2, "model", "", {}),
        (parse_step2, "model", "--use_margin", {"need_margin": True}),
        (parse_step2, "model", "--loss dpo", {"best_and_worst": True}),
        (parse_step2, "model", "--loss r-dpo", {"best_and_worst": True}),
        (parse_step2, "model", "--loss hydra --use_margin", {"best_and_worst": True, "need_margin": True}),
        (parse_step3, "actor_model", "--reward_model_name_or_path m/r", {}),
        (parse_step3, "actor_model", "--reward_fn {rules}:plain", {}),
        (parse_step3, "actor_model", "--reward_fn {rules}:plain {rules}:right", {"keep": frozenset({"solution"})}),
        (parse_step3, "actor_model", "--reward_fn {rules}:right {rules}:all", {"keep": frozenset({"solution", "*"})}),
    ],
)
def test_what_the_flags_say_about_the_data(parse, model, line, more, tmp_path):
    (tmp_path / "rules.py").write_text(
        "def plain(prompt, answer, ended): return 1.0\ndef right(prompt, answer, solution, tokens): return 1.0\n"
        "def all(prompts, answers, **columns): return [1.0] * len(answers)\n"
    )
    line = line.format(rules=tmp_path / "rules.py")
    args = parse(shlex.split(f"--{model}_name_or_path m/m {DATA} {line}"))
    assert described(data_config(args, "out")) == described(EXPECTED) | more
    stored = DATA.replace(" --streaming", "").replace(" --shuffle_buffer 7", "") + " --preprocessing_num_workers 9"
    args = parse(shlex.split(f"--{model}_name_or_path m/m {stored} {line}"))
    changed = {"streaming": False, "shuffle_buffer": 10_000, "num_proc": 9, "record_in": None}
    assert described(data_config(args)) == described(EXPECTED) | changed | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 prompts with two answers, 9 held out, and a plain text."""
    folder = tmp_path_factory.mktemp("data")
    for split, n in (("train", 60), ("test", 9)):
        prompts = [f"\n\nHuman: {split} {i}?\n\nAssistant:" for i in range(n)]
        rows = [{"prompt": prompt, "chosen": f" good {i}", "rejected": " bad"} for i, prompt in enumerate(prompts)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = "".join(json.dumps({"text": f"A text about number {i}. " * 9}) + "\n" for i in range(40))
    (folder.parent / "text.jsonl").write_text(texts)
    return folder


@pytest.fixture
def tokenizer(make_policy):
    return load_tokenizer(str(make_policy("llama")))


def common(folder, tmp_path) -> str:
    return (
        f"--data_path {folder} --data_split 1,2,3 --data_output_path {tmp_path} --output_dir {tmp_path}"
        " --per_device_eval_batch_size 2"
    )


def texts(tokenizer, batches, name: str) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for batch in batches for ids in getattr(batch, name)]


def test_steps_1_and_2_read_their_shares(folder, tokenizer, tmp_path):
    flags = f"--model_name_or_path m/m {common(folder, tmp_path)} --max_seq_len 60 --per_device_train_batch_size 5"
    read = {}
    for parse, name, rows in ((parse_step1, "input_ids", 10), (parse_step2, "chosen_ids", 20)):
        train, held_out = finetune_loaders(parse(shlex.split(f"{flags} --max_eval_batches 3")), tokenizer)
        read[name] = texts(tokenizer, train, name)
        assert len(read[name]) == rows and all("Human: train" in text for text in read[name])
        few = texts(tokenizer, held_out, name)
        assert len(few) == 3 * 2 and all("Human: test" in text for text in few)
        _, held_out = finetune_loaders(parse(shlex.split(flags)), tokenizer)
        assert len(list(held_out)) == 5  # 9 rows
    assert not set(read["input_ids"]) & set(read["chosen_ids"])


def test_step_3_reads_prompts_and_evaluates_on_others(folder, tokenizer, tmp_path):
    flags = (
        f"--actor_model_name_or_path m/m --reward_model_name_or_path m/r {common(folder, tmp_path)}"
        " --max_prompt_seq_len 30 --max_answer_seq_len 10 --per_device_generation_batch_size 5"
        f" --per_device_training_batch_size 5 --unsupervised_dataset_name {folder.parent}/text.jsonl"
        " --per_device_unsupervised_batch_size 7"
    )

    def read(line: str = ""):
        return load_data(parse_step3(shlex.split(f"{flags} {line}")), tokenizer, tmp_path)

    data = read()
    prompts = [prompt for batch in data.train for prompt in batch.prompts]
    assert len(prompts) == 30 and all("Human: train" in prompt for prompt in prompts)
    held_out = [prompt for batch in data.evaluation for prompt in batch.prompts]
    assert set(held_out) == {f"\n\nHuman: test {i}?\n\nAssistant:" for i in range(9)}
    chosen = texts(tokenizer, data.answers, "input_ids")
    assert {text.split()[-1] for text in chosen} == {str(i) for i in range(9)} and " good" in chosen[0]
    assert [len(batch) for batch in data.evaluation] == [len(batch) for batch in data.answers] == [2, 2, 2, 2, 1]
    block = next(data.plain_text).input_ids
    assert block.shape == (7, 30 + 10)  # as long as a prompt with its answer
    assert next(read("--per_device_training_batch_size 1").plain_text).input_ids.equal(
        block
    )  # whatever the micro-batch
    some = read("--max_eval_batches 2")
    assert len(list(some.evaluation)) == len(list(some.answers)) == 2
    # The order follows --seed, of prompts as of texts; which rows are read follows --data_seed.
    again, other, shares = read(), read("--seed 1"), read("--data_seed 1")

    def order(data) -> list[str]:
        return [prompt for batch in data.train for prompt in batch.prompts]

    assert order(again) == prompts != order(other) and sorted(order(other)) == sorted(prompts)
    assert sorted(order(shares)) != sorted(prompts)
    assert next(again.plain_text).input_ids.equal(block) and next(shares.plain_text).input_ids.equal(block)
    assert not next(other.plain_text).input_ids.equal(block)
    steps = [next(data.plain_text).input_ids for _ in range(3)]
    assert not any(step.equal(block) for step in steps)
    assert (tmp_path / "data.json").is_file()
