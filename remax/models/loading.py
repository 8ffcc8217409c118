"""Hugging Face models as this project uses them: loading, dropout, adapters, and the policy's per-token forward.

`PolicyModel` and `reward_model.RewardModel` are what DeepSpeed wraps: their forward is one call that returns only small
tensors, so the ZeRO-3 hooks see one ordinary forward and the full-vocabulary logits never leave it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from utils.run import UserError


def quiet_libraries() -> None:
    """Progress bars and notes of transformers and datasets off: every rank would print them, for every model."""
    import datasets
    from transformers.utils import logging

    # DeepSpeed's calls of torch.distributed, seen by every rank; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_config(name_or_path: str, flag: str, *, disable_dropout: bool = False) -> PreTrainedConfig:
    """The model's configuration; a UserError naming `flag` when there is none.

    With `disable_dropout` every dropout rate is 0, by whatever name the family has for it.
    """
    if Path(name_or_path).is_dir() and not (Path(name_or_path) / "config.json").is_file():
        raise UserError(f"{flag}: the folder {name_or_path} holds no config.json; expected a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag}: no model at {name_or_path!r} ({reason}); expected a Hugging Face model folder, or a hub name "
            "that can be reached"
        ) from error
    config.use_cache = True
    for name, value in list(config.to_dict().items()) if disable_dropout else ():
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop")) or "layerdrop" in name):
            setattr(config, name, 0.0)
    return config


def check_length(config: PreTrainedConfig, tokens: int, flags: str, model_flag: str = "--model_name_or_path") -> None:
    """Refuses sequences longer than the model has positions for, where it says how many that is."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"{flags}: {tokens} tokens, but the model of {model_flag} has {positions} positions; lower it")


def from_pretrained(
    auto_class: type[AutoModelForCausalLM | AutoModelForSequenceClassification],
    name_or_path: str,
    flag: str,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`auto_class.from_pretrained`, with its loading report; loading trouble becomes one line naming the flag."""
    options = {name: value for name, value in options.items() if value is not None}
    try:
        loaded: Any = auto_class.from_pretrained(name_or_path, output_loading_info=True, **options)
        return loaded
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: cannot load {name_or_path!r}: {str(error).strip().splitlines()[0]}") from error


def prepare_training(hf: PreTrainedModel, gradient_checkpointing: bool) -> None:
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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


def count_parameters(model: nn.Module) -> int:
    """Parameters at full size, also under ZeRO-3."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
