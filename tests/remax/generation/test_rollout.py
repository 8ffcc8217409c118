"""Answers of the default decoder: the greedy ones are the argmax, the sampled ones follow the model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from remax.core.sampling import Sampling
from remax.core.sequences import Prompts
from remax.generation.decoder import GenerationSettings
from remax.generation.rollout import rollout
from remax.models.policy import load_policy
from utils.tokenizer import load_tokenizer

FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "gemma2")
WORDS, EOS, PAD = 5, 1, 0


def load(folder):
    tokenizer = load_tokenizer(str(folder))
    model = load_policy(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer)
    return model.eval(), tokenizer


def prompts_of(tokenizer, rows: int = 6, seed: int = 0) -> Prompts:
    """Left-padded prompts of 1 to 7 random tokens."""
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (rows,), generator=noise)
    lengths[0] = 7
    ids = torch.randint(3, len(tokenizer), (rows, 7), generator=noise)
    return Prompts(ids.masked_fill(torch.arange(7) < 7 - lengths[:, None], tokenizer.pad_token_id), lengths)


def assert_same(got, expected):
    assert torch.equal(got.input_ids, expected.input_ids)
    assert torch.equal(got.prompt_lengths, expected.prompt_lengths)
    assert torch.equal(got.answer_lengths, expected.answer_lengths)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 0.8, 20)], ids=["plain", "truncated"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_rows_are_the_argmax_of_the_training_forward(family, sampling, make_policy):
    model, tokenizer = load(make_policy(family))
    settings = GenerationSettings(12, tokenizer.pad_token_id, sampling)
    prompts = prompts_of(tokenizer)
    torch.manual_seed(0)
    answers = rollout(model.hf, prompts, settings, samples=2)
    sampled, greedy = answers.sampled, answers.greedy
    alone = rollout(model.hf, prompts, settings, samples=0).greedy
    assert_same(greedy, alone)
    assert len(sampled) == 2 * len(prompts)
    assert torch.equal(sampled.prompt_lengths, prompts.lengths.repeat_interleave(2))
    for i in range(len(greedy)):  # a row alone, no cache, no padding
        start, length = int(greedy.prompt_lengths[i]), int(greedy.lengths[i])
        ids = greedy.input_ids[i, :length]
        assert torch.equal(ids[:start], prompts.input_ids[i, 7 - start :])
        assert torch.equal(model.hf(ids[None]).logits[0].argmax(-1)[start - 1 : -1], ids[start:])
    assert greedy.answer_lengths.max() > 1


@pytest.fixture(scope="module")
def tiny(make_config_of):
    """A Llama of 5 words whose distributions are far from uniform."""
    return make_config_of(WORDS)


@pytest.fixture(scope="module")
def make_config_of():
    from remax.demo.tiny_models import tiny_config

    def make(words: int):
        torch.manual_seed(3)
        config = tiny_config("llama", words, hidden_size=8, heads=2, bos_token_id=2, eos_token_id=EOS, pad_token_id=PAD)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.6)
        model.generation_config = GenerationConfig(eos_token_id=[EOS], bos_token_id=2)
        return model

    return make


@torch.no_grad()
def exact(model, prompt: list[int], length: int, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """{answer: probability} of every answer of at most `length` tokens, each step by its own full forward."""
    answers = {}

    def extend(answer: tuple[int, ...], probability: float) -> None:
        if len(answer) == length or (answer and answer[-1] == EOS):
            answers[answer] = probability
            return
        logits = model(torch.tensor([[*prompt, *answer]])).logits[:, -1]
        p = sampling.apply(logits, logits.argmax(-1)).softmax(-1)[0]
        for word in range(logits.shape[-1]):
            if p[word] > 0:
                extend((*answer, word), probability * p[word].item())

    extend((), 1.0)
    return answers


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.6), Sampling(1.3, top_p=0.8, top_k=4)], ids=str
)
def test_sampled_rows_follow_the_model(sampling, tiny):
    # 4000 answers to each of two left-padded prompts against the probabilities of all answers. The statistic
    # sum (n - N p)^2 / (N p) over k cells (the answers with N p >= 5, and the rest) has mean k - 1, variance 2 (k - 1).
    draws, prompts = 4000, Prompts(torch.tensor([[PAD, PAD, 3], [4, 3, 2]]), torch.tensor([1, 3]))
    torch.manual_seed(0)
    answers = rollout(tiny, prompts, GenerationSettings(3, PAD, sampling), samples=draws)
    sampled, greedy = answers.sampled, answers.greedy
    assert sampled.prompt_lengths.tolist() == [1] * draws + [3] * draws
    for i, prompt in enumerate([[3], [4, 3, 2]]):
        probability = exact(tiny, prompt, 3, sampling)
        assert sum(probability.values()) == pytest.approx(1.0, abs=1e-5)
        counts = dict.fromkeys(probability, 0)
        for row in range(i * draws, (i + 1) * draws):
            start, end = int(sampled.prompt_lengths[row]), int(sampled.lengths[row])
            counts[tuple(sampled.input_ids[row, start:end].tolist())] += 1  # KeyError: an answer of probability zero
        cells = [(counts[a], draws * p) for a, p in probability.items() if draws * p >= 5]
        rest = draws - sum(n for n, _ in cells), draws - sum(expected for _, expected in cells)
        cells += [rest] if rest[1] >= 5 else []
        statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
        assert len(cells) >= 8
        assert statistic < len(cells) - 1 + 4 * (2 * (len(cells) - 1)) ** 0.5  # 4 standard deviations
        start, end = int(greedy.prompt_lengths[i]), int(greedy.lengths[i])
        best = ()
        while len(best) < 3 and EOS not in best:
            best += (int(tiny(torch.tensor([[*prompt, *best]])).logits[0, -1].argmax()),)
        assert tuple(greedy.input_ids[i, start:end].tolist()) == best


def test_no_word_is_cut_off_behind_our_back(make_config_of):
    # generate keeps the 50 most probable words unless it is told not to: of 200 words the others must be drawn too.
    model = make_config_of(200)
    prompts = Prompts(torch.tensor([[3]]), torch.tensor([1]))
    torch.manual_seed(0)
    sampled = rollout(model, prompts, GenerationSettings(1, PAD), samples=4000, greedy=False).sampled
    assert sampled.input_ids[:, 1].unique().numel() > 60


@pytest.mark.parametrize("cap", [1, 2, 5])
def test_the_greedy_cap_cuts_without_an_end_token(cap, make_policy):
    model, tokenizer = load(make_policy("llama"))
    prompts = prompts_of(tokenizer)
    full = GenerationSettings(8, tokenizer.pad_token_id)
    whole = rollout(model.hf, prompts, full, samples=0).greedy
    settings = GenerationSettings(8, tokenizer.pad_token_id, max_greedy_tokens=cap)
    answers = rollout(model.hf, prompts, settings)
    sampled, greedy = answers.sampled, answers.greedy
    assert torch.equal(greedy.answer_lengths, whole.answer_lengths.clamp(max=cap))
    for i in range(len(prompts)):
        length = int(greedy.lengths[i])
        assert torch.equal(greedy.input_ids[i, :length], whole.input_ids[i, :length])  # no EOS was put in
    assert sampled.answer_lengths.max() > cap


def test_a_greedy_cap_above_the_limit_is_the_limit():
    assert GenerationSettings(8, PAD, max_greedy_tokens=20).greedy_cap == 8
    assert GenerationSettings(8, PAD).greedy_cap == 8


def test_sampled_or_greedy_alone(make_policy):
    model, tokenizer = load(make_policy("gpt2"))
    prompts = prompts_of(tokenizer, rows=2)
    settings = GenerationSettings(4, tokenizer.pad_token_id)
    answers = rollout(model.hf, prompts, settings, samples=3, greedy=False)
    assert answers.greedy is None and len(answers.sampled) == 6
    answers = rollout(model.hf, prompts, settings, samples=0)
    assert answers.sampled is None and len(answers.greedy) == 2
    assert answers.logprobs is None and answers.greedy_logprobs is None


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 0.8, 20)], ids=["plain", "truncated"])
@torch.no_grad()
def test_logprobs_are_those_of_the_distribution_that_tokens_were_drawn_from(sampling, make_policy):
    model, tokenizer = load(make_policy("llama"))
    model.hf.generation_config.eos_token_id = list(range(0, len(tokenizer), 9))
    torch.manual_seed(0)
    settings = GenerationSettings(8, tokenizer.pad_token_id, sampling, max_greedy_tokens=5)
    answers = rollout(model.hf, prompts_of(tokenizer), settings, samples=2, logprobs=True)
    assert len(answers.sampled.answer_lengths.unique()) > 2
    torch.testing.assert_close(answers.logprobs, model(answers.sampled, sampling=sampling)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answers.greedy_logprobs, model(answers.greedy)[0], atol=1e-5, rtol=1e-4)
    assert answers.logprobs.dtype == torch.float32


def test_pad_may_be_the_end_token(make_policy):
    # Masks come from lengths: rows that ended early are as long as their answer, and EOS is part of it.
    model, tokenizer = load(make_policy("gpt2", "none"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    torch.manual_seed(0)
    settings = GenerationSettings(120, tokenizer.pad_token_id)
    sampled = rollout(model.hf, prompts_of(tokenizer, rows=2), settings, samples=20, greedy=False).sampled
    ids, mask = sampled.answer_ids, sampled.answer_mask
    ended = sampled.input_ids.gather(1, sampled.end_index[:, None]).squeeze(1) == tokenizer.eos_token_id
    assert ended.any()
    assert (((ids == tokenizer.eos_token_id) & mask).sum(1) == ended.long()).all()


@torch.no_grad()
def test_a_policy_without_numbers_answers_all_the_same(make_config_of):
    # Its log-probs are no numbers, which the training reports; torch.multinomial would end the process.
    model = make_config_of(WORDS)
    model.lm_head.weight.fill_(float("nan"))
    prompts = Prompts(torch.tensor([[3], [4]]), torch.tensor([1, 1]))
    answers = rollout(model, prompts, GenerationSettings(3, PAD))
    assert len(answers.sampled) == len(answers.greedy) == 2 and answers.sampled.answer_lengths.min() >= 1
