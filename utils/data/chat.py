"""Messages -> text: by the tokenizer's chat template where it has one, else as plain Human/Assistant dialogue.

Both ways give the same three things: the prompt, ending where the assistant's answer begins; the answer as it follows;
and where the assistant's earlier answers stand in the prompt, so that they can be learned too.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.run import one_line

ASSISTANT = "\n\nAssistant:"
EARLIER = re.compile(r"\n\nAssistant:(.*?)(?=\n\nHuman:)", re.DOTALL)
MARK = "\ue000{}\ue001"  # private characters: no text holds them
Messages = list[dict[str, str]]
Spans = tuple[tuple[int, int], ...]  # (start, end) of each earlier answer, in characters of the prompt


class TemplateRefuses(Exception):
    """The chat template cannot write these messages; the message of the exception says why."""


def write_plain(messages: Messages) -> tuple[str, Spans]:
    """Messages as a Human/Assistant prompt, and where its earlier answers stand; a system message comes first, bare."""
    text, spans = "", []
    for message in messages:
        if message["role"] == "assistant":
            text += ASSISTANT
            spans.append((len(text), len(text) + 1 + len(message["content"])))
            text += " " + message["content"]
        else:
            text += {"system": "", "user": "\n\nHuman: "}[message["role"]] + message["content"]
    return text + ASSISTANT, tuple(spans)


def earlier_answers(prompt: str) -> Spans:
    """The answers within a prompt that is written as Human/Assistant dialogue; none in other prompts."""
    return tuple(found.span(1) for found in EARLIER.finditer(prompt))


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def render(self, messages: Messages, ask: bool) -> str:
        """The template's text; `ask`: up to where the assistant begins."""
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
        except (TemplateError, TypeError) as error:  # the template's own refusal, or something that it misses
            raise TemplateRefuses(one_line(error) or type(error).__name__) from error

    def prompt(self, messages: Messages) -> tuple[str, Spans | None]:
        """The messages as a prompt, and where its earlier answers stand, each with the token that ends it.

        None instead of the places when the template rewrites the answers, so that they cannot be found.
        """
        text = self.render(messages, ask=True)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return text, ()
        marked = list(messages)
        for i in turns:
            marked[i] = {**messages[i], "content": MARK.format(i)}
        pieces = re.split("|".join(MARK.format(i) for i in turns), self.render(marked, ask=True))
        if len(pieces) != len(turns) + 1:
            return text, None
        contents = [messages[i]["content"] for i in turns]
        for answers in (contents, [content.strip() for content in contents]):  # some templates strip
            written, spans = pieces[0], []
            for answer, after in zip(answers, pieces[1:], strict=True):
                closing = commonprefix([after, self.turn_end]).rstrip()
                spans.append((len(written), len(written) + len(answer) + len(closing)))
                written += answer + after
            if written == text:
                return text, tuple(spans)
        return text, None

    def answer(self, messages: Messages, prompt: str, answer: str) -> str:
        """The answer as it follows the `prompt` made of `messages`, up to the token that ends it."""
        whole = self.render([*messages, {"role": "assistant", "content": answer}], ask=False)
        if not whole.startswith(prompt):
            raise TemplateRefuses("it writes the prompt in another way when an answer follows")
        text = whole[len(prompt) :]
        if self.closing and text.endswith(self.closing):
            return text[: -len(self.closing)] + self.turn_end
        kept, end, rest = text.rpartition(self.tokenizer.eos_token)
        return kept + end if end and not rest.strip() else text  # what follows the end token belongs to the next turn

    @cached_property
    def closing(self) -> str:
        """What the template writes after an answer."""
        mark = MARK.format(0)
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        try:
            return self.render(probe, ask=False).partition(mark)[2]
        except TemplateRefuses:
            return ""

    @cached_property
    def end_token(self) -> str | None:
        """The first special token that follows an answer, and so ends a turn: EOS or another; None without any."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        found = [token for token in (*special, *self.tokenizer.all_special_tokens) if token in self.closing]
        return min(found, key=lambda token: (self.closing.index(token), -len(token)), default=None)

    @property
    def turn_end(self) -> str:
        """What of `closing` belongs to the answer: up to the token that ends the turn, or all of its text."""
        before, end, _ = self.closing.partition(self.end_token) if self.end_token else (self.closing.rstrip(), "", "")
        return before + end

    def state(self) -> list[Any]:
        """Everything that decides how the template writes, for the names of caches."""
        names = sorted(self.tokenizer.special_tokens_map.items(), key=str)
        return [self.tokenizer.chat_template, names]


def template_of(tokenizer: PreTrainedTokenizerBase | None) -> ChatTemplate | None:
    return ChatTemplate(tokenizer) if tokenizer is not None and tokenizer.chat_template else None
