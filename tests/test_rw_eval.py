"""rw_eval.py: a score for every row of a file."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from remax.stages import reward_eval
from utils.data.shapes import finish
from utils.run import UserError
from utils.tokenizer import load_tokenizer

PROGRAM = Path(__file__).resolve().parent.parent / "step2_reward_model_finetuning" / "rw_eval.py"


@pytest.fixture(scope="module")
def rw_eval():
    spec = importlib.util.spec_from_file_location("rw_eval", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(rw_eval, tiny_reward_model, tmp_path, monkeypatch, capsys):
    """run(data=rows or path, flags) -> (rows of the output, what was printed)."""

    def run(data=None, *flags, architecture="llama"):
        command = ["rw_eval.py", "--model_name_or_path", tiny_reward_model(architecture), *flags]
        output = tmp_path / "scores.jsonl"
        if data is not None:
            if isinstance(data, list):
                path = tmp_path / "rows.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in data))
                data = path
            command += ["--data_path", data, "--output", output, "--data_output_path", tmp_path / "cache"]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        rw_eval.main()
        written = [json.loads(line) for line in output.read_text().splitlines()] if data is not None else []
        return written, capsys.readouterr().out

    return run


def plain_score(folder, prompt: str, answer: str) -> float:
    """The score of one text by transformers alone."""
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "mistral", "qwen2"])
def test_every_row_gets_the_score_of_its_text(run, corpus, tiny_reward_model, architecture):
    rows = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    scored, printed = run(corpus / "test.jsonl", "--batch_size", "5", architecture=architecture)
    assert [{k: row[k] for k in rows[0]} for row in scored] == rows
    assert set(scored[0]) == {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}
    for row in scored[:3] + scored[-2:]:
        for column in ("chosen", "rejected"):
            expected = plain_score(tiny_reward_model(architecture), row["prompt"], row[column])
            assert row[f"{column}_score"] == pytest.approx(expected, abs=1e-5)
    accuracy = sum(row["chosen_score"] > row["rejected_score"] for row in scored) / len(scored)
    margin = sum(row["chosen_score"] - row["rejected_score"] for row in scored) / len(scored)
    assert f"accuracy              {accuracy:.3f}" in printed and f"margin                {margin:.3f}" in printed
    tokens = load_tokenizer(str(tiny_reward_model(architecture))).tokenize
    longer = [row for row in scored if len(tokens(row["chosen"])) > len(tokens(row["rejected"]))]
    share = sum(row["chosen_score"] > row["rejected_score"] for row in longer) / len(longer)
    assert f"longer chosen       {share:.3f}  ({len(longer)} pairs)" in printed


PROMPT = "\n\nHuman: Name a bird.\n\nAssistant:"
MESSAGES = [{"role": "user", "content": "Name a bird."}]
PAIRS = {
    "text": {"prompt": PROMPT, "chosen": " An owl.", "rejected": " No."},
    "dialogues": {"chosen": PROMPT + " An owl.", "rejected": PROMPT + " No."},
    "messages": {
        "prompt": MESSAGES,
        "chosen": [{"role": "assistant", "content": "An owl."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
}


@pytest.mark.parametrize("shape", PAIRS)
def test_shapes_of_pairs(run, tiny_reward_model, shape):
    (row,), _ = run([PAIRS[shape]])
    assert {k: row[k] for k in PAIRS[shape]} == PAIRS[shape]
    assert row["chosen_score"] == pytest.approx(plain_score(tiny_reward_model("llama"), PROMPT, " An owl."), abs=1e-5)
    assert row["rejected_score"] == pytest.approx(plain_score(tiny_reward_model("llama"), PROMPT, " No."), abs=1e-5)


def test_several_ranked_answers(run, tiny_reward_model):
    answers = [" An owl.", " No.", " A robin, which sings.", "", " No."]
    rows = [
        {"prompt": PROMPT, "answers": answers[:4], "scores": [5, 1, 9, 3]},
        {"prompt": PROMPT, "answers": answers, "ranks": [1, 2, 3, 4, 5]},  # "No." contradicts itself
        {"prompt": PROMPT, "answers": [" A."], "ranks": [1]},
        {"prompt": PROMPT, "answers": answers[:2], "ranks": [1]},
    ]
    with pytest.raises(UserError, match="line 3, column 'ranks': found 1 numbers for 2 answers"):
        run(rows[1:])
    for part, order in (([rows[0]], [2, 0, 1]), (rows[1:3], [0, 2])):
        scored, printed = run(part)
        assert [{k: v for k, v in row.items() if k != "answer_scores"} for row in scored] == part
        scores = scored[0]["answer_scores"]
        for answer, score in zip(part[0]["answers"], scores, strict=True):
            assert score == pytest.approx(plain_score(tiny_reward_model("llama"), PROMPT, answer), abs=1e-5)
        pairs = [(scores[a], scores[b]) for k, a in enumerate(order) for b in order[k + 1 :]]
        accuracy = sum(better > worse for better, worse in pairs) / len(pairs)
        assert f"accuracy              {accuracy:.3f}  ({len(pairs)} pairs of 1 prompts" in printed
        best = float(max(order, key=lambda k: scores[k]) == order[0])
        assert f"best of K             {best:.3f}  (blind choice: {1 / len(order):.3f})" in printed


def test_reward_bench(run, tiny_reward_model):
    row = {
        "prompt": "Name a bird.",
        "chosen": ["An owl."],
        "rejected": ["No.", "A cow.", "Why?"],
        "total_completions": 4,
    }
    rows = [row | {"id": str(i), "subset": ("Focus", "Math")[i % 2], "num_correct": 1} for i in range(4)]
    rows[1] |= {"chosen": ["Why?"], "rejected": ["No.", "A cow.", "An owl."]}
    rows += [
        row | {"id": "ref:1", "subset": "Ties"},
        row | {"id": "tied:1", "subset": "Ties", "chosen": ["An owl.", "A jay."]},
    ]
    scored, printed = run(rows)
    folder, score = tiny_reward_model("llama"), {}
    for row, found in zip(rows, scored, strict=True):
        answers = [*row["chosen"], *row["rejected"]]
        for answer, value in zip(answers, found["answer_scores"], strict=True):
            score[answer] = score.get(answer) or plain_score(folder, PROMPT, f" {answer}")
            assert value == pytest.approx(score[answer], abs=1e-5)
    best = max(("An owl.", "No.", "A cow.", "Why?"), key=score.get)
    focus, math = float(best == "An owl."), (float(best == "An owl.") + float(best == "Why?")) / 2
    assert f"subset Focus          {focus:.3f}  (2 rows)" in printed
    assert f"subset Math           {math:.3f}  (2 rows)" in printed
    ties = float(re.search(r"subset Ties +(\S+)  \(2 rows\)", printed)[1])
    assert f"mean of subsets       {(focus + math + ties) / 3:.3f}" in printed
    pairs = [{"prompt": "Name a bird.", "chosen": "An owl.", "rejected": "No.", "subset": "xstest", "id": 1}]
    right = float(score["An owl."] > score["No."])
    assert f"subset xstest         {right:.3f}  (1 rows)" in run(pairs)[1]
    with pytest.raises(UserError, match="line 1, column 'chosen': expected messages like"):
        run([row | {"chosen": ["An owl.", 3]}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a bird.", "completion": "An owl.", "label": False},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "An owl."}]},
    ],
)
def test_shapes_of_single_answers(run, tiny_reward_model, row):
    (scored,), printed = run([row | {"id": "x"}])
    assert {k: v for k, v in scored.items() if k != "score"} == row | {"id": "x"}
    assert scored["score"] == pytest.approx(plain_score(tiny_reward_model("llama"), PROMPT, " An owl."), abs=1e-5)
    assert f"mean score            {scored['score']:.3f}" in printed and "accuracy" not in printed


def test_rows_without_a_score_stay_and_say_why(run):
    rows = [PAIRS["text"], {**PAIRS["text"], "prompt": "\n\nHuman: " + "bird " * 99 + "\n\nAssistant:"}, PAIRS["text"]]
    scored, printed = run(rows, "--max_seq_len", "60")
    assert [row["prompt"] for row in scored] == [row["prompt"] for row in rows]
    assert scored[0] == scored[2] and scored[0]["chosen_score"] is not None and "not_scored" not in scored[0]
    assert scored[1]["chosen_score"] is scored[1]["rejected_score"] is None
    assert "3 rows, 2 to score" in printed and "1 whose prompt alone fills --max_seq_len" in printed
    assert scored[1]["not_scored"] == "whose prompt alone fills --max_seq_len"


def test_long_answers_are_cut_and_an_empty_one_is_its_end_token(run, tiny_reward_model):
    rows = [{"prompt": PROMPT, "completion": " owl" * 50}, {"prompt": PROMPT, "completion": ""}]
    (long, empty), printed = run(rows, "--max_seq_len", "40")
    assert "1 of 2 answers are cut" in printed
    assert empty["score"] == pytest.approx(plain_score(tiny_reward_model("llama"), PROMPT, ""), abs=1e-5)
    assert long["score"] is not None


def test_built_in_examples(run, tiny_reward_model):
    _, printed = run()
    folder = tiny_reward_model("llama")
    for example in map(finish, reward_eval.EXAMPLES):
        assert f"good answer, score {plain_score(folder, example.prompt, example.chosen):.4f}" in printed
        assert f"bad answer, score {plain_score(folder, example.prompt, example.rejected):.4f}" in printed


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<s>\n{% endfor %}",  # a special token that is not EOS
        "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>\n{% endfor %}",  # EOS, and a BOS of its own
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # plain text
    ],
    ids=["turn", "EOS", "text"],
)
def test_the_readmes_score_of_a_chat_is_that_of_training(run, tiny_reward_model, tmp_path, template, capsys):
    folder = tmp_path / "reward"
    shutil.copytree(tiny_reward_model("llama"), folder)
    tokenizer = load_tokenizer(str(folder))
    asked = "[assistant] " if "[" in template else "assistant: "
    tokenizer.chat_template = f"{template}{{{{ '{asked}' if add_generation_prompt }}}}"
    tokenizer.save_pretrained(folder)
    readme = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
    (code,) = [block.partition("```")[0] for block in readme.split("```python\n")[1:]]
    assert '"output/reward"' in code
    found: dict = {}
    exec(code.replace('"output/reward"', repr(str(folder))), found)
    by_hand = float(capsys.readouterr().out.splitlines()[-1])
    rows = [{"messages": [found["question"], found["answer"]]}]
    (row,), _ = run(rows, "--model_name_or_path", folder)
    assert row["score"] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output x.jsonl", "--output: is for the scores of --data_path"),
        ("--data_path {data} --output {data}", "is the file of --data_path"),
        ("--data_path {data} --output {tmp}", "is a folder"),
        ("--data_path nowhere.jsonl", "--data_path: no such file"),
        ("--data_path {data} --max_seq_len 5000", "--max_seq_len: 5000 tokens, but the model"),
        ("--data_path {prompts}", "no row can be scored"),
        ("--max_seq_len 0", "--max_seq_len 0: must be at least 1"),
        ("--batchsize 3", "--batchsize: unknown flag; did you mean --batch_size"),
    ],
)
def test_bad_input_is_refused(rw_eval, tiny_reward_model, tmp_path, monkeypatch, flags, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIRS["text"]) + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    filled = flags.format(data=tmp_path / "rows.jsonl", prompts=tmp_path / "prompts.jsonl", tmp=tmp_path).split()
    command = [
        "rw_eval.py",
        "--model_name_or_path",
        tiny_reward_model("llama"),
        "--data_output_path",
        tmp_path,
        *filled,
    ]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    monkeypatch.setattr(reward_eval, "load_reward_model", None)  # too late
    with pytest.raises(UserError, match=message):
        rw_eval.main()
    assert (tmp_path / "rows.jsonl").read_text() == json.dumps(PAIRS["text"]) + "\n"


def test_a_language_model_is_no_reward_model(rw_eval, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rw_eval.py", "--model_name_or_path", str(tiny_model("llama"))])
    with pytest.raises(UserError, match="--model_name_or_path"):
        rw_eval.main()


def test_retired_flag_is_noted(run):
    _, printed = run(None, "--num_padding_at_beginning", "1")
    assert "--num_padding_at_beginning: without effect" in printed
