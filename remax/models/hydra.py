"""One backbone with two heads: a policy and a reward model in one set of weights (Hydra-SFT, arXiv 2309.00754).

The folder is that of the causal language model with one tensor more, `score.weight`, which has the name that the
family's sequence classifier gives it; the `architectures` of its config.json name both classes. So plain transformers
reads it as either, and leaves the other head aside.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from remax.core.sampling import Sampling
from remax.core.sequences import Sequences
from remax.models.loading import embedded_tokens, from_pretrained, has_both_heads, load_config, prepare_training
from remax.models.packing import last_hidden
from remax.models.policy import PolicyModel, check_policy_config, neutralise, read_generation_config
from remax.models.reward_model import read_scores, score_in_float32
from remax.models.saved_adapters import merge_saved
from remax.models.weights import unpartitioned
from utils.adapter_folder import base_model, is_adapter
from utils.present import present
from utils.run import UserError


@functools.cache
def two_headed(kind: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The causal language model of a configuration's class with the score head of its sequence classifier beside.

    Raises:
        KeyError: transformers knows no such model, or no such classifier.
    """
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    scorer: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]

    class TwoHeaded(causal):
        def __init__(self, config: PreTrainedConfig):
            super().__init__(config)
            width = self.get_output_embeddings().in_features  # both heads read the same hidden states
            self.score = nn.Linear(width, present(config.num_labels, "num_labels"), bias=False)

        def save_pretrained(self, folder: Any, **options: Any) -> None:
            super().save_pretrained(folder, **options)
            self.config.architectures = [causal.__name__, scorer.__name__]
            self.config.save_pretrained(folder)

    return TwoHeaded


class HydraModel(PolicyModel):
    """A policy that also scores."""

    def __init__(
        self, hf: PreTrainedModel, own_generation_config: GenerationConfig | None = None, *, packing: bool = False
    ):
        super().__init__(hf, own_generation_config, packing=packing)
        self.score_head.forward = MethodType(score_in_float32, self.score_head)

    @property
    def score_head(self) -> nn.Module:
        """(..., H) hidden states -> (..., 1) scores."""
        return self.hf.get_submodule("score")

    def forward(
        self,
        sequences: Sequences,
        *args: Any,
        head: Literal["language", "score", "both"] = "language",
        rows: int | None = None,
        **options: Any,
    ) -> Any:
        """What the heads make of one forward of the backbone.

        Args:
            head: "language": as `PolicyModel.forward`; "score": as `RewardModel.forward`; "both": see
                `logprobs_and_scores`.
            rows: With both: rows whose log-probs are wanted, the first ones.
            options: Of `PolicyModel.forward`, or with both those of `token_stats`.
        """
        if head == "language":
            return super().forward(sequences, *args, **options)
        if head == "both":
            return self.logprobs_and_scores(sequences, len(sequences) if rows is None else rows, **options)
        return read_scores(self.hf, self.score_head, sequences, packing=self.packing)

    def logprobs_and_scores(
        self, sequences: Sequences, rows: int, *, chunks: int = 1, sampling: Sampling | None = None
    ) -> tuple[Tensor, Tensor]:
        """(rows, A) log-probs of the first rows' answer tokens, and (B,) float32 scores of all rows.

        A is the longest answer of those rows.
        """
        columns = torch.cat([sequences.predictor_columns, sequences.end_index[:, None]], 1)  # (B, A + 1)
        hidden = last_hidden(self.hf, sequences, columns, self.packing)  # (B, A + 1, H)
        first = sequences.select(slice(0, rows))
        predictors = hidden[:rows, : first.answer_width]
        logprobs, _, _ = self.stats(predictors, first, chunks=chunks, sampling=sampling or Sampling())
        return logprobs, self.score_head(hidden[:, -1]).squeeze(-1)


def check_hydra_config(config: PreTrainedConfig, name_or_path: str, flag: str) -> None:
    """Refuses what holds no policy and reward model in one, as far as its configuration tells."""
    if not has_both_heads(config) or config.num_labels != 1:
        kind = " and ".join(config.architectures or [type(config).__name__])
        raise UserError(
            f"{flag}: {name_or_path} is a {kind}; expected a language model with a score head in one folder, as step 2 "
            "saves it with --loss hydra"
        )


def load_hydra(
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
) -> HydraModel:
    """A causal language model with a score head; see `load_policy` for `merged`.

    With `new_head` the head may be missing (the model of step 1) and starts fresh. Tokens that the tokenizer has and
    the model does not, such as a pad token of its own, get the mean of the known tokens' rows: so at first each is
    nowhere more probable than 1 / V, V the known tokens.

    Raises:
        UserError: As `load_policy` and `load_reward_model`.
    """
    config = load_config(name_or_path, flag, disable_dropout=disable_dropout)
    check_policy_config(config, name_or_path, flag)
    if new_head:
        config.num_labels = 1
    else:
        check_hydra_config(config, name_or_path, flag)
    kind = class_with_heads(config, flag)
    base, of_base = base_model(name_or_path, flag)
    own = read_generation_config(base, of_base)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": attn_implementation}
    hf, new = from_pretrained(kind, base, of_base, new_head=new_head, **options)  # a new head: drawn by the CPU
    add_tokens(hf, len(tokenizer))
    if merged and is_adapter(name_or_path):
        merge_saved(hf, name_or_path, flag)
    own = own or hf.generation_config
    neutralise(hf, own, tokenizer, name_or_path, flag)
    hf.config.pad_token_id = tokenizer.pad_token_id
    prepare_training(hf, gradient_checkpointing)
    return HydraModel(hf, own, packing=packing)


def class_with_heads(config: PreTrainedConfig, flag: str) -> type[PreTrainedModel]:
    """See `two_headed`.

    Raises:
        UserError: The family has no score head, or a classifier whose weights have other names.
    """
    family: Any = type(config)
    try:
        kind: Any = two_headed(family)
        scorer: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[family]
        with unpartitioned(), torch.device("meta"):  # names and shapes alone
            both, alone = ({(k, x.shape) for k, x in of(config).state_dict().items()} for of in (kind, scorer))
        fits = alone <= both and any(name == "score.weight" for name, _ in alone)
    except (KeyError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{flag}: models of the type {config.model_type!r} have no score head beside their language head; expected "
            "a decoder such as GPT-2, OPT, Llama, Mistral or Qwen"
        )
    return kind


@torch.no_grad()
def add_tokens(hf: PreTrainedModel, tokens: int) -> None:
    """Makes room for tokens, see `load_hydra`. Under ZeRO-3 what `resize_token_embeddings` makes is whole."""
    known = embedded_tokens(hf)
    if tokens <= known:
        return
    hf.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (hf.get_input_embeddings(), hf.get_output_embeddings()):
        for parameter in layer.parameters():  # a weight, and the bias that few families have
            parameter[known:] = parameter[:known].float().mean(0).to(parameter.dtype)
