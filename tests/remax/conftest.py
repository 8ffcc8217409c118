"""Tiny models whose every weight matters: random and large, so that a lost, swapped or reset tensor shows."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from remax.core.sequences import Sequences
from tests import zygote

ROOT = Path(__file__).resolve().parents[2]


def make_config(architecture: str, **fields):
    """OPT projects its embeddings (16 wide) into the hidden size, as opt-350m does; Gemma 2 caps its logits, Cohere and
    Granite scale theirs.
    """
    from transformers import CohereConfig, Gemma2Config, GraniteConfig

    from remax.demo.tiny_models import tiny_config

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128} | fields
    if architecture == "gemma2":
        caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0}
        return Gemma2Config(head_dim=8, sliding_window=8, **caps, **sizes)
    if architecture == "cohere":
        return CohereConfig(logit_scale=0.3, **sizes)
    if architecture == "granite":
        return GraniteConfig(logits_scaling=3.0, embedding_multiplier=2.0, **sizes)
    extra = {"opt": {"word_embed_proj_dim": 16}, "qwen2": {"tie_word_embeddings": True}}.get(architecture, {})
    return tiny_config(architecture, **({"max_positions": 128} | extra | fields))


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.25) -> None:
    """Every parameter drawn anew: 1 + noise for norms' scales, noise for all others."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or "ln_" in name else 0.0
            if parameter.dim() == 1:
                centre = centre if name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=noise))
            else:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """Folders of three tokenizers with the same words: a pad token of its own, pad = EOS, and none at all."""
    from remax.demo.corpus import make_rows
    from remax.demo.tiny_models import train_tokenizer

    train, _ = make_rows(seed=0, train_rows=100, test_rows=1)
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, pad in {"own": "<pad>", "eos": None, "none": None}.items():
        tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in train], vocab_size=300, pad_token=pad)
        if kind == "eos":
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("own", "eos", "none")}


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory, tokenizers):
    """make_policy("opt", pad="own", seed=0, ...) -> folder of a causal language model with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path_factory.mktemp("policies")

    @functools.cache
    def make(architecture: str, pad: str = "own", seed: int = 0, **fields) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(tokenizers[pad])
        config = make_config(
            architecture,
            vocab_size=len(tokenizer) + 8 * (architecture == "qwen2"),  # Qwen's embedding has rows to spare
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if pad != "none" or architecture == "gpt2" else tokenizer.eos_token_id,
            **fields,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model, seed)
        folder = base / "-".join([architecture, pad, str(seed), *map(str, fields.values())])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def save_adapters():
    """save_adapters(base, folder, scorer=False, **LoraConfig) -> the model of PEFT that it saves."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def save(base: Path, folder: Path, scorer: bool = False, **settings):
        model = (
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
            if scorer
            else AutoModelForCausalLM.from_pretrained(base)
        )
        task = TaskType.SEQ_CLS if scorer else TaskType.CAUSAL_LM
        options = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "target_modules": "all-linear", "task_type": task}
        adapted = get_peft_model(model, LoraConfig(**options | settings))
        noise = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=noise))
        adapted.save_pretrained(folder)
        return adapted.eval()

    return save


@pytest.fixture(scope="session")
def make_scorer(tmp_path_factory, make_policy):
    """make_scorer("opt", pad="own", seed=5, ...) -> folder of a reward model on the same tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tmp_path_factory.mktemp("scorers")

    @functools.cache
    def make(architecture: str, pad: str = "own", seed: int = 5, **fields) -> Path:
        source = make_policy(architecture, pad, **fields)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
        randomise(model, seed)
        folder = base / "-".join([architecture, pad, str(seed), *map(str, fields.values())])
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_two_headed(tmp_path_factory, make_policy):
    """make_two_headed("opt") -> folder of a language model that scores too, and one of the same as a reward model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tmp_path_factory.mktemp("two_headed")

    @functools.cache
    def make(architecture: str, seed: int = 7) -> tuple[Path, Path]:
        both, scorer = (base / f"{architecture}-{seed}-{kind}" for kind in ("both", "scorer"))
        shutil.copytree(make_policy(architecture), both)
        model = AutoModelForSequenceClassification.from_pretrained(both, num_labels=1)
        with torch.no_grad():
            model.score.weight.normal_(0, 0.25, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(scorer)
        AutoTokenizer.from_pretrained(both).save_pretrained(scorer)
        weights = load_file(both / "model.safetensors") | {"score.weight": model.score.weight.detach()}
        save_file(weights, both / "model.safetensors", metadata={"format": "pt"})
        config, other = (json.loads((folder / "config.json").read_text()) for folder in (both, scorer))
        labels = {name: other[name] for name in ("id2label", "label2id", "num_labels") if name in other}
        config |= labels | {"architectures": config["architectures"] + other["architectures"]}
        (both / "config.json").write_text(json.dumps(config))
        return both, scorer

    return make


def random_sequences(seed: int, rows: int, vocabulary: int, *, longest: int = 9, pad_id: int = 0) -> Sequences:
    """Prompts of 1 to `longest` tokens and answers of 1 to `longest`, the first row the longest."""
    noise = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, longest + 1, (rows,), generator=noise)
    answer_lengths = torch.randint(1, longest + 1, (rows,), generator=noise)
    prompt_lengths[0] = answer_lengths[0] = longest
    ids = torch.randint(vocabulary, (rows, 2 * longest), generator=noise)
    sequences = Sequences(ids, prompt_lengths, answer_lengths)
    return Sequences(ids.masked_fill(~sequences.mask, pad_id), prompt_lengths, answer_lengths)


@pytest.fixture(scope="session")
def sequences_of():
    """sequences_of(seed, rows, vocabulary) -> Sequences of random tokens and unequal lengths."""
    return random_sequences


@pytest.fixture(scope="session")
def save_rows(tmp_path_factory):
    """save_rows(seed, rows, vocabulary) -> path of random sequences, for the worker."""
    folder = tmp_path_factory.mktemp("rows")

    def save(seed: int, rows: int, vocabulary: int) -> str:
        path = folder / f"{seed}-{rows}-{vocabulary}.pt"
        sequences = random_sequences(seed, rows, vocabulary)
        torch.save({f.name: getattr(sequences, f.name) for f in dataclasses.fields(sequences)}, path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory):
    """run_ranks(checks, ranks) -> (results by name, folder): worker.py on so many ranks, one process each."""

    def run(checks: list[dict], ranks: int, timeout: float = 300) -> tuple[dict, Path]:
        folder = tmp_path_factory.mktemp(f"{ranks}_ranks")
        job = folder / "job.json"
        job.write_text(json.dumps({"folder": str(folder), "checks": checks}))
        # DeepSpeed asks the PATH for ninja when it looks for its compiled optimizer.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        try:
            program = Path(__file__).parent / "worker.py"
            zygote.run_ranks(program, [job], folder=ROOT, logs=logs, timeout=timeout, environment={"PATH": path})
        except RuntimeError as error:
            pytest.fail(f"the worker failed: {error}", pytrace=False)
        return json.loads((folder / "results.json").read_text()), folder

    return run
