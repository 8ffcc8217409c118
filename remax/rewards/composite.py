"""The reward that step 3 learns from: a weighted sum of reward models and Python functions.

    reward = sum_k weight_k * (score_k - mean_k) / std_k

with mean 0 and std 1 unless --normalize_reward takes a model's held-out statistics. Every part sees the same answers;
the trainer, the evaluation and the doctor see one reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from remax.core.sequences import Sequences
from remax.engines.scorer import Reward
from remax.rewards.functions import EVERY, OF_ANSWERS, Columns, RewardFunction, SampleError
from remax.rewards.process import WorkerFunction
from utils.distributed import device, gather_objects, rank, sum_across_ranks
from utils.present import present
from utils.run import UserError

BEGINNING = 80  # characters of a text that errors show


class FunctionReward:
    """Scores by a Python function of texts.

    It reads what the policy read and wrote, decoded without special tokens. So a prompt that was cut to
    --max_prompt_seq_len has lost its beginning, and the answer has neither end token nor padding: one that ended at
    once is "". Where it takes them, it also gets the row's columns, `ended` and `tokens`, see `score`.

    Args:
        function: From `load_function`, in a process of its own, or from `reward_function`, in this one.
        timeout: Seconds, see `WorkerFunction`; 0: none. A function in this process cannot be stopped.
        eos_ids: What ends an answer; by default the tokenizer's end token.
    """

    def __init__(
        self,
        function: RewardFunction | WorkerFunction,
        tokenizer: PreTrainedTokenizerBase,
        timeout: float = 0.0,
        eos_ids: Sequence[int] | None = None,
    ):
        if timeout and isinstance(function, RewardFunction):
            raise ValueError(f"{function.entry}: only a function of load_function has a time limit")
        self.function, self.tokenizer, self.timeout = function, tokenizer, timeout
        self.eos_ids = [tokenizer.eos_token_id] if eos_ids is None and tokenizer is not None else eos_ids

    def score(self, sequences: Sequences, forwards: int = 1, columns: Columns | None = None) -> Tensor:
        """(B,) float32; the function gets all rows at once, whatever `forwards`, as a remote one is best asked.

        Args:
            columns: Of the data, each of B values. Whether each answer ended by itself (`ended`), and its tokens with
                the end token (`tokens`), are added.

        Raises:
            UserError: The function failed; names the sample.
        """
        columns = {name: values for name, values in (columns or {}).items() if name not in OF_ANSWERS}
        if "ended" in self.takes:
            columns["ended"] = sequences.ended(present(self.eos_ids, "the end tokens")).tolist()
        if "tokens" in self.takes:
            columns["tokens"] = list(sequences.counts[1])
        values = self.score_texts(*self.texts(sequences), columns)
        return torch.tensor(values, dtype=torch.float32, device=device())

    @property
    def takes(self) -> frozenset[str]:
        """The names of what the function takes beside prompts and answers, see `RewardFunction`."""
        takes = self.function.takes
        return takes.union(OF_ANSWERS) if EVERY in takes else takes

    def texts(self, sequences: Sequences) -> tuple[list[str], list[str]]:
        """B prompts and B answers."""
        rows = list(zip(sequences.input_ids.tolist(), *sequences.counts, strict=True))
        prompts = [ids[:start] for ids, start, _ in rows]
        answers = [ids[start : start + length] for ids, start, length in rows]
        decode = partial(self.tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decode(prompts), decode(answers)

    def score_texts(
        self, prompts: Sequence[str], answers: Sequence[str], columns: Columns | None = None
    ) -> list[float]:
        """As `score`, of B texts; `columns` are all that the function may take.

        Every rank calls it; where one fails all raise its error, so that none waits for it in vain. The random state is
        put back after a function of this process: one that seeds would have every step draw the same answers.
        """
        values: list[float] = []
        failure = None
        try:
            with _undisturbed() if isinstance(self.function, RewardFunction) else nullcontext():
                values = self.function(prompts, answers, columns, self.timeout)
        except SampleError as error:
            i = error.index or 0
            which = "sample" if error.index is not None else f"a batch of {len(prompts)} whose first sample is"
            failure = (
                f"--reward_fn {self.function.entry}: {error}. On rank {rank()}, {which}: "
                f"prompt {beginning(prompts[i])}, answer {beginning(answers[i])}"
            )
        if sum_across_ranks({"failed": float(failure is not None)})["failed"]:
            raise UserError(next(failure for failure in gather_objects(failure) if failure))
        return values


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither the random state nor gradient mode are changed by what happens inside."""
    with torch.random.fork_rng([device()] if device().type == "cuda" else []), torch.no_grad():
        yield


