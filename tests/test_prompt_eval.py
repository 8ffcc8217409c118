"""prompt_eval.py: answers of one model, or of two side by side."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from remax.cli.evaluation import parse_prompt_eval
from remax.stages import prompt_eval
from utils.run import UserError
from utils.tokenizer import load_tokenizer

PROGRAM = Path(__file__).resolve().parent.parent / "step1_supervised_finetuning" / "prompt_eval.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("prompt_eval", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(program, tiny_model, tmp_path, monkeypatch, capsys):
    """run(flags) -> (rows of the output, what was printed); a GPT-2 before, a Llama after."""

    def run(*flags, baseline=True):
        command = ["prompt_eval.py", "--model_name_or_path_finetune", tiny_model("llama")]
        command += ["--model_name_or_path_baseline", tiny_model("gpt2")] if baseline else []
        command += ["--output", tmp_path / "answers.jsonl"]
        command += ["--data_output_path", tmp_path / "cache", "--max_new_tokens", 6, *flags]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        program.main()
        rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        return rows, capsys.readouterr().out

    return run


def greedy(folder, prompt: str) -> str:
    """Six greedy tokens by transformers alone, one prompt at a time."""
    tokenizer = load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("language", ["English", "Chinese", "Japanese"])
def test_built_in_prompts(run, tiny_model, language):
    rows, printed = run("--language", language, "--batch_size", 3)
    assert len(rows) == len(prompt_eval.QUESTIONS[language]) == 5
    for row, question in zip(rows, prompt_eval.QUESTIONS[language], strict=True):
        assert row["prompt"] == f"\n\nHuman: {question}\n\nAssistant:" and question in printed
        for model, architecture in (("baseline", "gpt2"), ("finetune", "llama")):
            assert set(row[model]) == {"greedy", "sampled"}
            assert row[model]["greedy"][0]["text"] == greedy(tiny_model(architecture), row["prompt"])


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("What is red?\n\n  What is blue?  \nUser: Done? Assistant:\n\n", encoding="utf-8")
    return path


def test_both_models_answer_one_under_the_other(run, questions):
    (row,), printed = run("--num_prompts", 1, "--prompts_file", questions)
    lines = printed.splitlines()
    assert "===== 1/1 =====" in lines
    for kind in ("greedy", "sampled"):
        at = lines.index(f"--- {kind}")
        for line, model in zip(lines[at + 1 : at + 3], ("baseline", "finetune"), strict=True):
            answer = row[model][kind][0]
            assert line.startswith(f"{model} ({answer['tokens']} tokens{'' if answer['ended'] else ', cut'}): ")
            assert answer["tokens"] == 6 or answer["ended"]


def test_prompts_of_a_text_file(run, questions):
    rows, _ = run("--prompts_file", questions)
    assert [row["prompt"] for row in rows] == [
        "\n\nHuman: What is red?\n\nAssistant:",
        "\n\nHuman: What is blue?\n\nAssistant:",
        "User: Done? Assistant:",  # already a dialogue
    ]


CHAT = (
    "{% for m in messages %}{{ raise_exception('no goats') if 'goat' in m.content }}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)


def test_questions_are_put_by_the_chat_template_to_one_model_alone(run, tiny_model, questions, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model("llama"), folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    chat = ("--model_name_or_path_finetune", folder)
    rows, printed = run(*chat, "--prompts_file", questions, baseline=False)
    assert [row["prompt"] for row in rows] == [
        "<user>What is red?<assistant>",
        "<user>What is blue?<assistant>",
        "User: Done? Assistant:",  # already a dialogue
    ]
    assert all(set(row) == {"prompt", "finetune"} for row in rows) and "baseline" not in printed
    assert rows[0]["finetune"]["greedy"][0]["text"] == greedy(folder, rows[0]["prompt"])
    rows, _ = run(*chat)
    assert rows[0]["prompt"] == f"<user>{prompt_eval.QUESTIONS['English'][0]}<assistant>"
    assert set(rows[0]) == {"prompt", "baseline", "finetune"}
    questions.write_text("Why?\nWhy do goats climb?\n")
    with pytest.raises(UserError, match="'Why do goats climb.' is one that the chat template refuses .no goats."):
        run(*chat, "--prompts_file", questions)


def test_prompts_of_a_data_set(run, corpus):
    expected = [json.loads(line)["prompt"] for line in (corpus / "test.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in run("--data_path", corpus, "--num_prompts", 3)[0]] == expected[:3]
    assert [row["prompt"] for row in run("--data_path", corpus / "test.jsonl", "--num_prompts", 0)[0]] == expected


def test_ways_of_decoding(run, questions):
    flags = ["--prompts_file", questions, "--num_return_sequences", 3]
    rows, printed = run(*flags, "--num_beams", 2)
    for row in rows:
        for model in ("baseline", "finetune"):
            assert {kind: len(found) for kind, found in row[model].items()} == {"greedy": 1, "sampled": 3, "beam": 2}
    assert "--- sampled 3" in printed and "--- beam 2" in printed and "--- beam 3" not in printed
    again, _ = run(*flags)
    other, _ = run(*flags, "--seed", 1)
    samples = [[row["finetune"]["sampled"] for row in found] for found in (rows, again, other)]
    assert samples[0] == samples[1] != samples[2]
    cold, _ = run(*flags, "--top_k", 1)
    assert all(set(map(str, row["baseline"]["sampled"])) == {str(row["baseline"]["greedy"][0])} for row in cold)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--penalty_alpha 0.6 --top_k 4", "--penalty_alpha 0.6: contrastive search has left transformers"),
        ("--num_beam_groups 2 --num_beams 4", "--num_beam_groups 2: diverse beam search has left transformers"),
        ("--language Latin", "--language: invalid choice: 'Latin'"),
        ("--prompts_file nowhere.txt", "--prompts_file nowhere.txt: no such file"),
        ("--prompts_file a --data_path b", "--prompts_file with --data_path"),
        ("--top_p 1.5", "--top_p 1.5: must be above 0 and at most 1"),
        ("--model_name_or_path_baseline ./nowhere", "--model_name_or_path_baseline ./nowhere: no such folder"),
        ("--num_return_sequence 2", "did you mean --num_return_sequences"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    models = "--model_name_or_path_baseline gpt2 --model_name_or_path_finetune gpt2 ".split()
    with pytest.raises(UserError, match=message):
        parse_prompt_eval(models + flags.split())


def test_defaults_of_known_flags():
    args = parse_prompt_eval("--model_name_or_path_baseline gpt2 --model_name_or_path_finetune gpt2".split())
    assert (args.num_beams, args.num_beam_groups, args.num_return_sequences, args.max_new_tokens) == (1, 1, 1, 100)
    assert (args.penalty_alpha, args.top_k, args.language) == (0, 0, "English")


def test_an_answer_that_does_not_fit_is_refused_before_loading(run, questions, monkeypatch):
    monkeypatch.setattr(prompt_eval, "load_actor", None)
    with pytest.raises(
        UserError, match=r"the longest prompt \(\d+\) \+ --max_new_tokens: 20\d\d tokens, but the model of "
    ):
        run("--max_new_tokens", 2000)


def test_a_file_that_is_not_utf_8_is_refused(run, questions):
    questions.write_bytes(b"What?\n\xff\xfe")
    with pytest.raises(UserError, match=r"--prompts_file .*: line 2 is not UTF-8 \(invalid start byte\)"):
        run("--prompts_file", questions)


def test_a_file_without_prompts_is_refused(run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="--prompts_file .*empty.txt: holds no prompt"):
        run("--prompts_file", tmp_path / "empty.txt")
