import copy
import json
from dataclasses import replace

import pytest
import torch

from utils.data.chat import ChatTemplate, TemplateRefuses, earlier_answers, template_of, write_plain
from utils.data.config import DataConfig
from utils.data.encoding import Encoder, Names, encode_rows
from utils.data.loaders import build_loaders
from utils.data.preferences import load_data_set
from utils.data.shapes import Conversation, Form, RowSkipped, finish
from utils.data.tokens import beginning, end_ids
from utils.run import UserError
from utils.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama-2's and Mistral's: answers are stripped, and end in the end token.
INSTRUCT = (
    "BEGIN{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system messages here') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
DIALOGUE = [
    {"role": "user", "content": "Hello world!"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "I am fine :)"},
]
ANSWER = "So it is (a) thing."


@pytest.fixture(scope="session")
def chatty(tokenizer):
    """Each kind of tokenizer with a template: ChatML where it has the tokens, else Llama-2's way with its own BOS."""
    tokenizer = copy.deepcopy(tokenizer)
    if "<|im_end|>" in tokenizer.get_vocab():
        tokenizer.chat_template = CHATML
    else:
        bos = "".join(tokenizer.convert_ids_to_tokens(beginning(tokenizer)))
        tokenizer.chat_template = INSTRUCT.replace("BEGIN", bos)
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tmp_path, tokenizer, rows, kind="supervised", **options):
    """The first row."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for file in (tmp_path / "train.jsonl", tmp_path / "test.jsonl"):
        if not file.exists() or file.read_text() != text:  # a file written again is another one
            file.write_text(text)
    form = Form(template=template_of(tokenizer))
    cache = str(tmp_path / "cache")
    train, _ = load_data_set(str(tmp_path), cache_dir=cache, form=form)
    encoded = encode_rows(train, Encoder(kind, tokenizer, 400, **options), cache_dir=cache, names=Names("train"))
    return encoded[0]


def rows(*turns) -> list[dict]:
    return [{"messages": [*turns, {"role": "assistant", "content": ANSWER}]}]


# ------------------------------------------------------------------------------------------------ the template's tokens


def test_ids_are_those_of_the_template(tmp_path, chatty):
    row = encode(tmp_path, chatty, rows(*DIALOGUE))
    messages = [*DIALOGUE, {"role": "assistant", "content": ANSWER}]
    whole = chatty.apply_chat_template(messages, tokenize=False)
    prompt = chatty.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
    expected = ids(chatty, whole)
    expected = expected[: len(expected) - expected[::-1].index(chatty.eos_token_id)]  # ChatML has a line end behind it
    assert row["input_ids"] == expected
    assert row["input_ids"][: row["prompt_length"]] == ids(chatty, prompt)
    assert row["input_ids"][-1] == chatty.eos_token_id != row["input_ids"][-2]
    first = beginning(chatty)
    assert row["input_ids"][: len(first) + 1].count(first[0] if first else -1) == len(first)


def test_all_answers_are_learned_with_their_ends_and_nothing_else(tmp_path, chatty):
    last = encode(tmp_path, chatty, rows(*DIALOGUE))
    row = encode(tmp_path, chatty, rows(*DIALOGUE), train_on="all")
    assert row["input_ids"] == last["input_ids"]  # which tokens there are does not depend on which are learned
    assert row["prompt_length"] < last["prompt_length"]
    tail = row["input_ids"][row["prompt_length"] :]
    assert len(tail) == len(row["loss_mask"])
    pieces, before = [], False
    for token, learned in zip(tail, row["loss_mask"], strict=True):
        if learned and not before:
            pieces.append([])
        if learned:
            pieces[-1].append(token)
        before = learned
    assert [piece[-1] for piece in pieces] == [chatty.eos_token_id] * 2
    texts = [chatty.decode(piece, skip_special_tokens=True).strip() for piece in pieces]
    assert texts == ["How are you?", ANSWER]


def test_plain_dialogue_is_learned_in_the_same_places(tmp_path, tokenizer):
    assert not tokenizer.chat_template
    row = encode(tmp_path, tokenizer, rows(*DIALOGUE), train_on="all")
    last = encode(tmp_path, tokenizer, rows(*DIALOGUE))
    assert row["input_ids"] == last["input_ids"] and "loss_mask" not in last
    tail = row["input_ids"][row["prompt_length"] :]
    learned = [token for token, mask in zip(tail, row["loss_mask"], strict=True) if mask]
    # No end token between the turns: this form has none there.
    assert learned.count(tokenizer.eos_token_id) == 1 and learned[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(learned, skip_special_tokens=True)
    assert text.split() == ("How are you? " + ANSWER).split()


def test_text_dialogues_have_the_same_earlier_answers():
    prompt, spans = write_plain(DIALOGUE)
    assert prompt == "\n\nHuman: Hello world!\n\nAssistant: How are you?\n\nHuman: I am fine :)\n\nAssistant:"
    assert [prompt[start:end] for start, end in spans] == [" How are you?"]
    assert earlier_answers(prompt) == spans and earlier_answers("no dialogue") == ()


def test_batches_carry_the_mask(tmp_path, tokenizer):
    single = [{"messages": [DIALOGUE[0], {"role": "assistant", "content": f"Yes {i}"}]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*single, *rows(*DIALOGUE), *rows(*DIALOGUE[:2], DIALOGUE[0])])
    )
    (tmp_path / "test.jsonl").write_text(json.dumps(single[0]) + "\n")
    config = DataConfig(data_path=[str(tmp_path)], cache_dir=str(tmp_path / "c"), data_split="1,0,0", train_on="all")
    sizes = {"max_len": 200, "train_batch_size": 10, "eval_batch_size": 4, "stage": 0, "tokenizer": tokenizer}
    (batch,), (held_out,) = build_loaders(config, **sizes)
    mask, answers = batch.loss_mask, batch.lengths - batch.prompt_lengths
    assert mask.shape == (10, answers.max()) and held_out.loss_mask is None
    whole = mask.sum(1) == answers  # dialogues of one answer: every token of it
    assert whole.sum() == 8 and (mask.sum(1) <= answers).all()
    assert not mask[answers[:, None] <= torch.arange(mask.shape[1])].any()
    (last,), _ = build_loaders(replace(config, train_on="last"), **sizes)
    assert last.loss_mask is None and int(last.lengths.sum()) == int(batch.lengths.sum())


def test_a_second_start_writes_nothing_anew_but_another_template_does(tmp_path, tokenizer_folders, monkeypatch):
    tokenizer = load_tokenizer(str(tokenizer_folders["qwen"]), chat_template=CHATML)
    first = encode(tmp_path, tokenizer, rows(*DIALOGUE), train_on="all")
    for name in ("preferences.normalise_batch", "encoding.to_columns"):
        monkeypatch.setattr(f"utils.data.{name}", lambda *_, **__: pytest.fail("mapped again"))
    again = load_tokenizer(str(tokenizer_folders["qwen"]), chat_template=CHATML)
    assert encode(tmp_path, again, rows(*DIALOGUE), train_on="all") == first
    again.chat_template = CHATML.replace("assistant\n", "assistant:\n")
    with pytest.raises(pytest.fail.Exception, match="mapped again"):
        encode(tmp_path, again, rows(*DIALOGUE), train_on="all")


# --------------------------------------------------------------------------------------------------- which text is it


def test_preference_pairs_share_the_templates_prompt(tmp_path, chatty):
    pairs = [
        {
            "prompt": DIALOGUE,
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": "No"}],
        }
        for a in (ANSWER, ANSWER + "!")
    ]
    row = encode(tmp_path, chatty, pairs, "ranking")
    n = row["prompt_length"]
    prompt = chatty.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
    assert row["chosen_ids"][:n] == row["rejected_ids"][:n] == ids(chatty, prompt)
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == chatty.eos_token_id
    asked = encode(tmp_path, chatty, pairs, "prompts")
    assert asked["prompt"] == prompt and asked["input_ids"] == ids(chatty, prompt)


def test_written_text_is_no_matter_of_the_template(tmp_path, chatty):
    pairs = [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": f" {i}", "rejected": " No"} for i in range(2)]
    assert encode(tmp_path, chatty, pairs, "prompts")["prompt"] == "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize("shape", ["completion", "answers", "adapter", "alpaca", "sharegpt"])
def test_bare_questions_are_messages_of_a_user(tmp_path, chatty, shape, capsys):
    # Whatever names them: a prompt without any form, one with several answers, a question of a known data set.
    rows = [{"prompt": f"What is {i}?", "completion": "It is."} for i in range(4)]
    name = tmp_path / "a.jsonl"
    if shape == "answers":
        rows = [{"prompt": row["prompt"], "answers": ["It is.", "No."]} for row in rows]
    elif shape == "alpaca":
        rows = [{"instruction": row["prompt"], "input": "", "output": "It is."} for row in rows]
    elif shape == "sharegpt":
        turns = (("human", "prompt"), ("gpt", "completion"))
        rows = [{"conversations": [{"from": who, "value": row[column]} for who, column in turns]} for row in rows]
    elif shape == "adapter":
        name = tmp_path / "wangrui6" / "Zhihu-KOL" / "train.jsonl"
        name.parent.mkdir(parents=True)
        rows = [{"INSTRUCTION": row["prompt"], "RESPONSE": "It is."} for row in rows]
    name.write_text("".join(json.dumps(row) + "\n" for row in rows))
    form, path = Form(template=template_of(chatty)), name if shape != "adapter" else name.parent
    train, _ = load_data_set(str(path), cache_dir=str(tmp_path / "cache"), form=form)
    asked = next(f"What is {i}?" for i in range(4) if f"What is {i}?" in train[0]["prompt"])
    question = [{"role": "user", "content": asked}]
    prompt = chatty.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert train[0]["prompt"] == prompt and "Human:" not in prompt
    whole = chatty.apply_chat_template([*question, {"role": "assistant", "content": "It is."}], tokenize=False)
    assert whole.startswith(prompt + train[0]["chosen"])
    assert "written by the chat template; 3 training rows" in capsys.readouterr().out or shape == "adapter"


def test_rows_that_the_template_refuses_are_skipped_with_its_words(tokenizer_folders):
    tokenizer = load_tokenizer(str(tokenizer_folders["gpt2"]))
    tokenizer.chat_template = INSTRUCT.replace("BEGIN", "")
    with pytest.raises(RowSkipped, match=r"that the chat template refuses \(no system messages here\)"):
        finish(Conversation([{"role": "system", "content": "S"}, DIALOGUE[0]], "yes"), template_of(tokenizer))


def test_answers_that_the_template_rewrites_have_no_place(tokenizer_folders):
    tokenizer = load_tokenizer(str(tokenizer_folders["gpt2"]))
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    text, spans = ChatTemplate(tokenizer).prompt(DIALOGUE)
    assert "HOW ARE YOU?" in text and spans is None
    assert ChatTemplate(tokenizer).prompt(DIALOGUE[:1])[1] == ()


# As Gemma's: the end of a turn is a special token that is not EOS.
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)


@pytest.fixture(params=["llama", "gpt2", "slow"])
def gemma(request, tokenizer_folders):
    tokenizer = load_tokenizer(str(tokenizer_folders[request.param]))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = GEMMA
    return tokenizer


def test_a_special_token_that_ends_a_turn_ends_the_answer(tmp_path, gemma):
    turn = gemma.convert_tokens_to_ids("<end_of_turn>")
    assert end_ids(gemma) == [gemma.eos_token_id, turn]
    row = encode(tmp_path, gemma, rows(*DIALOGUE), train_on="all")
    assert row["input_ids"][-1] == turn and gemma.eos_token_id not in row["input_ids"][1:]
    learned = [i for i, mask in zip(row["input_ids"][row["prompt_length"] :], row["loss_mask"], strict=True) if mask]
    assert learned.count(turn) == 2 and len(row["loss_mask"]) == len(row["input_ids"]) - row["prompt_length"]
    answers = [[*DIALOGUE, {"role": "assistant", "content": text}] for text in (ANSWER, "No.")]
    pair = encode(
        tmp_path,
        gemma,
        [{"chosen": answers[0], "rejected": answers[1]}, {"chosen": answers[1], "rejected": answers[0]}],
        "ranking",
    )
    assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == turn
    written = [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": f" {i}", "rejected": " No"} for i in range(2)]
    pair = encode(tmp_path, gemma, written, "ranking")  # no answer of the template's
    assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == gemma.eos_token_id


def test_what_follows_the_end_of_a_turn_is_no_part_of_the_answer(tokenizer_folders):
    tokenizer = load_tokenizer(str(tokenizer_folders["qwen"]))  # as Phi-3's: the whole text ends in EOS too
    tokenizer.chat_template = CHATML.replace("im_end", "endoftext") + "{{ '' if add_generation_prompt else eos_token }}"
    assert tokenizer.eos_token == "<|im_end|>" and template_of(tokenizer).closing == "<|endoftext|>\n<|im_end|>"
    assert end_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    example = finish(Conversation(DIALOGUE, "yes"), template_of(tokenizer))
    assert example.chosen == "yes<|endoftext|>"
    (start, end), text = example.earlier[0], example.prompt
    assert text[start:end] == "How are you?<|endoftext|>"


def test_a_turns_end_that_is_no_special_token_stays_and_the_end_token_follows(tmp_path, tokenizer_folders):
    tokenizer = load_tokenizer(str(tokenizer_folders["llama"]))
    tokenizer.chat_template = "<s>" + CHATML.replace("<|im_end|>", "<end>")
    row = encode(tmp_path, tokenizer, rows(*DIALOGUE), train_on="all")
    text = tokenizer.decode(row["input_ids"])
    assert text.rstrip().endswith("<end></s>") and text.count("</s>") == 1 and text.count("<s>") == 1
    learned = [i for i, mask in zip(row["input_ids"][row["prompt_length"] :], row["loss_mask"], strict=True) if mask]
    assert tokenizer.decode(learned).count("<end>") == 2


# ------------------------------------------------------------------------------------------------------ --chat_template


def test_a_template_from_a_file_is_saved_with_the_tokenizer(tmp_path, tokenizer_folders):
    (tmp_path / "chat.jinja").write_text(CHATML)
    for given in (str(tmp_path / "chat.jinja"), CHATML):
        tokenizer = load_tokenizer(str(tokenizer_folders["qwen"]), chat_template=given)
        assert tokenizer.chat_template == CHATML
        tokenizer.save_pretrained(tmp_path / "saved")
        assert load_tokenizer(str(tmp_path / "saved")).chat_template == CHATML


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.jinja", r"--chat_template nowhere.jinja: no such file \(.*\); expected a file with a Jinja"),
        ("{% for m in messages %}", "--chat_template: cannot write a question and its answer: "),
        ("{{ messages[0].content }}", "expected the second to begin with the first|writes a question as"),
        ("{{ raise_exception('never') }}", "cannot write a question and its answer: never"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer_folders, template, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tokenizer_folders["gpt2"]), chat_template=template)


def test_a_template_error_is_named():
    class Broken:
        chat_template = "x"

        def apply_chat_template(self, *_, **__):
            raise TypeError("can only concatenate\nstr")

    with pytest.raises(TemplateRefuses, match="can only concatenate str"):
        ChatTemplate(Broken()).prompt(DIALOGUE)
