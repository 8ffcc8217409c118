"""remax.answers: from a model and a benchmark's questions to the file of answers."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from remax import answers
from remax.cli.evaluation import KNOWN_BENCHMARKS, parse_answers
from remax.evaluation.benchmarks import BENCHMARKS
from remax.stages import answers as program
from utils.run import UserError
from utils.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TURNS = [("writing", "Name a book."), ("math", "What is one and one?"), ("stem", "Name a star."), ("math", "And two?")]


@pytest.fixture
def questions(tmp_path) -> dict[str, Path]:
    """A file of questions for each benchmark."""
    rows = {
        "alpaca_eval": [{"instruction": turn, "dataset": kind} for kind, turn in TURNS],
        "mt_bench": [{"question_id": 81 + i, "category": k, "turns": [t, "Why?"]} for i, (k, t) in enumerate(TURNS)],
        "arena_hard": [{"uid": f"x{i}", "prompt": turn} for i, (_, turn) in enumerate(TURNS)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {name: tmp_path / f"{name}.jsonl" for name in rows}


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    """run(benchmark, questions, flags) -> what the file holds, without the time."""

    def run(benchmark, questions, *flags, name="mine", model=None):
        output = tmp_path / f"{name}{KNOWN_BENCHMARKS.get(str(benchmark), '.json')}"
        command = ["answers", "--model", model or tiny_model("llama"), "--benchmark", benchmark, "--output", output]
        command += ["--questions", questions] if questions else []
        command += ["--max_new_tokens", 6, "--batch_size", 2, "--data_output_path", tmp_path / "cache", *flags]
        monkeypatch.setattr("sys.argv", [str(part) for part in command])
        answers.main()
        return found_in(output)

    return run


def found_in(output: Path) -> list[dict]:
    text = output.read_text(encoding="utf-8")
    rows = json.loads(text) if output.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if name != "tstamp"} for row in rows]


def greedy(folder, prompt: str) -> str:
    """Six greedy tokens by transformers alone."""
    tokenizer = load_tokenizer(str(folder))
    inputs = tokenizer(prompt, return_tensors="pt")
    out = AutoModelForCausalLM.from_pretrained(folder).eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_the_models_greedy_ones(run, questions, tiny_model, capsys):
    rows = run("alpaca_eval", questions["alpaca_eval"])
    for row, (kind, turn) in zip(rows, TURNS, strict=True):
        expected = greedy(tiny_model("llama"), f"\n\nHuman: {turn}\n\nAssistant:")
        assert row == {"instruction": turn, "dataset": kind, "output": expected, "generator": "mine"}
    assert "4 questions, 4 answers of 6 tokens" in capsys.readouterr().out
    arena = run("arena_hard", questions["arena_hard"])
    assert [row["messages"][1]["content"]["answer"] for row in arena] == [row["output"] for row in rows]
    with pytest.raises(UserError, match="mine.json: is there already; remove it, or choose another name"):
        run("alpaca_eval", questions["alpaca_eval"])


def test_the_second_turn_of_mt_bench_sees_the_first_answer(run, questions, tiny_model):
    rows = run("mt_bench", questions["mt_bench"])
    first, second = rows[1]["choices"][0]["turns"]  # math: greedy
    prompt = f"\n\nHuman: {TURNS[1][1]}\n\nAssistant:"
    assert first == greedy(tiny_model("llama"), prompt)
    assert second == greedy(tiny_model("llama"), f"{prompt} {first}\n\nHuman: Why?\n\nAssistant:")
    again = run("mt_bench", questions["mt_bench"], name="again")
    other = run("mt_bench", questions["mt_bench"], "--seed", 1, name="other")
    turns = [[row["choices"][0]["turns"] for row in found] for found in (rows, again, other)]
    assert turns[0] == turns[1]
    assert [a == b for a, b in zip(turns[0], turns[2], strict=True)] == [False, True, False, True]  # math is greedy
    cold = run("mt_bench", questions["mt_bench"], "--temperature", 0, name="cold")
    assert cold[0]["choices"][0]["turns"][0] == greedy(tiny_model("llama"), f"\n\nHuman: {TURNS[0][1]}\n\nAssistant:")


def test_later_turns_too_long_for_the_model_are_read_from_their_end(run, questions, tiny_model, tmp_path, capsys):
    folder = tmp_path / "short"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    run("mt_bench", questions["mt_bench"], model=folder)
    assert "4 of 4 later turns came after more than 34 tokens, of which the last were read" in capsys.readouterr().out


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"


def test_the_chat_template_writes_the_questions_and_adapters_are_merged(run, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    own = tmp_path / "own.txt"
    own.write_text("Name a bird.\n\n\n\n")
    (row,) = run(own, None, model=tmp_path / "adapter")
    expected = greedy(tmp_path / "merged", "<user>Name a bird.<assistant>")
    assert row == {"instruction": "Name a bird.", "output": expected, "generator": "mine"}
    assert expected != greedy(base, "<user>Name a bird.<assistant>")
    # Of messages the instruction is the same for models of any template.
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": [{"role": "user", "content": "Name a bird."}]}) + "\n")
    (row,) = run(own, None, model=tmp_path / "adapter", name="messages")
    assert (row["instruction"], row["output"]) == ("\n\nHuman: Name a bird.\n\nAssistant:", expected)


def test_own_prompts_in_any_shape(run, corpus, tmp_path):
    expected = [json.loads(line)["prompt"] for line in (corpus / "test.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in run(corpus / "test.jsonl", None)] == expected
    own = tmp_path / "own.jsonl"
    own.write_text('{"instruction": "Why?", "id": 3}\n')
    (row,) = run(own, None, name="other")
    assert (row["instruction"], row["id"]) == ("Why?", 3)


class Stopped(Exception):
    pass


@pytest.fixture
def stopped(run, questions, tmp_path, monkeypatch) -> Path:
    """Parts of MT-bench's answers: of the second batch the first turn was answered, and its line is torn."""
    sound, calls = program.one_answer_each, []

    def stop(*args, **options):
        if len(calls) == 3:
            raise Stopped
        calls.append(None)
        return sound(*args, **options)

    monkeypatch.setattr(program, "one_answer_each", stop)
    with pytest.raises(Stopped):
        run("mt_bench", questions["mt_bench"], "--batch_size", 1, name="parts")
    monkeypatch.setattr(program, "one_answer_each", sound)
    folder = tmp_path / "parts.jsonl.parts"
    with (folder / "rank0.jsonl").open("a") as file:
        file.write('\n[3, [[{"text"')
    assert not (tmp_path / "parts.jsonl").exists()
    return folder


