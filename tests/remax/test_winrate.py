"""remax.winrate: from files of answers and a judge to rates."""

from __future__ import annotations

import functools
import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from remax import winrate
from remax.cli.evaluation import parse_winrate
from remax.evaluation import winrates
from remax.evaluation.judges import CASE
from remax.stages import winrate as program
from utils.run import UserError
from utils.tokenizer import load_tokenizer

FRUIT = (
    "A fig.",
    "A pear, or two figs.",
    "Plums, as they are sweet and ripe in the late summer.",
    "No.",
    "Why?",
    "A nut.",
)
QUESTIONS = [f"Name {count} fruits." for count in ("one", "two", "three", "four", "five", "six")]


@pytest.fixture
def sklearn(monkeypatch):
    monkeypatch.setattr(winrates, "REFITS", 20)  # a tenth of what intervals are made of
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install -c constraints.txt -e .")


@pytest.fixture
def answers(tmp_path):
    """Files of the answers of models a, b and c, in which every model gives each of FRUIT once."""
    files = []
    for shift, name in enumerate("abc"):
        rows = [
            {"instruction": question, "output": FRUIT[(i + shift) % 6], "generator": name}
            for i, question in enumerate(QUESTIONS)
        ]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(rows))
    return files


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words) -> str:
        monkeypatch.setattr("sys.argv", ["winrate", *map(str, words)])
        winrate.main()
        return capsys.readouterr().out

    return run


def figures(printed: str) -> dict:
    return json.loads(printed[printed.index("{") :])


@functools.cache
def loaded(kind, folder):
    return load_tokenizer(str(folder)), kind.from_pretrained(folder).eval()


