"""Models loaded in one call: in eval mode, frozen unless they are to learn, with their tokenizer."""

from __future__ import annotations

import sys

import pytest
import torch

from remax import EngineConfig, Sampling, as_prompts, as_sequences
from remax.engines.pretrained import load_actor, load_reference, load_reward
from utils.run import UserError

PROMPTS = ["\n\nHuman: Name two fruits.\n\nAssistant:", "Hello"]
ANSWERS = [" Figs.", ""]


def test_a_frozen_actor_answers_and_agrees_with_its_reference(tiny_model):
    sampling = Sampling(0.7, top_p=0.9)
    actor, tokenizer = load_actor(str(tiny_model("opt")), max_new_tokens=5, sampling=sampling)
    assert not actor.model.training and not any(p.requires_grad for p in actor.model.parameters())
    assert actor.generation.sampling == actor.sampling == sampling
    answers = actor.rollout(as_prompts(tokenizer, PROMPTS), samples=3)
    sampled, greedy = answers.sampled, answers.greedy
    assert (len(sampled), len(greedy)) == (6, 2) and int(sampled.answer_lengths.max()) <= 5
    assert sampled.prompt_lengths.tolist() == [n for n in greedy.prompt_lengths.tolist() for _ in range(3)]

    reference, _ = load_reference(str(tiny_model("opt")), sampling=sampling)
    assert reference.sampling == Sampling(0.7)  # tempered, never truncated
    actor, _ = load_actor(str(tiny_model("opt")), sampling=Sampling(0.7))
    torch.testing.assert_close(actor.old_logprobs(sampled), reference.logprobs(sampled))


def test_texts_become_the_tokens_of_prompt_answer_and_end(tiny_reward_model):
    reward, tokenizer = load_reward(str(tiny_reward_model("opt")), engine=EngineConfig(dtype="bf16"))
    assert next(reward.model.parameters()).dtype == torch.bfloat16
    sequences = as_sequences(tokenizer, PROMPTS, ANSWERS)
    for row, length, prompt, answer in zip(sequences.input_ids, sequences.lengths, PROMPTS, ANSWERS, strict=True):
        assert row[:length].tolist() == tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    assert sequences.answer_lengths[1] == 1  # an empty answer that ended
    assert reward.score(sequences).shape == (2,)


LEARNS = """
import sys
from remax import OptimizerConfig, as_sequences, load_actor
actor, tokenizer = load_actor(sys.argv[1], optimizer=OptimizerConfig(1e-2, total_steps=2))
assert not actor.model.training  # no dropout until `train` is called
sequences = as_sequences(tokenizer, ["Hello", "Name two fruits."], [" you", ""])
before = actor.old_logprobs(sequences).sum()
actor.backward(-actor.logprobs(sequences).logprobs.sum(), last=True)
assert not actor.step().skipped
assert actor.old_logprobs(sequences).sum() > before
"""


@pytest.mark.ranks
def test_with_an_optimizer_it_learns(tiny_model, run_command):
    # In a process of its own, which joins a process group.
    done = run_command([sys.executable, "-c", LEARNS, tiny_model("gpt2")])
    assert done.returncode == 0, done.stdout


def test_a_model_that_is_not_there(tmp_path, tiny_model):
    with pytest.raises(UserError, match="no such folder: /nowhere"):
        load_actor("/nowhere")
    with pytest.raises(UserError, match="expected a reward model"):
        load_reward(str(tiny_model("opt")))