def beginning(text: str) -> str:
    """As much of a text as errors show."""
    return repr(text if len(text) <= BEGINNING else text[:BEGINNING] + "...")


@dataclass
class Part:
    """One summand of the reward: weight * (score - mean) / std; its name is for logs."""

    name: str
    scorer: Reward | FunctionReward
    weight: float = 1.0  # below 0 for a penalty
    mean: float = 0.0
    std: float = 1.0
    tokenizer: PreTrainedTokenizerBase | None = None  # a reward model's own

    @property
    def model(self) -> Reward:
        """The scorer of a part that is a reward model."""
        if isinstance(self.scorer, FunctionReward):
            raise TypeError(f"{self.name} is a function and no reward model")
        return self.scorer


class CompositeReward:
    """Several parts in one; it can be used wherever a single `Reward` can."""

    def __init__(self, parts: Iterable[Part]):
        self.parts = list(parts)

    @property
    def models(self) -> list[Part]:
        return [part for part in self.parts if not isinstance(part.scorer, FunctionReward)]

    @property
    def trunk(self) -> Reward | None:
        """The part that shares its weights with another role."""
        return next((part.model for part in self.models if part.model.use is not None), None)

    @property
    def zero3(self) -> bool:
        """Whether a part is a model whose every forward needs all ranks."""
        return any(part.model.zero3 for part in self.models)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of what `score_parts` gives beside the total: of all parts where there are several."""
        return tuple(part.name for part in self.parts) if len(self.parts) > 1 else ()

    def score(self, sequences: Sequences, forwards: int = 1, columns: Columns | None = None) -> Tensor:
        """(B,) float32."""
        return self.score_parts(sequences, forwards, columns)[0]

    def score_parts(
        self,
        sequences: Sequences,
        forwards: int = 1,
        columns: Columns | None = None,
        of_trunk: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) rewards, and where there are several parts the (B,) score of each as it gave it, by name.

        See `Reward.score` for `forwards`, `FunctionReward.score` for `columns`.

        Args:
            of_trunk: (B,) scores of the part that is the actor's trunk, where a `Judge` has given them already.
        """

        def score(part: Part) -> Tensor:
            if of_trunk is not None and part.scorer is self.trunk:
                return of_trunk
            if isinstance(part.scorer, FunctionReward):
                return part.scorer.score(sequences, forwards, columns)
            return part.scorer.score(sequences, forwards)

        scores = {part.name: score(part) for part in self.parts}
        terms = (part.weight * (scores[part.name] - part.mean) / part.std for part in self.parts)
        return sum(terms, start=torch.zeros(())), {name: scores[name] for name in self.part_names}


def try_functions(
    rewards: Iterable[FunctionReward],
    prompts: Sequence[str],
    columns: Columns | None = None,
    there: Callable[[], str] = lambda: "the prompts have no columns",
) -> None:
    """Asks every function about real prompts and two made-up answers, an empty one and a short one, which both ended.

    So a faulty function is found before models are loaded.

    Args:
        columns: Of the data, a value for each prompt.
        there: Says what there is, where a function needs another column.

    Raises:
        UserError: A function needs a column that the data has not, or see `FunctionReward.score`.
    """
    made_up = ("", " I do not know.")
    twice = {name: [value for value in values for _ in made_up] for name, values in (columns or {}).items()}
    texts = [(prompt, answer) for prompt in prompts for answer in made_up]
    for reward in rewards:
        if missing := sorted(reward.function.needs - {*twice, *OF_ANSWERS}):
            raise UserError(f"--reward_fn {reward.function.entry}: takes {', '.join(missing)}, but {there()}")
        prompts_twice, answers = map(list, zip(*texts, strict=True))
        of_answers: Columns = {
            "ended": [True] * len(answers),
            "tokens": [len(answer.split()) + 1 for answer in answers],
        }
        try:
            reward.score_texts(prompts_twice, answers, {**twice, **of_answers})
        except UserError as error:
            raise UserError(f"{error} (tried before training, with made-up answers)") from error