def reward(folder, question: str, answer: str) -> float:
    """A score by transformers alone."""
    tokenizer, model = loaded(AutoModelForSequenceClassification, folder)
    ids = tokenizer(f"\n\nHuman: {question}\n\nAssistant: {answer}")["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def test_a_reward_model_judges(sklearn, run, answers, tiny_reward_model, tmp_path):
    folder = tiny_reward_model("llama")
    judge = ("--judge", f"reward:{folder}", "--output", tmp_path / "verdicts.json", "--dtype", "fp32")
    found = figures(run(*answers[:2], *judge, "--json"))
    rewards = [[reward(folder, q, FRUIT[(i + shift) % 6]) for i, q in enumerate(QUESTIONS)] for shift in (0, 1)]
    p = [1 / (1 + math.exp(b - a)) for a, b in zip(*rewards, strict=True)]
    (pair,) = found["pairs"]
    assert pair["models"] == ["b", "a"] and found["ratings"] == {}  # a over b
    assert pair["raw"]["value"] == pytest.approx(100 * sum(p) / 6, abs=1e-4)
    assert pair["discrete"]["value"] == pytest.approx(100 * sum(value > 0.5 for value in p) / 6)
    rows = json.loads((tmp_path / "verdicts.json").read_text())
    assert [row["preference"] - 1 for row in rows] == pytest.approx(p, abs=1e-5)
    columns = {"instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator", "preference", "index"}
    assert set(rows[0]) == columns | {"verdict"}
    assert (rows[0]["output_2"], rows[0]["generator_2"]) == (FRUIT[0], "a")

    # The verdicts as annotations give the same, and turned around the opposite.
    printed = run("--judge", f"annotations:{tmp_path / 'verdicts.json'}", "--lengths")
    assert "a over b, 6 comparisons" in printed and f"win rate             {pair['raw']['value']:5.1f} %" in printed
    assert "a's answer is longer by   comparisons   win rate" in printed
    turned = figures(run(*answers[1::-1], "--judge", f"annotations:{tmp_path / 'verdicts.json'}", "--json"))
    assert turned["pairs"][0]["raw"]["value"] == pytest.approx(100 - pair["raw"]["value"])


def test_several_models_are_rated(sklearn, run, answers, tiny_reward_model):
    printed = run(*answers, "--judge", f"reward:{tiny_reward_model('llama')}")
    assert all(f"{pair}, 6 comparisons" in printed for pair in ("a over b", "a over c", "b over c"))
    assert "ratings" in printed and sum(line.strip().startswith(tuple("abc")) for line in printed.splitlines()) >= 6


def letter(folder, text: str) -> float:
    """P(A) / (P(A) + P(B)) after a text, by transformers alone."""
    tokenizer, model = loaded(AutoModelForCausalLM, folder)
    odds = []
    for reply in (" A", " B"):
        ids, start = tokenizer(text + reply)["input_ids"], len(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        odds.append(sum(float(logprobs[k - 1, ids[k]]) for k in range(start, len(ids))))
    return 1 / (1 + math.exp(odds[1] - odds[0]))


def test_a_language_model_judges_in_both_orders(sklearn, run, answers, tiny_model, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(tiny_model("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # a bold judge: one that a tiny random model's even odds would hide
        model.lm_head.weight.mul_(30)
    model.save_pretrained(folder)
    flags = ("--judge", f"lm:{folder}", "--json", "--dtype", "fp32")
    found = figures(run(*answers[:2], *flags, "--output", tmp_path / "verdicts.json"))
    first, wins, decided = [], [], []
    for i, question in enumerate(QUESTIONS):
        a, b = FRUIT[i], FRUIT[(i + 1) % 6]
        orders = [CASE.format(question=question, first=x, second=y) for x, y in ((a, b), (b, a))]
        shown = [letter(folder, f"\n\nHuman: {order}\n\nAssistant:") for order in orders]
        first += shown
        wins.append((shown[0] + 1 - shown[1]) / 2)
        agree = (shown[0] > 0.5) == (shown[1] < 0.5)
        decided.append(float(shown[0] > 0.5) if agree else 0.5)
    rows = json.loads((tmp_path / "verdicts.json").read_text())
    assert [row["preference"] - 1 for row in rows] == pytest.approx(wins, abs=1e-3)
    assert [row["verdict"] for row in rows] == decided
    (pair,) = found["pairs"]
    assert pair["raw"]["value"] == pytest.approx(100 * sum(wins) / 6, abs=0.1)
    assert pair["discrete"]["value"] == pytest.approx(100 * sum(decided) / 6)
    assert pair["positions"]["first"] == pytest.approx(sum(first) / 12, abs=1e-3)
    assert pair["positions"]["disagreements"] == pytest.approx(decided.count(0.5) / 6)
    printed = run("--judge", f"annotations:{tmp_path / 'verdicts.json'}")  # keeps which verdicts were ties
    assert f"by verdicts, {decided.count(0.5)} ties count half" in printed
    with pytest.raises(UserError, match=r"--judge: every comparison is longer than the 20 tokens that the judge reads"):
        run(*answers[:2], *flags, "--max_seq_len", 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.json b.json", "required: --judge"),
        ("a.json b.json --judge gpt4", "--judge gpt4: expected reward:MODEL, lm:MODEL or annotations:FILE"),
        ("a.json b.json --judge reward:./nowhere", "--judge ./nowhere: no such folder"),
        ("a.json --judge reward:gpt2", "1 files of answers are given; expected two or more, such as A.json B.json"),
        ("a.json nowhere.json --judge reward:gpt2", "--answers nowhere.json: no such file"),
        ("a.json ./a.json a.json --judge reward:gpt2", "--answers a.json: is given twice"),
        ("a.json b.json --judge reward:gpt2 --output b.json", "--output b.json: is a file of --answers"),
        ("a.json b.json --judge reward:gpt2 --difficulty c.json --output c.json", "is the file of --difficulty"),
        ("--judge annotations:a.json --output c.json", "--output: is for the verdicts of a model"),
        ("--judge annotations:a.json --difficulty no.csv", "--difficulty no.csv: no such file"),
    ],
)
def test_bad_flags_are_refused(answers, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parse_winrate(words.split())


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (
            [{"instruction": "Why?"}],
            "--judge reward:{R}",
            "--answers b.json: row 1 has no text in output; expected ans",
        ),
        ([], "--judge reward:{R}", "--answers b.json: holds no answer"),
        (
            [{"instruction": "Why?", "output": ""}],
            "--judge reward:{R}",
            "--answers: a and b have no instruction in com",
        ),
        (
            [{"instruction": "?", "output": "", "generator": "a"}],
            "--judge reward:{R}",
            "two files call their model 'a'",
        ),
        (None, "--judge reward:{R} --max_seq_len 5000", "--max_seq_len: 5000 tokens, but the model of --judge has"),
        (None, "--judge lm:{R}", "--judge: .*expected a causal language model"),
        (None, "--judge annotations:b.json", "--judge b.json: row 1 has no text in output_1, output_2, generator_1"),
        (None, "--judge annotations:nowhere.json", "--judge nowhere.json: no such file"),
        (
            [{"instruction": "?", "output": "x", "generator": "other"}],
            "--judge annotations:v.json",
            "compares a, b, and not",
        ),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    sklearn, run, answers, tiny_reward_model, tmp_path, monkeypatch, change, words, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("load_reward", "load_actor"):
        monkeypatch.setattr(program, name, None)
    if change is not None:
        (tmp_path / "b.json").write_text(json.dumps(change))
    verdict = {
        "instruction": "?",
        "output_1": "",
        "generator_1": "a",
        "output_2": "",
        "generator_2": "b",
        "preference": 1,
    }
    (tmp_path / "v.json").write_text(json.dumps([verdict]))
    with pytest.raises(UserError, match=message):
        run("a.json", "b.json", *words.format(R=tiny_reward_model("llama")).split())


def test_a_missing_scikit_learn_is_said_first(run, answers, monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="scikit-learn is not installed, which fits the rates: pip install"):
        run(*answers[:2], "--judge", "reward:gpt2")