def test_it_goes_on_where_it_was_stopped(run, questions, stopped, capsys):
    asked = questions["mt_bench"]
    with pytest.raises(UserError, match=r"parts.jsonl.parts: holds answers under another max_new_tokens; remove that"):
        run("mt_bench", asked, "--batch_size", 1, "--max_new_tokens", 5, name="parts")
    whole = run("mt_bench", asked, "--batch_size", 1)
    assert "already" not in capsys.readouterr().out
    found = run("mt_bench", asked, "--batch_size", 1, name="parts")
    assert "1 of 4 questions are answered already" in capsys.readouterr().out
    assert [row["choices"] for row in found] == [row["choices"] for row in whole]
    assert not stopped.exists()


@pytest.mark.ranks
def test_programs_on_two_ranks(
    run, run_command, questions, stopped, tiny_model, tiny_reward_model, corpus, tmp_path, monkeypatch
):
    # Answers, which go on from one rank's, and scores of rw_eval.py, in one launch.
    whole = run("mt_bench", questions["mt_bench"], "--batch_size", 1)
    asked = ["--model", tiny_model("llama"), "--benchmark", "mt_bench", "--questions", questions["mt_bench"]]
    asked += ["--batch_size", 1, "--output", tmp_path / "parts.jsonl", "--max_new_tokens", 6]
    scored = ["--data_path", corpus / "test.jsonl", "--model_name_or_path", tiny_reward_model("llama")]
    scored += ["--data_output_path", tmp_path / "cache", "--output"]
    scorer = ROOT / "step2_reward_model_finetuning" / "rw_eval.py"
    monkeypatch.setattr("sys.argv", [str(word) for word in ("rw_eval.py", *scored, tmp_path / "alone.jsonl")])
    runpy.run_path(str(scorer))["main"]()
    jobs = [
        {"program": ROOT / "remax" / "answers.py", "flags": asked, "log": tmp_path / "answers.log"},
        {"program": scorer, "flags": [*scored, tmp_path / "ranks.jsonl"], "log": tmp_path / "scores.log"},
    ]
    (tmp_path / "jobs.json").write_text(
        json.dumps([job | {"folder": tmp_path, "flags": list(map(str, job["flags"]))} for job in jobs], default=str)
    )
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", ROOT / "tests" / "mains.py", tmp_path / "jobs.json"]
    done = run_command(command, timeout=200)
    assert done.returncode == 0, done.stdout
    printed = (tmp_path / "answers.log").read_text()
    assert "1 of 4 questions are answered already" in printed and printed.count("written to") == 1
    named = [row | {"answer_id": "", "model_id": "mine"} for row in found_in(tmp_path / "parts.jsonl")]
    assert named == [row | {"answer_id": ""} for row in whole]
    assert not stopped.exists()
    alone, together = found_in(tmp_path / "alone.jsonl"), found_in(tmp_path / "ranks.jsonl")
    assert len(together) == len(alone) == 24
    for a, b in zip(alone, together, strict=True):
        assert a["prompt"] == b["prompt"] and a["chosen_score"] == pytest.approx(b["chosen_score"], abs=1e-5)
    assert (tmp_path / "scores.log").read_text().count("accuracy") == 1


def test_the_command_line_knows_the_benchmarks():
    assert {name: benchmark.suffix for name, benchmark in BENCHMARKS.items()} == KNOWN_BENCHMARKS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--benchmark alpaca_eval --output x.json", "--benchmark alpaca_eval: give its questions, too, by --questions"),
        ("--benchmark nowhere.txt --output x.json", "--benchmark nowhere.txt: no such file; expected one of alpaca_"),
        ("--benchmark q.txt --questions q.txt --output x.json", "q.txt: with --questions expected one of alpaca_eval,"),
        ("--benchmark q.txt --output x.jsonl", "--output x.jsonl: expected a name that ends in .json, by which"),
        ("--benchmark q.txt --output q.json --temperature 1e-7", "--temperature 1e-07: must be 0 for greedy answers"),
        ("--benchmark q.txt --output x.json --model ./nowhere", "--model ./nowhere: no such folder"),
        ("--output x.json", "required: --benchmark"),
    ],
)
def test_bad_flags_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.txt").write_text("Why?\n")
    with pytest.raises(UserError, match=message):
        parse_answers(["--model", "gpt2", *flags.split()])


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("alpaca_eval", "--questions empty.json", "--questions empty.json: holds no question; expected rows with an"),
        ("mt_bench", "", "alpaca_eval.jsonl: line 1 has no 'question_id'"),
        (
            "alpaca_eval",
            "--max_new_tokens 5000",
            r"the longest question \(\d+\) . --max_new_tokens: 50\d\d tokens, but",
        ),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(run, questions, tmp_path, monkeypatch, name, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "load_actor", None)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match=message):
        run(name, questions["alpaca_eval"], *flags.split())
