"""remax.chat: dialogues in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from remax import chat
from remax.cli.evaluation import parse_chat
from remax.engines.pretrained import load_reward
from remax.evaluation.texts import as_sequences
from remax.stages import chat as program
from utils.run import UserError
from utils.tokenizer import load_tokenizer


@pytest.fixture
def talk(tiny_model, monkeypatch, capsys):
    """talk(lines, flags) -> what is shown after each line."""

    def talk(lines, *flags, columns=100):
        command = ["chat", "--model", tiny_model("llama"), "--max_new_tokens", 6, "--dtype", "fp32", *flags]
        monkeypatch.setattr("sys.argv", [str(part) for part in command])
        monkeypatch.setenv("COLUMNS", str(columns))
        shown, left = [], iter(lines)

        def read(prompt):
            shown.append(capsys.readouterr().out.strip())
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(program, "input", read, raising=False)
        chat.main()
        return shown[1:]

    return talk


def greedy(folder, prompt: str) -> str:
    """Six greedy tokens by transformers alone."""
    tokenizer = load_tokenizer(str(folder))
    inputs = tokenizer(prompt, return_tensors="pt")
    out = AutoModelForCausalLM.from_pretrained(folder).eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_a_dialogue_of_several_turns(talk, tiny_model):
    folder = tiny_model("llama")
    lines = ["Name a fruit.", "And a bird?", "/again", "/score", "/system Be kind.", "/again", "Name a fruit.", "/what"]
    shown = talk(lines, "--temperature", 0)
    asked = "\n\nHuman: Name a fruit.\n\nAssistant:"
    first = greedy(folder, asked)
    assert shown[0] == f"llama> {first}"
    second = greedy(folder, f"{asked} {first}\n\nHuman: And a bird?\n\nAssistant:")
    assert shown[1] == shown[2] == f"llama> {second}"
    assert shown[3] == "/score: needs a reward model; start with --reward MODEL"
    assert shown[4:6] == ["", "/again: there is no answer yet"]
    assert shown[6] == f"llama> {greedy(folder, f'Be kind.{asked}')}"
    assert shown[7] == "/what: no such command; /help lists them"


def test_answers_are_drawn_by_the_seed_and_scored(talk, tiny_reward_model):
    lines = ["Name a fruit.", "/score", "/again", "/temperature x", "/temperature 0", "/again", "/again", "/help"]
    scorer = tiny_reward_model("llama")
    shown = talk(lines, "--reward", scorer)
    assert shown[0] != shown[2] and shown[5] == shown[6]
    assert shown[3] == "/temperature x: expected a number, 0 for greedy answers, or at least 1e-6"
    assert all(command in shown[7] for command in ("/score", "/again", "/reset", "/system", "/temperature", "/quit"))
    again = talk(lines[:1], "--reward", scorer)
    assert again[0] == shown[0] != talk(lines[:1], "--seed", 1)[0]
    reward, tokenizer = load_reward(str(scorer))
    answer = shown[0].removeprefix("llama> ").strip()
    expected = reward.score(as_sequences(tokenizer, ["\n\nHuman: Name a fruit.\n\nAssistant:"], [f" {answer}"]))
    assert shown[1] == f"llama: {float(expected):.4f}"


def test_two_models_side_by_side(talk, tiny_model):
    prompt = "\n\nHuman: Name a fruit.\n\nAssistant:"
    answers = [greedy(tiny_model(name), prompt) for name in ("llama", "gpt2")]
    flags = ("--against", tiny_model("gpt2"), "--temperature", 0)
    (shown,) = talk(["Name a fruit."], *flags)
    head, *rows = [[cell.rstrip() for cell in line.split(" | ")] for line in shown.splitlines()]
    assert head == ["llama>", "gpt2>"]
    columns = [[row[k] for row in rows if len(row) > k and row[k]] for k in (0, 1)]
    assert [" ".join(column).split() for column in columns] == [answer.split() for answer in answers]
    (shown,) = talk(["Name a fruit."], *flags, columns=40)  # too narrow for that
    assert [line.strip() for line in shown.split("\n")] == [f"llama> {answers[0]}", f"gpt2> {answers[1]}"]


def test_lines_of_a_column_stay_as_they_are_while_the_text_grows():
    text = "One, two three four-five.\n\n  Six seven eight " + "nine" * 12
    for end in range(len(text)):
        before, after = program.wrapped(text[:end], 16), program.wrapped(text, 16)
        assert before[:-1] == after[: len(before) - 1]
        assert all(len(line) <= 16 for line in before)


def test_names_tell_the_models_apart():
    assert program.short_names(["output/sft"]) == ["sft"]
    assert program.short_names(["output/sft", "output/remax/actor"]) == ["sft", "actor"]
    assert program.short_names(["a/actor", "b/actor"]) == ["a/actor", "b/actor"]
    assert program.short_names(["me/model", "me/model"]) == ["me/model (1)", "me/model (2)"]


def test_a_dialogue_longer_than_the_model_is_read_from_its_end(talk):
    shown = talk(["Name a fruit. " * 600, "/reset", "Name a fruit."])
    assert shown[0].startswith("(llama: the beginning of the dialogue no longer fits, and is not read)\nllama> ")
    assert "no longer fits" not in shown[2]


class Terminal:
    """A program in a pseudo-terminal of 80 columns."""

    def __init__(self, command):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "COLUMNS")
        }
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | {"TERM": "dumb", "INPUTRC": os.devnull},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is this terminal's
        )
        os.close(slave)
        self.text = ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What comes up to a pattern."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.text += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # its end
                    assert re.search(pattern, self.text), self.text
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())


def test_a_pseudo_terminal(tiny_model, tiny_reward_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-m", "remax.chat", "--model", tiny_model("llama"), "--against", tmp_path / "adapter"]
    command += ["--reward", tiny_reward_model("llama"), "--max_new_tokens", 900]
    terminal = Terminal(command)
    try:
        terminal.until("llama and adapter; /help lists the commands")
        terminal.until("you> ")
        terminal.type("Name a fruit.\n")
        terminal.until(r"llama> +\| adapter>\n")
        terminal.until(r"\n.* \| .*\n")  # lines come before the answers end
        terminal.type("\x03")
        assert " ...\n" in terminal.until("you> ")
        terminal.type("/score\n")
        assert re.search(r"llama: -?\d\.\d{4}\nadapter: -?\d\.\d{4}\n", terminal.until("you> "))
        terminal.type("\x03")  # at the prompt it does not leave
        terminal.until(r"an empty line leaves\)\s+you> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
        os.close(terminal.master)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "required: --model"),
        ("--model ./nowhere", "--model ./nowhere: no such folder"),
        ("--model gpt2 --against ./nowhere", "--against ./nowhere: no such folder"),
        ("--model gpt2 --temperature -1", "--temperature -1.0: must be 0 for greedy answers, or at least 1e-6"),
        ("--model gpt2 --reward ./nowhere", "--reward ./nowhere: no such folder"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_chat(flags.split())


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is above 1: a dialogue takes one process"):
        parse_chat(["--model", "gpt2"])


def test_what_does_not_fit_is_refused_before_the_models_are_loaded(talk, tiny_reward_model, monkeypatch):
    monkeypatch.setattr(program, "load_actor", None)
    with pytest.raises(UserError, match="--max_new_tokens . a prompt: 5001 tokens, but the model of --model has"):
        talk([], "--max_new_tokens", 5000)
    with pytest.raises(UserError, match="--against: .*expected a causal language model"):
        talk([], "--against", tiny_reward_model("llama"))
