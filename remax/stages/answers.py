"""remax.answers from its flags to a file of answers, on one rank or several, and on from where it was stopped.

Which questions are answered together, and the random numbers of each such batch, follow from the flags alone. So the
answers do not depend on the number of ranks, nor on how often the program was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from remax.cli.evaluation import AnswersArguments
from remax.core.batches import groups
from remax.core.sampling import Sampling
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor
from remax.engines.pretrained import load_actor
from remax.evaluation.answers import Answer, one_answer_each, write_prompt, write_question
from remax.evaluation.benchmarks import BENCHMARKS, Question, read_questions
from remax.models.loading import check_length, fingerprint, load_config, quiet_libraries
from remax.models.policy import check_policy_config
from utils.data.cache import fingerprint_of
from utils.data.chat import ChatTemplate, Messages, template_of
from utils.data.loaders import local_rank_zero_first
from utils.data.rows import read_rows
from utils.data.shapes import Form
from utils.data.sources import json_objects
from utils.data.tokens import encode_prompts
from utils.distributed import barrier, gather_objects, init_distributed, is_main, print0, rank, shutdown, world_size
from utils.files import read_text, write_whole
from utils.metrics import progress
from utils.run import UserError
from utils.tokenizer import load_tokenizer

Batch = tuple[int, ...]  # questions that are answered together, by their number
MODEL = "--model"


def run_answers(args: AnswersArguments) -> None:
    """Asks the model every question, and writes --output."""
    quiet_libraries()
    config = load_config(args.model, MODEL)
    check_policy_config(config, args.model, MODEL)
    tokenizer = load_tokenizer(args.model, MODEL)
    template = template_of(tokenizer)
    if world_size() > 1:
        init_distributed(args.local_rank)
    benchmark = BENCHMARKS.get(args.benchmark, BENCHMARKS["alpaca_eval"])
    if args.questions:
        questions = read_questions(benchmark, args.questions, "--questions")
    else:
        with local_rank_zero_first():
            questions = own_questions(args.benchmark, args.data_output_path, template)
    if args.temperature is not None:
        questions = [dataclasses.replace(question, temperature=args.temperature) for question in questions]
    first = [first_prompt(question, template) for question in questions]
    lengths = [len(ids) for ids in encode_prompts(tokenizer, first)]
    longest = f"the longest question ({max(lengths)}) + --max_new_tokens"
    check_length(config, max(lengths) + args.max_new_tokens, longest, MODEL)
    positions = getattr(config, "max_position_embeddings", None)
    room = None if positions is None else positions - args.max_new_tokens

    batches = plan(questions, lengths, args.batch_size)
    parts = Parts(Path(args.output), settings_of(args, questions))
    done = parts.read()
    barrier()  # nobody writes before all have read
    parts.open()
    left = [number for number in range(len(batches)) if number not in done]
    if done:
        print0(
            f"{parts.folder}: {sum(len(batches[k]) for k in done)} of {len(questions)} questions are answered already"
        )
    mine = left[rank() :: world_size()]
    if left:
        engine = EngineConfig(dtype=args.dtype)
        actor, _ = load_actor(args.model, flag=MODEL, max_new_tokens=args.max_new_tokens, engine=engine)
    with progress(sum(len(batches[k]) for k in mine), "answering", "questions") as bar:
        for number in mine:
            asked = [questions[i] for i in batches[number]]
            actor.generation = dataclasses.replace(actor.generation, sampling=sampling_of(asked, args.top_p))
            done[number] = answer(actor, tokenizer, asked, template, (args.seed, number), room)
            parts.keep(number, done[number])
            bar.update(len(asked))
    everything = {number: found for of_rank in gather_objects(done) for number, found in of_rank.items()}
    if is_main():
        answers = dict(zip(sum(batches, ()), sum((everything[k] for k in range(len(batches))), []), strict=True))
        name = Path(args.output).stem
        records = [benchmark.record(question, answers[i], name) for i, question in enumerate(questions)]
        benchmark.write(Path(args.output), records)
        parts.remove()
        asked_and_answered = [(question, answers[i]) for i, question in enumerate(questions)]
        print(summary(asked_and_answered, tokenizer, template, args.max_new_tokens, room))
        print(f"written to {args.output}; next: {benchmark.next_step.format(output=args.output)}")
    shutdown()


def own_questions(file: str, cache_dir: str | None, template: ChatTemplate | None) -> list[Question]:
    """The prompts of a file of one's own, as rows of AlpacaEval.

    A text file has a question a line, JSON rows with an `instruction` are AlpacaEval's own; of all other shapes the
    prompts are taken, written as training would write them. The instruction is then the prompt as the file has it, or
    of messages the Human/Assistant dialogue: the same for models of any chat template.
    """
    flag = "--benchmark"
    if file.endswith(".txt"):
        lines = read_text(file, flag, "a text file with a question a line").splitlines()
        questions = [Question((line.strip(),), {"instruction": line.strip()}) for line in lines if line.strip()]
    elif file.endswith((".json", ".jsonl")) and any(
        "instruction" in row for _, row in json_objects(file, flag, "rows")
    ):
        questions = read_questions(BENCHMARKS["alpaca_eval"], file, flag)
    else:
        written, plain = (
            read_rows(file, cache_dir=cache_dir, flag=flag, form=Form(template=t)) for t in (template, None)
        )
        questions = []
        for row, same in zip(written, plain, strict=True):
            if row.skipped is None:
                asked = row.original.get("prompt")
                instruction = asked if isinstance(asked, str) else same.prompt
                questions.append(Question((instruction,), {"instruction": instruction}, prompt=row.prompt))
    if not questions:
        raise UserError(f"{flag} {file}: holds no prompt; expected at least one")
    return questions


def first_prompt(question: Question, template: ChatTemplate | None) -> str:
    """What the model reads before its first answer."""
    return question.prompt or write_question(question.turns[0], template, MODEL)


def plan(questions: Sequence[Question], lengths: Sequence[int], batch_size: int) -> list[Batch]:
    """Which questions are answered together: those of equal temperature and turns, by length, the longest first."""

    def kind(i: int) -> tuple[int, float]:
        return len(questions[i].turns), questions[i].temperature

    order = sorted(range(len(questions)), key=lambda i: (kind(i), -lengths[i], i))
    return [tuple(batch) for _, alike in groupby(order, key=kind) for batch in groups(alike, batch_size)]


def sampling_of(asked: Sequence[Question], top_p: float) -> Sampling:
    temperature = asked[0].temperature
    return Sampling(temperature, top_p) if temperature else Sampling()


def answer(
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    template: ChatTemplate | None,
    seed: tuple[int, int],
    room: int | None,
) -> list[list[Answer]]:
    """The answers of a batch, turn by turn: a later turn sees the model's own earlier answers.

    Args:
        seed: Of the flags, and the batch's number.
        room: The longest prompt, in tokens; of a longer one, which earlier answers have made so, the end is read.
    """
    found: list[list[Answer]] = [[] for _ in asked]
    for turn in range(len(asked[0].turns)):
        prompts = [
            first_prompt(question, template) if turn == 0 else write_prompt(dialogue(question, turns), template, MODEL)
            for question, turns in zip(asked, found, strict=True)
        ]
        torch.manual_seed((seed[0] * 1_000_003 + seed[1]) * 101 + turn)
        answers = one_answer_each(actor, tokenizer, prompts, greedy=not asked[0].temperature, longest=room)
        for turns, one in zip(found, answers, strict=True):
            turns.append(dataclasses.replace(one, text=one.text.strip()))
    return found


def dialogue(question: Question, answers: Sequence[Answer]) -> Messages:
    """The messages up to the turn that follows these answers."""
    messages = [{"role": "user", "content": question.turns[0]}]
    for answer, turn in zip(answers, question.turns[1:], strict=False):
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": turn}]
    return messages


def settings_of(args: AnswersArguments, questions: Sequence[Question]) -> dict[str, Any]:
    """What the answers follow from."""
    names = ("benchmark", "max_new_tokens", "temperature", "top_p", "seed", "batch_size", "dtype")
    asked = fingerprint_of(*(json.dumps([question.turns, question.row], default=str) for question in questions))
    return {"model": fingerprint(args.model, MODEL), "questions": asked} | {name: getattr(args, name) for name in names}


class Parts:
    """What has been answered so far, in a folder beside the output: a file for each rank, a line for each batch."""

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.folder, self.settings = output.with_name(output.name + ".parts"), settings

    def read(self) -> dict[int, list[list[Answer]]]:
        """The batches that are answered, by their number.

        Raises:
            UserError: They were answered under other settings.
        """
        said = self.folder / "settings.json"
        if not said.is_file():
            return {}
        before = json.loads(said.read_text(encoding="utf-8"))
        if other := sorted(name for name in self.settings if before.get(name) != self.settings[name]):
            raise UserError(
                f"{self.folder}: holds answers under another {', '.join(other)}; remove that folder to start afresh, "
                "or give what it was begun with"
            )
        return dict(batch for file in sorted(self.folder.glob("rank*.jsonl")) for batch in self._batches(file))

    @staticmethod
    def _batches(file: Path) -> Iterator[tuple[int, list[list[Answer]]]]:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                number, answers = json.loads(line)
            except ValueError:  # torn when the program was stopped
                continue
            yield number, [[Answer(**turn) for turn in turns] for turns in answers]

    def open(self) -> None:
        """Makes the folder, and says in it what the answers follow from."""
        self.folder.mkdir(exist_ok=True)
        if is_main():
            write_whole(self.folder / "settings.json", json.dumps(self.settings))
        barrier()

    def keep(self, number: int, answers: list[list[Answer]]) -> None:
        """Adds a batch; on a new line, as the one before may be torn."""
        line = json.dumps([number, [[dataclasses.asdict(turn) for turn in turns] for turns in answers]])
        with (self.folder / f"rank{rank()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")

    def remove(self) -> None:
        """All is in the output."""
        shutil.rmtree(self.folder)


def summary(
    asked: Sequence[tuple[Question, list[Answer]]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    limit: int,
    room: int | None,
) -> str:
    """How long the answers are, how many reached no end, and how many prompts were cut."""
    answers = [answer for _, turns in asked for answer in turns]
    tokens = sum(answer.tokens for answer in answers) / len(answers)
    characters = sum(len(answer.text) for answer in answers) / len(answers)
    lines = [
        f"{len(asked)} questions, {len(answers)} answers of {tokens:.0f} tokens, {characters:.0f} characters (means)"
    ]
    if cut := sum(not answer.ended for answer in answers):
        lines.append(f"--max_new_tokens {limit}: {cut} answers are cut there, without an end token")
    later = [
        write_prompt(dialogue(question, turns[:k]), template, MODEL)
        for question, turns in asked
        for k in range(1, len(turns))
    ]
    if room is not None and (cut := sum(len(ids) > room for ids in encode_prompts(tokenizer, later))):
        lines.append(
            f"{cut} of {len(later)} later turns came after more than {room} tokens, of which the last were read"
        )
    return "\n".join(lines)
