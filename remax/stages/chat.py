"""remax.chat from its flags to a dialogue: what is typed, the commands, and answers as they are written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from remax.cli.evaluation import HEAT, ChatArguments
from remax.core.sampling import Sampling
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor
from remax.engines.pretrained import load_actor, load_reward
from remax.engines.scorer import Reward
from remax.evaluation.answers import as_prompts, write_prompt
from remax.evaluation.texts import as_sequences
from remax.generation.streaming import Stream
from remax.models.loading import check_length, load_config, quiet_libraries
from remax.models.policy import check_policy_config
from utils.data.chat import Messages, template_of
from utils.data.shapes import Conversation, RowSkipped, finish
from utils.data.tokens import encode_prompts
from utils.distributed import device
from utils.present import present
from utils.run import UserError
from utils.tokenizer import load_tokenizer

NARROW = 60  # columns of a terminal too narrow for two answers side by side
BETWEEN = " | "
HELP = """\
/score            what the reward model gives the last answers (with --reward)
/again            answer the last message anew
/reset            begin a new dialogue
/system TEXT      set the system message, and begin anew
/temperature X    of the answers from now on; 0: greedy
/quit             leave, as do an empty line and Ctrl-D
Ctrl-C ends an answer where it is."""


@dataclass
class Speaker:
    """A model in a dialogue."""

    name: str
    flag: str
    actor: Actor
    tokenizer: PreTrainedTokenizerBase
    positions: int | None  # of the model, None: it does not say
    messages: Messages = field(default_factory=list)

    def stream(self, greedy: bool) -> tuple[Stream, bool]:
        """The answer to the messages so far, and whether their beginning had to be left out for it."""
        prompt = write_prompt(self.messages, template_of(self.tokenizer), self.flag)
        settings = self.actor.generation
        room = None if self.positions is None else self.positions - settings.max_new_tokens
        cut = room is not None and len(encode_prompts(self.tokenizer, [prompt])[0]) > room
        ids = as_prompts(self.tokenizer, [prompt], room).to(device())
        return Stream(self.actor.model.hf, ids, settings, self.tokenizer, greedy=greedy), cut


@dataclass
class Dialogue:
    """The speakers, and what the user says to them."""

    speakers: list[Speaker]
    system: str | None
    temperature: float
    top_p: float
    reward: tuple[Reward, PreTrainedTokenizerBase] | None = None

    def reset(self) -> None:
        """Forgets what was said."""
        for speaker in self.speakers:
            speaker.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> None:
        """Asks every speaker, and shows the answers."""
        for speaker in self.speakers:
            speaker.messages.append({"role": "user", "content": text})
        self.answer()

    def answer(self) -> None:
        """Shows an answer of each speaker to the messages so far, and keeps it."""
        greedy, streams = self.temperature == 0, []
        for speaker in self.speakers:
            sampling = Sampling() if greedy else Sampling(self.temperature, self.top_p)
            speaker.actor.generation = replace(speaker.actor.generation, sampling=sampling)
            stream, cut = speaker.stream(greedy)
            if cut:
                print(f"({speaker.name}: the beginning of the dialogue no longer fits, and is not read)")
            streams.append(stream)
        try:
            show(streams, [speaker.name for speaker in self.speakers])
        except KeyboardInterrupt:
            print(" ...")
        finally:
            for stream in streams:
                stream.stop()
        for speaker, stream in zip(self.speakers, streams, strict=True):
            speaker.messages.append({"role": "assistant", "content": stream.text.strip()})

    @property
    def answered(self) -> bool:
        """Whether there is a last answer."""
        return bool(self.speakers[0].messages) and self.speakers[0].messages[-1]["role"] == "assistant"

    def command(self, line: str) -> None:
        """Does what a line that begins with a slash says."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            self.reset()
        elif name == "/system":
            self.system = rest or None
            self.reset()
        elif name in ("/score", "/again") and not self.answered:
            print(f"{name}: there is no answer yet")
        elif name == "/again":
            for speaker in self.speakers:
                speaker.messages.pop()
            self.answer()
        elif name == "/score":
            self.score()
        elif name == "/temperature":
            try:
                value = float(rest)
                if not HEAT.holds(value):
                    raise ValueError
                self.temperature = value
            except ValueError:
                print(f"/temperature {rest}: expected a number, {HEAT.words}")
        else:
            print(f"{name}: no such command; /help lists them")

    def score(self) -> None:
        """Shows what the reward model gives the last answers."""
        if self.reward is None:
            print("/score: needs a reward model; start with --reward MODEL")
            return
        reward, tokenizer = self.reward
        for speaker in self.speakers:
            *before, last = speaker.messages
            try:
                example = finish(Conversation(before, last["content"]), template_of(tokenizer))
            except RowSkipped as error:
                print(f"/score: the dialogue is one {error}")
                return
            prompt, answer = present(example.prompt, "the prompt"), present(example.chosen, "the answer")
            print(f"{speaker.name}: {float(reward.score(as_sequences(tokenizer, [prompt], [answer]))):.4f}")


