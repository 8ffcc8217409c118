"""Hugging Face models as this project uses them: loading, dropout, adapters, and the policy's per-token forward.

`PolicyModel` and `reward_model.RewardModel` are what DeepSpeed wraps: their forward is one call that returns only small
tensors, so the ZeRO-3 hooks see one ordinary forward and the full-vocabulary logits never leave it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from remax.models.saved_adapters import config_with_adapters
from remax.models.weights import (
    broken_files,
    check_files,
    check_finite,
    check_number_formats,
    check_report,
    restore_buffers,
    unpartitioned,
)
from utils.adapter_folder import CONFIG as ADAPTER_CONFIG
from utils.adapter_folder import base_model, is_adapter
from utils.distributed import device, print0
from utils.hub import hub_is_reachable
from utils.run import UserError, one_line


def quiet_libraries() -> None:
    """Progress bars and notes of transformers and datasets off: every rank would print them, for every model."""
    import datasets
    from transformers.utils import logging

    # DeepSpeed's calls of torch.distributed, seen by every rank; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


SIZES = (  # of a configuration: what must be 1 at least
    *("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer"),
    *("num_attention_heads", "n_head", "num_key_value_heads"),
)


def reason_of(error: BaseException) -> str:
    """What a library says of a failure, on one line."""
    text = one_line(error)
    if "trust_remote_code" in text:
        return "it needs Python code of its own, which is not run here"
    if isinstance(error, KeyError):
        return f"{text} is nothing that transformers knows"
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def check_values(raw: dict[str, Any]) -> None:
    """Refuses values of a config.json that transformers takes, and that no model can have.

    Raises:
        ValueError: Names the field.
    """
    for name, value in raw.items():
        number = isinstance(value, (int, float))
        if number and not (math.isfinite(value) and abs(value) < 2**63):
            raise ValueError(f"{name} is {value}; expected a number in range")
        if number and name in SIZES and value < 1:
            raise ValueError(f"{name} is {value}; expected 1 at least")
        if number and is_dropout(name) and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; expected 0 at least, and less than 1")
    kinds = raw.get("architectures") or []
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"architectures is {kinds!r}; expected a list of names")


def is_dropout(field: str) -> bool:
    """Whether a field of a configuration is a dropout rate."""
    return field.endswith(("dropout", "pdrop")) or "layerdrop" in field


def load_config(name_or_path: str, flag: str, *, disable_dropout: bool = False) -> PreTrainedConfig:
    """The model's configuration; of a PEFT folder that of its base with the adapters.

    With `disable_dropout` every dropout rate is 0, by whatever name the family has for it.

    Raises:
        UserError: There is no model, one that nobody could build or train, or one that is quantised.
    """
    folder = Path(name_or_path)
    if is_adapter(name_or_path):
        config = load_config(*base_model(name_or_path, flag), disable_dropout=disable_dropout)
        return config_with_adapters(config, name_or_path, flag)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{flag}: the folder {name_or_path} holds no config.json; expected a Hugging Face model folder")
    if not folder.is_dir():
        hub_is_reachable()  # or else offline from here on, where the libraries would wait for it
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name_or_path)
        check_values(raw)
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # whatever the configuration's own class makes of wrong values
        raise UserError(
            f"{flag}: no model at {name_or_path!r} ({reason_of(error)}); expected a Hugging Face model folder, "
            "or a hub name that can be reached"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{flag}: {name_or_path} is quantised (quantization_config in its config.json); expected weights in fp32, "
            "bf16 or fp16"
        )
    config.use_cache = config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    return without_dropout(config) if disable_dropout else config


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same object, with every dropout rate 0, by whatever name the family has for it."""
    for name, value in list(config.to_dict().items()):
        if isinstance(value, float) and is_dropout(name):
            setattr(config, name, 0.0)
    return config


def has_both_heads(config: PreTrainedConfig) -> bool:
    """Whether a folder holds a language model and a reward model in one, as step 2 writes it with --loss hydra."""
    kinds = config.architectures or []
    return 0 < sum("SequenceClassification" in kind for kind in kinds) < len(kinds)


