"""A stream is the rollout's answer, token by token."""

import pytest
import torch

from remax.core.sampling import Sampling
from remax.engines.pretrained import load_actor
from remax.evaluation.answers import as_prompts, read_answers
from remax.generation import streaming
from remax.generation.streaming import Stream


@pytest.fixture
def actor(tiny_model):
    return load_actor(str(tiny_model("llama")), max_new_tokens=12, sampling=Sampling(0.7, 0.9))


@pytest.mark.parametrize("greedy", [True, False])
def test_the_pieces_are_the_answer_of_a_rollout(actor, greedy):
    actor, tokenizer = actor
    prompt = as_prompts(tokenizer, ["\n\nHuman: Name two fruits.\n\nAssistant:"])
    torch.manual_seed(3)
    found = actor.rollout(prompt, samples=int(not greedy), greedy=greedy)
    answer = found.greedy if greedy else found.sampled
    torch.manual_seed(3)
    stream = Stream(actor.model.hf, prompt, actor.generation, tokenizer, greedy=greedy)
    pieces = list(stream)
    (expected,) = read_answers(answer, tokenizer, actor.model.hf.generation_config.eos_token_id)
    assert "".join(pieces) == stream.text == expected.text
    assert stream.done and stream.tokens == expected.tokens and len(pieces) >= expected.tokens


def test_two_streams_take_turns_and_one_is_stopped(actor):
    actor, tokenizer = actor
    first, second = (
        Stream(actor.model.hf, as_prompts(tokenizer, [text]), actor.generation, tokenizer, greedy=True)
        for text in ("a", "b")
    )
    for k in range(1, 4):
        next(first), next(second)
        assert first.tokens == second.tokens == k
    first.stop()
    assert first.done and not first._thread.is_alive() and list(first) == []
    list(second)
    assert second.tokens == 12


def test_a_character_of_several_tokens_comes_whole(tokenizer, tiny_model):
    ids = tokenizer("h\u00e9 \u00ff!", add_special_tokens=False)["input_ids"]
    assert len(ids) > 5  # bytes
    pieces, pending = [], iter(ids)

    class Written(Stream):
        def _run(self, *args):
            self._turn.acquire()
            self.put(torch.tensor([[1]]))  # the prompt
            for one in pending:
                self.put(torch.tensor([one]))
            self.done = True
            self._made.release()

    pieces = list(Written(None, None, None, tokenizer, greedy=True))
    assert "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)


def test_an_error_comes_out_where_the_token_is_asked_for(actor, monkeypatch):
    actor, tokenizer = actor

    def fail(*args, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(streaming, "generate_with", fail)
    stream = Stream(actor.model.hf, as_prompts(tokenizer, ["a"]), actor.generation, tokenizer, greedy=True)
    with pytest.raises(MemoryError, match="no room"):
        next(stream)
    assert stream.done
