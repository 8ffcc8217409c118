"""What the tests of the data compare with."""

import pytest

from utils.data.tokens import beginning, encode_answers, join, plain_ids, with_beginning


@pytest.fixture(scope="session")
def encode_pair():
    """encode_pair(tokenizer, prompt, answer, max_len) -> (ids of prompt and answer, prompt length), cut at `max_len`.

    The end token follows the answer when both fit. A prompt longer than `max_len` fills it alone: prompt length and
    number of ids are then equal.
    """

    def encode(tokenizer, prompt: str, answer: str, max_len: int, add_eos: bool = True) -> tuple[list[int], int]:
        heads = plain_ids(tokenizer, [prompt])
        (prompt_ids,) = with_beginning(beginning(tokenizer), heads)
        (answer_ids,) = encode_answers(tokenizer, [prompt], heads, [answer])
        ids = join(prompt_ids, answer_ids, max_len, [tokenizer.eos_token_id]) if add_eos else prompt_ids + answer_ids
        return ids[:max_len], min(len(prompt_ids), max_len)

    return encode
