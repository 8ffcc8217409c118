import json
import shutil

import pytest

from utils.run import UserError
from utils.tokenizer import distinct_pad, load_tokenizer, same_vocabulary


@pytest.mark.parametrize(
    ("kind", "pad"),
    [
        ("gpt2", "<|endoftext|>"),  # none: the end token
        ("opt", "<pad>"),  # its own
        ("llama", "<unk>"),  # none: the unknown token, which is neither BOS nor EOS
        ("llama3", "<|eot_id|>"),  # none, and no unknown token: the end token
        ("qwen", "<|endoftext|>"),  # its own, which is not the end token <|im_end|>
        ("slow", "<pad>"),
    ],
)
def test_pad_is_own_else_unknown_else_end(tokenizer_folders, kind, pad):
    tokenizer = load_tokenizer(str(tokenizer_folders[kind]))
    assert tokenizer.pad_token == pad
    assert distinct_pad(tokenizer) == (pad != tokenizer.eos_token)


def test_no_token_is_added(tokenizer_folders):
    for kind in ("gpt2", "llama3"):
        folder = tokenizer_folders[kind]
        tokenizer = load_tokenizer(str(folder))
        assert max(tokenizer.get_vocab().values()) + 1 == len(tokenizer)
        files = {"gpt2": "vocab.json", "llama3": "tokenizer.json"}
        stored = json.loads((folder / files[kind]).read_text())
        assert len(tokenizer) == len(stored if kind == "gpt2" else stored["model"]["vocab"])


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "llama3", "qwen", "slow"])
def test_pad_survives_saving(tokenizer_folders, tmp_path, kind):
    tokenizer = load_tokenizer(str(tokenizer_folders[kind]))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.pad_token_id == tokenizer.pad_token_id and again.eos_token_id == tokenizer.eos_token_id
    assert same_vocabulary(tokenizer, again) is None
    text = "\n\nHuman: it?\n\nAssistant: yes :)"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_same_vocabulary_names_the_first_difference(tokenizer_folders):
    gpt2, qwen = (load_tokenizer(str(tokenizer_folders[kind])) for kind in ("gpt2", "qwen"))
    assert same_vocabulary(gpt2, gpt2) is None
    # id 0 is <|endoftext|> in both, id 1 a byte in gpt2 and <|im_start|> in qwen
    assert same_vocabulary(gpt2, qwen).startswith("id 1 is '!' in the one and '<|im_start|>' in the other")


def test_an_added_pad_token_is_no_difference(tokenizer_folders):
    plain, padded = (load_tokenizer(str(tokenizer_folders["gpt2"])) for _ in range(2))
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert same_vocabulary(plain, padded) is None and same_vocabulary(padded, plain) is None
    padded.add_tokens(["another"])
    assert same_vocabulary(plain, padded) == f"id {len(plain) + 1} is no token in the one and 'another' in the other"


def test_missing_and_broken_tokenizers_are_named(tmp_path, tokenizer_folders):
    with pytest.raises(UserError, match="--actor_model_name_or_path: no such folder: .*/nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"), "--actor_model_name_or_path")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="--model_name_or_path: no usable tokenizer in"):
        load_tokenizer(str(tmp_path))
    folder = tmp_path / "endless"
    shutil.copytree(tokenizer_folders["llama3"], folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(str(folder))


def test_a_hub_name_without_the_hub_is_one_line():
    with pytest.raises(UserError, match="the Hugging Face hub cannot be reached") as error:
        load_tokenizer("someone/some-model")
    assert "\n" not in str(error.value)


def test_code_in_a_tokenizers_folder_is_not_run(tokenizer_folders, tmp_path, capsys):
    for name, fields in {"only": {"tokenizer_class": "Mine"}, "beside": {}}.items():
        shutil.copytree(tokenizer_folders["llama3"], tmp_path / name)
        (tmp_path / name / "code.py").write_text("raise SystemExit('run')")
        change(tmp_path / name / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Mine", None]}, **fields)
    with pytest.raises(UserError, match="only: it needs Python code of its own, which is not run here"):
        load_tokenizer(str(tmp_path / "only"))
    load_tokenizer(str(tmp_path / "beside"))
    assert "has Python code of its own, which is not run" in capsys.readouterr().out


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_tokenizer_files_with_strange_values_are_one_line(tokenizer_folders, tmp_path):
    shutil.copytree(tokenizer_folders["llama3"], tmp_path / "length")
    change(tmp_path / "length" / "tokenizer_config.json", model_max_length="abc")
    shutil.copytree(tokenizer_folders["llama3"], tmp_path / "panic")
    model = json.loads((tmp_path / "panic" / "tokenizer.json").read_text())["model"]
    change(tmp_path / "panic" / "tokenizer.json", model=model | {"continuing_subword_prefix": "abc"})
    for name in ("length", "panic"):
        with pytest.raises(UserError, match=f"--m: no usable tokenizer in .*{name}: "):
            load_tokenizer(str(tmp_path / name), "--m")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP, "it takes longer than 0.2 s"),
        ("{{ 'x' * 2_000_000 }}", "it writes 2000000 characters"),
        ("{{ 'x' * 10**13 }}", "it ends in a MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it ends in a RecursionError"),
        ("{{ 1 / 0 }}", "division by zero"),
        ({"first": "{{ messages }}", "second": "{{ messages }}"}, "no default"),
    ],
)
def test_a_template_that_loops_or_explodes_is_refused(tokenizer_folders, tmp_path, monkeypatch, template, reason):
    monkeypatch.setattr("utils.tokenizer.TEMPLATE_SECONDS", 0.2)
    source = str(tokenizer_folders["llama3"])
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"--m: the chat template of .* cannot write one question .*{reason}.*; mend"):
        load_tokenizer(str(tmp_path), "--m")
    if isinstance(template, str):
        with pytest.raises(UserError, match=f"--chat_template: cannot write a question and its answer: {reason}"):
            load_tokenizer(source, chat_template=template)


def test_a_template_of_a_folder_may_refuse_a_bare_question(tokenizer_folders, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_folders["llama3"]))
    tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template