def check_length(config: PreTrainedConfig, tokens: int, flags: str, model_flag: str = "--model_name_or_path") -> None:
    """Refuses sequences longer than the model has positions for, where it says how many that is."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"{flags}: {tokens} tokens, but the model of {model_flag} has {positions} positions; lower it")


def from_pretrained(
    auto_class: type[AutoModelForCausalLM | AutoModelForSequenceClassification | PreTrainedModel],
    name_or_path: str,
    flag: str,
    *,
    new_head: bool = False,
    spare_head: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """`auto_class.from_pretrained`, refusing weights that are not the model's; and the names of those that are new.

    Code of the model's own is never run. See `check_report` for `new_head` and `spare_head`.

    Raises:
        UserError: What is wrong, on one line naming the flag.
    """
    folder = Path(name_or_path)
    check_files(folder, flag)
    options = {name: value for name, value in options.items() if value is not None} | {"trust_remote_code": False}
    report_only = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    load: Any = auto_class.from_pretrained  # whose declared type knows no loading report
    try:
        with unpartitioned(), torch.random.fork_rng(devices=[]):  # names and shapes alone: nothing is allocated
            whole, report = load(name_or_path, **copy.deepcopy(options) | report_only)
        check_report(report, name_or_path, flag, new_head=new_head, spare_head=spare_head)
        check_number_formats(whole, folder, flag)
        loaded = load(name_or_path, **options)
        if is_deepspeed_zero3_enabled():
            restore_buffers(loaded, whole, flag)
    except UserError:
        raise
    except Exception as error:  # from wrong values in config.json to files that are cut
        broken = broken_files(folder)
        where = f" (broken: {', '.join(broken)})" if broken else ""
        raise UserError(f"{flag}: cannot load {name_or_path!r}{where}: {reason_of(error)}") from error
    if getattr(loaded.config, "auto_map", None):
        print0(f"{flag}: {name_or_path} has Python code of its own, which is not run: {type(loaded).__name__} reads it")
    check_finite(loaded, name_or_path, flag)
    return loaded, set(report["missing_keys"])


def on_the_gpu() -> dict[str, Any]:
    """Options of `from_pretrained` that read weights into the GPU, not first into every rank's CPU memory.

    Not under ZeRO-3, which spreads them as they are read.
    """
    whole = torch.cuda.is_available() and not is_deepspeed_zero3_enabled()
    return {"device_map": {"": device()}} if whole else {}


def prepare_training(
    hf: PreTrainedModel, gradient_checkpointing: bool, contexts: Callable[[], Any] | None = None
) -> None:
    """Recomputes activations where that is wanted, by whichever of its names this version of transformers knows.

    Args:
        contexts: Gives the contexts of a layer's forward and of its recomputation, see `torch.utils.checkpoint`.
    """
    if not gradient_checkpointing:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if contexts is not None:
        options["context_fn"] = contexts
    if hasattr(hf, "activation_checkpointing_enable"):
        hf.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside, the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def embedded_tokens(hf: PreTrainedModel) -> int:
    """Rows of the input embedding: token ids must be smaller."""
    return cast(nn.Embedding, hf.get_input_embeddings()).num_embeddings


def count_parameters(model: nn.Module, trained_only: bool = False) -> int:
    """Parameters at full size, also under ZeRO-3; tied ones count once."""
    counted = (p for p in model.parameters() if p.requires_grad or not trained_only)
    return sum(getattr(p, "ds_numel", p.numel()) for p in counted)


SAMPLES, SAMPLE = 32, 65536  # pieces of each file of weights that its fingerprint reads, and their bytes


def fingerprint(name_or_path: str, flag: str) -> str:
    """Tells weights from others: by their files' sizes and pieces of them; on the hub by their commit.

    Of a PEFT folder, its base model's tell, too. Raises UserError as `load_config`.
    """
    folder, digest = Path(name_or_path), hashlib.sha256()
    if not folder.is_dir():
        return str(getattr(load_config(name_or_path, flag), "_commit_hash", None))
    if is_adapter(name_or_path):
        digest.update(fingerprint(*base_model(name_or_path, flag)).encode())
    for file in sorted(folder.glob("*config.json")):
        if file.name in ("config.json", ADAPTER_CONFIG):
            digest.update(file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("pytorch_model*.bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for k in range(SAMPLES):
                weights.seek(k * max(size - SAMPLE, 0) // (SAMPLES - 1))
                digest.update(weights.read(SAMPLE))
    return digest.hexdigest()[:24]
