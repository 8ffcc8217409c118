"""Answers and scores of plain models, against one row at a time in plain transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.demo.corpus import make_rows
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor
from remax.engines.scorer import Reward
from remax.evaluation import texts as scoring
from remax.evaluation.answers import answer_prompts
from remax.evaluation.texts import encode_texts, score_texts
from remax.generation.decoder import GenerationSettings
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from utils.data.encoding import Encoder
from utils.tokenizer import load_tokenizer

ARCHITECTURES = ("gpt2", "opt", "llama")  # learned absolute positions, the same with an offset, rotary
PROMPTS = ["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Name two birds, two fruits and a tool.\n\nAssistant:", "x"]
ROWS = make_rows(seed=3, train_rows=1, test_rows=7)[1]


def make_actor(folder, **settings):
    tokenizer = load_tokenizer(str(folder))
    policy = load_policy(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer)
    generation = GenerationSettings(**({"max_new_tokens": 8, "pad_id": tokenizer.pad_token_id} | settings))
    return Actor(FrozenEngine(policy, EngineConfig()), generation=generation), tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_of_a_padded_batch_are_the_argmax_of_each_row(architecture, tiny_model):
    actor, tokenizer = make_actor(tiny_model(architecture))
    found = answer_prompts(actor, tokenizer, PROMPTS, batch_size=3)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()
    for prompt, answers in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        expected = []
        while len(expected) < 8 and tokenizer.eos_token_id not in expected:
            logits = plain(torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
        assert answers["greedy"][0].text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answers["greedy"][0].tokens == len(expected)
        assert answers["greedy"][0].ended == (expected[-1] == tokenizer.eos_token_id)


def test_beam_search_of_a_padded_batch(tiny_model):
    actor, tokenizer = make_actor(tiny_model("llama"))
    found = answer_prompts(actor, tokenizer, PROMPTS, batch_size=2, samples=2, beams=4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    for prompt, answers in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            num_beams=4,
            num_return_sequences=2,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(expected[:, ids.shape[1] :], skip_special_tokens=True)
        assert [answer.text for answer in answers["beam"]] == texts


def test_samples_belong_to_their_prompt(tiny_model):
    # top_k 1 leaves only the argmax: every sample must be the greedy answer of its own prompt.
    actor, tokenizer = make_actor(tiny_model("llama"), sampling=Sampling(top_k=1))
    for answers in answer_prompts(actor, tokenizer, PROMPTS, batch_size=2, samples=3):
        assert len(answers["sampled"]) == 3 and set(answers["sampled"]) == set(answers["greedy"])


def test_without_samples(tiny_model):
    actor, tokenizer = make_actor(tiny_model("llama"))
    assert [set(answers) for answers in answer_prompts(actor, tokenizer, PROMPTS, batch_size=4, samples=0)] == [
        {"greedy"}
    ] * len(PROMPTS)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_logprobs_are_those_of_the_sampling_distribution(tiny_model, chunk_size):
    actor, tokenizer = make_actor(tiny_model("llama"), sampling=Sampling(temperature=0.5))
    actor.chunk_size = chunk_size
    prompt, answer = [5, 6, 7], [8, 9, tokenizer.eos_token_id]
    sequences = Sequences(torch.tensor([prompt + answer]), torch.tensor([3]), torch.tensor([3]))
    output = actor.logprobs(sequences, entropy=True)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    logp = (plain(torch.tensor([prompt + answer])).logits[0, 2:5] / 0.5).log_softmax(-1)  # (3, V)
    torch.testing.assert_close(output.logprobs[0], logp[range(3), answer], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.entropy[0], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0)


def test_texts_are_encoded_as_in_training(tokenizer):
    batch = {name: [row[name] for row in ROWS] for name in ("prompt", "chosen", "rejected")}
    for max_len in (100, 40):
        trained = Encoder("ranking", tokenizer, max_len).encode(batch)
        for column in ("chosen", "rejected"):
            found = encode_texts(tokenizer, batch["prompt"], batch[column], max_len)
            assert [text.ids for text in found] == trained[f"{column}_ids"]
            assert [text.prompt_length for text in found] == trained["prompt_length"]
            assert [text.cut for text in found] == [text.ids[-1] != tokenizer.eos_token_id for text in found]
    assert any(text.cut for text in found) and not all(text.cut for text in found)


def test_an_answer_that_just_fits_is_not_cut(tokenizer):
    (whole,) = encode_texts(tokenizer, ["a?"], [" b c"], 100)
    (fits,) = encode_texts(tokenizer, ["a?"], [" b c"], len(whole.ids))
    (cut,) = encode_texts(tokenizer, ["a?"], [" b c"], len(whole.ids) - 1)
    assert (fits.ids, fits.cut) == (whole.ids, False)
    assert (cut.ids, cut.cut) == (whole.ids[:-1], True)  # without its end token


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_plain_transformers(architecture, tiny_reward_model):
    folder = tiny_reward_model(architecture)
    tokenizer = load_tokenizer(str(folder))
    model = load_reward_model(str(folder), "--m", dtype=torch.float32, tokenizer=tokenizer)
    reward = Reward(FrozenEngine(model, EngineConfig()))
    texts = encode_texts(tokenizer, [row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS], 100)
    scores = score_texts(reward, texts, batch_size=3, pad_id=tokenizer.pad_token_id)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = [plain(torch.tensor([text.ids])).logits[0, 0].item() for text in texts]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
    assert len({round(score, 4) for score in expected}) == len(texts)  # an exchange of rows would show


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_share_the_texts(ranks, monkeypatch, tiny_reward_model):
    folder = tiny_reward_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_reward_model(str(folder), "--m", dtype=torch.float32, tokenizer=tokenizer)
    reward = Reward(FrozenEngine(model, EngineConfig()))
    texts = encode_texts(tokenizer, [row["prompt"] for row in ROWS], [row["rejected"] for row in ROWS], 100)
    alone = score_texts(reward, texts, batch_size=2, pad_id=tokenizer.pad_token_id)

    shares = []

    def gather(scores):
        shares.append(scores)
        return shares if len(shares) == ranks else shares + [[0.0] * n for n in sizes[len(shares) :]]

    sizes = [len(range(rank, len(texts), ranks)) for rank in range(ranks)]
    monkeypatch.setattr(scoring, "world_size", lambda: ranks)
    monkeypatch.setattr(scoring, "gather_objects", gather)
    for rank in range(ranks):
        monkeypatch.setattr(scoring, "rank", lambda rank=rank: rank)
        together = score_texts(reward, texts, batch_size=2, pad_id=tokenizer.pad_token_id)
    assert [len(share) for share in shares] == sizes
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_prompts_of_a_batch_are_padded_on_the_left(tiny_model, monkeypatch):
    actor, tokenizer = make_actor(tiny_model("llama"))
    seen = []
    monkeypatch.setattr(
        actor, "rollout", lambda prompts, **kw: seen.append(prompts) or Actor.rollout(actor, prompts, **kw)
    )
    answer_prompts(actor, tokenizer, PROMPTS, batch_size=3)
    (batch,) = seen
    assert isinstance(batch, Prompts)
    assert batch.input_ids[:, -1].tolist() == [tokenizer(prompt)["input_ids"][-1] for prompt in PROMPTS]
