"""Models at work, without training: answers to prompts and scores of texts, in one process or on several ranks.

What is measured on whole data sets is in `evaluation`; it takes the actor of this file as well as one that learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from remax.deepspeed_config import EngineConfig
from remax.engines import FrozenEngine, Reward
from remax.evaluation import Answer, read_answers
from remax.finetune import groups
from remax.logprobs import PolicyOutput, Sampling
from remax.modeling import PolicyModel
from remax.rollout import GenerationSettings, rollout
from remax.sequences import Prompts, Sequences
from utils.data.collate import pad
from utils.data.tokens import beginning, encode_answers, encode_prompts, join, plain_ids, with_beginning
from utils.distributed import device, gather_objects, rank, world_size
from utils.metrics import progress


class FrozenActor(FrozenEngine):
    """A policy that answers, and tells how probable answers are, but does not learn."""

    model: PolicyModel

    def __init__(
        self, model: PolicyModel, config: EngineConfig, generation: GenerationSettings, chunk_size: int = 1024
    ):
        super().__init__(model, config)
        self.generation, self.chunk_size = generation, chunk_size

    def rollout(
        self, prompts: Prompts, *, samples: int = 1, greedy: bool = True
    ) -> tuple[Sequences | None, Sequences | None]:
        """Sampled answers (`samples` adjacent rows per prompt) and greedy ones, see `remax.rollout`."""
        return rollout(self.model.hf, prompts.to(device()), self.generation, samples=samples, greedy=greedy)

    @torch.no_grad()
    def logprobs(
        self, sequences: Sequences, *, entropy: bool = False, sampling: Sampling | None = None
    ) -> PolicyOutput:
        """(B, A) log-probs of the answers, and their entropy, in the distribution that answers are sampled from, or in
        another one.
        """
        chunks = 1 + int(sequences.answer_lengths.sum()) // self.chunk_size
        sampling = sampling or self.generation.sampling
        logprobs, h, _ = self.model(sequences, chunks=chunks, sampling=sampling, entropy=entropy)
        return PolicyOutput(logprobs, h if entropy else None)

    @torch.no_grad()
    def beam_search(self, prompts: Prompts, beams: int, best: int) -> Sequences:
        """The `best` most probable answers per prompt (adjacent rows) among `beams` that are followed."""
        hf, settings, prompts = self.model.hf, self.generation, prompts.to(device())
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            num_beams=beams,
            num_return_sequences=best,
            do_sample=False,
            eos_token_id=hf.generation_config.eos_token_id,
            pad_token_id=settings.pad_id,
        )
        out = hf.generate(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, generation_config=config)
        answers = out[:, prompts.input_ids.shape[1] :]  # (B * best, A)
        return Sequences.from_generation(prompts.repeat(best), answers, config.eos_token_id, settings.pad_id)


def answer_prompts(
    actor: FrozenActor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    samples: int = 1,
    beams: int = 1,
) -> list[dict[str, list[Answer]]]:
    """For each prompt its greedy answer, `samples` sampled ones, and with `beams` above 1 the best of a beam search.

    -> per prompt {"greedy": 1 answer, "sampled": `samples`, "beam": min(samples, beams), the most probable first};
    what was not asked for is left out.
    """
    eos_ids = actor.model.hf.generation_config.eos_token_id
    results: list[dict[str, list[Answer]]] = []
    with progress(len(prompts), "answering", "prompts") as bar:
        for texts in groups(prompts, batch_size):
            batch = Prompts(*pad(encode_prompts(tokenizer, texts), tokenizer.pad_token_id, left=True))
            sampled, greedy = actor.rollout(batch, samples=samples, greedy=True)
            kinds = {"greedy": greedy} | ({"sampled": sampled} if samples else {})
            if samples and beams > 1:
                kinds["beam"] = actor.beam_search(batch, beams, min(samples, beams))
            answers = {kind: read_answers(found, tokenizer, eos_ids) for kind, found in kinds.items()}
            each = {kind: len(found) // len(texts) for kind, found in answers.items()}
            for i in range(len(texts)):
                results.append({kind: found[i * each[kind] :][: each[kind]] for kind, found in answers.items()})
            bar.update(len(texts))
    return results


@dataclass(frozen=True)
class EncodedText:
    """Prompt, answer and end token as ids, cut at the limit; an answer that was `cut` has no end token."""

    ids: list[int]
    prompt_length: int
    cut: bool


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str], max_len: int
) -> list[EncodedText]:
    """The texts as step 2 trains on them; a prompt of `max_len` tokens or more leaves no room for its answer."""
    encoded = []
    first, eos = beginning(tokenizer), tokenizer.eos_token_id
    for texts in groups(zip(prompts, answers, strict=True), 1000):
        batch_prompts, batch_answers = (list(column) for column in zip(*texts, strict=True))
        plain = plain_ids(tokenizer, batch_prompts)
        tails = encode_answers(tokenizer, batch_prompts, plain, batch_answers)
        for head, tail in zip(with_beginning(first, plain), tails, strict=True):
            whole = join(head, tail, len(head) + len(tail) + 1, eos)
            encoded.append(EncodedText(whole[:max_len], min(len(head), max_len), len(whole) > max_len))
    return encoded


def score_texts(reward: Reward, texts: Sequence[EncodedText], *, batch_size: int, pad_id: int) -> Tensor:
    """(n,) float32 scores in the order of `texts`, on every rank; the ranks share the work.

    Texts of similar length are scored together, the longest first: where memory is too small, that shows at once.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    mine = order[rank() :: world_size()]
    scores: list[float] = []
    with progress(len(mine), "scoring", "texts") as bar:
        for rows in groups(mine, batch_size):
            ids, lengths = pad([texts[i].ids for i in rows], pad_id)  # (B, T), (B,)
            prompt_lengths = torch.tensor([texts[i].prompt_length for i in rows])
            scores += reward.score(Sequences(ids, prompt_lengths, lengths - prompt_lengths).to(device())).tolist()
            bar.update(len(rows))
    result = torch.empty(len(texts))
    for share, part in enumerate(gather_objects(scores)):
        result[order[share :: world_size()]] = torch.tensor(part)
    return result
