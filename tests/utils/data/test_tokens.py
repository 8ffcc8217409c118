"""One text as token ids, with tokenizers of every kind."""

import pytest

from utils.data.tokens import beginning, encode_prompts, keep_end, tokenizer_fingerprint
from utils.tokenizer import load_tokenizer

PROMPT = "\n\nHuman: What is it?\n\nAssistant:"
ANSWER = " It is a thing."


def without_end(tokenizer, text: str) -> list[int]:
    """The tokenizer's own ids, less an end token that it may add."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def test_pair_is_the_tokenizers_own_ids_and_one_end_token(tokenizer, encode_pair):
    ids, prompt_length = encode_pair(tokenizer, PROMPT, ANSWER, 99)
    # prompt + answer + EOS = tokenizer(prompt + answer) + EOS, and its first part = tokenizer(prompt)
    assert ids == without_end(tokenizer, PROMPT + ANSWER) + [tokenizer.eos_token_id]
    assert ids[:prompt_length] == without_end(tokenizer, PROMPT) == encode_prompts(tokenizer, [PROMPT])[0]


def test_end_token_is_learned_even_where_it_pads(gpt2, encode_pair):
    assert gpt2.pad_token_id == gpt2.eos_token_id
    ids, prompt_length = encode_pair(gpt2, PROMPT, ANSWER, 99)
    assert ids[-1] == gpt2.eos_token_id and gpt2.eos_token_id not in ids[:-1] and prompt_length < len(ids) - 1
    assert encode_pair(gpt2, PROMPT, ANSWER, 99, add_eos=False)[0] == ids[:-1]


def test_no_second_beginning_and_no_second_end(tokenizer, encode_pair):
    first = beginning(tokenizer)
    bos = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(first)) if first else ""
    ids, _ = encode_pair(tokenizer, bos + PROMPT, ANSWER + tokenizer.eos_token, 99)
    plain, _ = encode_pair(tokenizer, PROMPT, ANSWER, 99)
    assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)
    assert ids[: len(first) + 1].count(first[0] if first else -1) == len(first)


@pytest.mark.parametrize("kind", ["llama", "llama3", "opt"])
def test_beginning_is_what_the_model_expects(tokenizer_folders, kind):
    tokenizer = load_tokenizer(str(tokenizer_folders[kind]))
    expected = {"llama": "<s>", "llama3": "<|begin_of_text|>", "opt": "</s>"}[kind]
    assert tokenizer.convert_ids_to_tokens(beginning(tokenizer)) == [expected]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PROMPT, ANSWER),
        ("smile :", ") yes"),  # ":)" may be one token of the joint text
        ("line\n", "\nnext"),  # so may two line breaks
        ("x: ", "thing"),  # and a space with the word after it
        ("Hel", "lo world"),
        (PROMPT, " été 猫 🙂\n\tend"),
        (PROMPT, "no space"),
    ],
)
def test_the_answers_text_is_kept_at_every_seam(tokenizer, prompt, answer, encode_pair):
    ids, prompt_length = encode_pair(tokenizer, prompt, answer, 99)
    assert ids[:prompt_length] == without_end(tokenizer, prompt)  # what generation starts from
    whole = tokenizer.decode(ids[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole.removeprefix(" ") == prompt + answer  # sentencepiece begins with a space of its own


def test_a_cut_answer_has_no_end_token(tokenizer, encode_pair):
    whole, prompt_length = encode_pair(tokenizer, PROMPT, ANSWER, 99)
    for max_len in range(prompt_length + 1, len(whole) + 2):
        ids, length = encode_pair(tokenizer, PROMPT, ANSWER, max_len)
        assert ids == whole[:max_len] and length == prompt_length
    assert encode_pair(tokenizer, PROMPT, ANSWER, 3) == (whole[:3], 3)


def test_long_prompts_keep_their_beginning_and_their_end():
    assert keep_end([1, 5, 6, 7, 8], 5, [1]) == [1, 5, 6, 7, 8]
    assert keep_end([1, 5, 6, 7, 8], 3, [1]) == [1, 7, 8]
    assert keep_end([5, 6, 7, 8], 3, []) == [6, 7, 8]
    assert keep_end([1, 5, 6], 1, [1]) == [1]


def test_the_tokenizers_fingerprint_ignores_padding(tokenizer_folders, tokenizer):
    again = load_tokenizer(tokenizer.name_or_path)
    again(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    kinds = {tokenizer_fingerprint(load_tokenizer(str(folder))) for folder in tokenizer_folders.values()}
    assert len(kinds) == len(tokenizer_folders)
