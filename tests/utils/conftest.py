"""Tiny tokenizers of the kinds that real models have, trained on two sentences."""

import io
import json
from pathlib import Path

import pytest

TEXTS = [
    "\n\nHuman: How are you today, my friend?\n\nAssistant: I am fine :) thank you. See 1234.",
    "Hello world!\n\nHuman: What is it?\n\nAssistant: It is (a) thing: yes.\nSo",
] * 20
KINDS = ("gpt2", "opt", "llama", "llama3", "qwen", "slow")


def byte_level(special: list[str]):
    """A BPE tokenizer on bytes, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_model() -> bytes:
    """A sentencepiece BPE model with byte fallback, as Llama-2's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def save(folder: Path, model_type: str, config: dict, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def vocabulary_files(special: list[str]) -> dict[str, bytes]:
    """vocab.json and merges.txt."""
    model = json.loads(byte_level(special).to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges]).encode(),
    }


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory) -> dict[str, Path]:
    """{kind: folder}."""
    from tokenizers import processors

    base = tmp_path_factory.mktemp("tokenizers")
    end = "<|endoftext|>"
    gpt2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
    opt = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"}
    opt |= {"unk_token": "</s>", "pad_token": "<pad>"}
    llama = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama |= {"add_bos_token": True, "legacy": False}
    qwen = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": end, "bos_token": None}
    slow = {"tokenizer_class": "GPTSw3Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama3 = byte_level(["<|begin_of_text|>", "<|eot_id|>"])
    llama3.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    llama3_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    llama3_config |= {"eos_token": "<|eot_id|>"}
    pieces = sentencepiece_model()
    return {
        "gpt2": save(base / "gpt2", "gpt2", gpt2, vocabulary_files([end])),
        "opt": save(base / "opt", "opt", opt, vocabulary_files(["<s>", "<pad>", "</s>", "<unk>"])),
        "llama": save(base / "llama", "llama", llama, {"tokenizer.model": pieces}),
        "llama3": save(base / "llama3", "llama", llama3_config, {"tokenizer.json": llama3.to_str().encode()}),
        "qwen": save(base / "qwen", "qwen2", qwen, vocabulary_files([end, "<|im_start|>", "<|im_end|>"])),
        "slow": save(base / "slow", "gpt2", slow, {"spiece.model": pieces}),
    }


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request, tokenizer_folders):
    """A tokenizer of each kind in turn."""
    from utils.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_folders[request.param]))


@pytest.fixture(scope="session")
def gpt2(tokenizer_folders):
    """Pad is the end token, and nothing stands before a text."""
    from utils.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_folders["gpt2"]))
