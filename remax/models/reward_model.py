"""The reward model: a backbone and a scalar head, read at each sequence's last token.

It is Hugging Face's own `AutoModelForSequenceClassification` with one label, so that what step 2 saves loads in plain
transformers, and any such model from elsewhere serves in step 3. The score is read at the row's end by its length.
Plain transformers reads it at the last token that differs from `config.pad_token_id`: the same place as long as pad
differs from EOS, which `prepare_pad_token` sees to.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from remax.core.sequences import Sequences
from remax.models.loading import embedded_tokens, from_pretrained, load_config, on_the_gpu, prepare_training
from remax.models.packing import Reader, last_hidden, prepare_packing
from remax.models.saved_adapters import merge_saved, saved_labels
from utils.adapter_folder import base_model, is_adapter
from utils.run import UserError
from utils.tokenizer import distinct_pad

PAD_TOKEN = "<|pad|>"


class RewardModel(nn.Module):
    """Scores of whole sequences, or of every token of the answers (as a critic)."""

    def __init__(self, hf: PreTrainedModel, *, packing: bool = False):
        super().__init__()
        self.hf, self.packing = hf, packing
        if packing:
            prepare_packing(hf)
        self.head.forward = MethodType(score_in_float32, self.head)

    @property
    def head(self) -> nn.Module:
        return self.hf.get_submodule("score")

    def forward(self, sequences: Sequences, every_token: bool = False) -> Tensor:
        """(B,) float32 score at each row's last token.

        With `every_token`: (B, A) values at the positions before each answer token.
        """
        return read_scores(self.hf, self.head, sequences, every_token, self.packing)


def read_scores(
    hf: PreTrainedModel, head: nn.Module, sequences: Sequences, every_token: bool = False, packing: bool = False
) -> Tensor:
    """As `RewardModel` gives them, by any head on any backbone."""
    columns = sequences.predictor_columns if every_token else sequences.end_index
    scores = head(last_hidden(hf, sequences, columns, packing)).squeeze(-1)
    return scores * sequences.answer_mask if every_token else scores


def score_in_float32(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(..., H) -> (..., 1). In bf16 a score near 3 has steps of 1/64, and ReMax learns from differences of scores."""
    bias = None if head.bias is None else head.bias.float()
    return F.linear(hidden.float(), head.weight.float(), bias)


def prepare_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Gives the tokenizer a pad token of its own where pad is EOS.

    Returns:
        Whether a token was added, so that the model needs one more row.
    """
    if distinct_pad(tokenizer):
        return False
    if PAD_TOKEN in tokenizer.get_vocab():
        tokenizer.pad_token = PAD_TOKEN
        return False
    return tokenizer.add_special_tokens({"pad_token": PAD_TOKEN}) > 0


def check_reward_config(config: PreTrainedConfig, name_or_path: str, flag: str) -> None:
    """Refuses what is no reward model as far as its configuration tells, before any weights are read."""
    kinds = config.architectures or []
    if kinds and not any("SequenceClassification" in kind for kind in kinds):
        raise UserError(f"{flag}: {name_or_path} is a {kinds[0]}; expected a reward model, as step 2 saves it")
    if config.num_labels != 1:
        raise UserError(
            f"{flag}: {name_or_path} has {config.num_labels} labels; expected a reward model with one score"
        )


def load_reward_model(
    name_or_path: str,
    flag: str,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    new_head: bool = False,
    disable_dropout: bool = True,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    packing: bool = False,
    merged: bool = True,
) -> RewardModel:
    """A sequence classifier with one label.

    With `new_head` the head may be missing (a language model as backbone) and starts fresh. See `load_policy` for
    `merged`.

    Raises:
        UserError: The architecture has no `score` head, a finished reward model lacks its head's weights, or it has
            more labels than one.
    """
    config = load_config(name_or_path, flag, disable_dropout=disable_dropout)
    if new_head:
        config.num_labels = 1
    else:
        check_reward_config(config, name_or_path, flag)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": attn_implementation}
    options |= {} if new_head else on_the_gpu()  # a new head is drawn by the CPU, the same on every machine
    base, of_base = base_model(name_or_path, flag)
    hf, new = from_pretrained(AutoModelForSequenceClassification, base, of_base, new_head=True, **options)
    if not hasattr(hf, "score"):
        raise UserError(
            f"{flag}: {type(hf).__name__} has no `score` head; expected a decoder such as GPT-2, OPT, Llama, Mistral "
            "or Qwen"
        )
    saved = is_adapter(name_or_path) and saved_labels(name_or_path, flag) > 0
    if not (new_head or saved) and any(key.startswith("score.") for key in new):
        raise UserError(
            f"{flag}: {name_or_path} has no weights for its score head; expected a reward model, as step 2 saves it"
        )
    if len(tokenizer) > embedded_tokens(hf):
        hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    hf.config.pad_token_id = tokenizer.pad_token_id  # an added one has no row to be loaded into before the resizing
    if merged and is_adapter(name_or_path):
        merge_saved(hf, name_or_path, flag)
    prepare_training(hf, gradient_checkpointing)
    return RewardModel(hf, packing=packing)


def store_score_statistics(model: Reader, figures: dict[str, float]) -> None:
    """Keeps mean and spread of the held-out scores in the model's config: what is a large score, what a small one."""
    model.hf.config.score_mean, model.hf.config.score_std = figures["score_mean"], figures["score_std"]


def score_statistics(config: PreTrainedConfig, name_or_path: str, flag: str) -> tuple[float, float]:
    """Mean and standard deviation that `store_score_statistics` kept.

    Raises:
        UserError: The config has none, or a deviation that cannot be divided by.
    """
    kept: list[Any] = [getattr(config, name, None) for name in ("score_mean", "score_std")]
    mean, std = kept
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in kept) or std <= 0:
        raise UserError(
            f"--normalize_reward: the config.json of {flag} {name_or_path} has score_mean {mean} and score_std {std}; "
            "expected numbers, the second above 0, as step 2 writes them"
        )
    return float(mean), float(std)