def run_chat(args: ChatArguments) -> None:
    """Loads the models and talks until the user leaves."""
    quiet_libraries()
    flags = ["--model", "--against"] if args.against else ["--model"]
    names = [present(getattr(args, flag[2:]), flag) for flag in flags]
    positions = []
    for flag, name in zip(flags, names, strict=True):
        config = load_config(name, flag)
        check_policy_config(config, name, flag)
        check_length(config, args.max_new_tokens + 1, "--max_new_tokens + a prompt", flag)
        load_tokenizer(name, flag)
        positions.append(getattr(config, "max_position_embeddings", None))
    if args.reward:
        load_config(args.reward, "--reward")
    engine = EngineConfig(dtype=args.dtype)
    speakers = []
    for flag, name, short, limit in zip(flags, names, short_names(names), positions, strict=True):
        actor, tokenizer = load_actor(name, flag=flag, max_new_tokens=args.max_new_tokens, engine=engine)
        speakers.append(Speaker(short, flag, actor, tokenizer, limit))
    reward = load_reward(args.reward, engine=engine, flag="--reward") if args.reward else None
    torch.manual_seed(args.seed)
    dialogue = Dialogue(speakers, args.system, args.temperature, args.top_p, reward)
    dialogue.reset()
    print(f"{' and '.join(speaker.name for speaker in speakers)}; /help lists the commands, an empty line leaves")
    talk(dialogue, input)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name that tells it from the other."""
    parts = [Path(name).parts for name in names]
    for k in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-k:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def talk(dialogue: Dialogue, read: Callable[[str], str]) -> None:
    """Reads lines, and answers them, until one is empty."""
    with suppress(ImportError):
        import readline  # noqa: F401  (edits lines, and remembers them)
    while True:
        try:
            line = read("\nyou> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(an empty line leaves)")
            continue
        if line in ("", "/quit"):
            return
        try:
            dialogue.command(line) if line.startswith("/") else dialogue.say(line)
        except UserError as error:  # such as a chat template that refuses the message
            print(f"error: {error}; a new dialogue begins")
            dialogue.reset()


def show(streams: Sequence[Stream], names: Sequence[str]) -> None:
    """Prints answers as they are written: one by tokens, two by lines, side by side where there is room."""
    columns = shutil.get_terminal_size().columns
    if len(streams) == 2 and columns >= NARROW:
        side_by_side(streams, names, (columns - len(BETWEEN)) // 2)
        return
    for stream, name in zip(streams, names, strict=True):
        print(f"{name}> ", end="", flush=True)
        begun = False
        for piece in stream:
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            print(piece, end="", flush=True)
        print()


def side_by_side(streams: Sequence[Stream], names: Sequence[str], width: int) -> None:
    """Two answers in columns; a line is printed when it is whole on both sides."""
    print(BETWEEN.join(f"{f'{name}>'[:width]:<{width}}" for name in names).rstrip())
    printed = 0
    while True:
        for stream in streams:
            next(stream, None)
        over = all(stream.done for stream in streams)
        lines = [wrapped(stream.text, width) for stream in streams]
        whole = [len(found) if stream.done else len(found) - 1 for found, stream in zip(lines, streams, strict=True)]
        ready = max(whole) if over else min(n for n, stream in zip(whole, streams, strict=True) if not stream.done)
        for row in range(printed, ready):
            print(
                BETWEEN.join(f"{found[row] if row < len(found) else '':<{width}}" for found in lines).rstrip(),
                flush=True,
            )
        printed = max(printed, ready)
        if over:
            return


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` characters; a longer text begins with the same lines, but for the last."""
    lines = []
    for paragraph in text.strip().split("\n"):
        line = ""
        for word in re.findall(r"\s*\S+", paragraph):
            if len(line) + len(word) <= width:
                line += word
                continue
            lines += [line] if line else []
            line = word.lstrip()
            while len(line) > width:
                lines.append(line[:width])
                line = line[width:]
        lines.append(line)
    return lines
