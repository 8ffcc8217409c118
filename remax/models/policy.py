"""The policy: a causal language model that says how probable answers are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from remax.core.fused import fused_stats
from remax.core.linear import linear_in_float32
from remax.core.logprobs import Head, token_stats
from remax.core.sampling import Sampling
from remax.core.sequences import Sequences
from remax.models.loading import (
    embedded_tokens,
    from_pretrained,
    has_both_heads,
    load_config,
    on_the_gpu,
    prepare_training,
    reason_of,
)
from remax.models.packing import last_hidden, prepare_packing
from remax.models.saved_adapters import merge_saved
from utils.adapter_folder import base_model, is_adapter
from utils.data.tokens import end_ids
from utils.run import UserError


def check_policy_config(config: PreTrainedConfig, name_or_path: str, flag: str) -> None:
    """Refuses what writes no text from left to right as far as its configuration tells, before any weights are read."""
    kind = (config.architectures or [type(config).__name__.removesuffix("Config")])[0]
    two_sided = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if "SequenceClassification" in kind or "MaskedLM" in kind or config.is_encoder_decoder or two_sided:
        raise UserError(f"{flag}: {name_or_path} is a {kind}; expected a causal language model, as step 1 saves it")


def read_generation_config(name_or_path: str, flag: str) -> GenerationConfig | None:
    """What the generation_config.json of a folder says, None where there is none: see `neutralise`."""
    if not (Path(name_or_path) / "generation_config.json").is_file():
        return None
    try:  # transformers passes over a file that it cannot read
        return GenerationConfig.from_pretrained(name_or_path)
    except Exception as error:
        raise UserError(
            f"{flag}: the generation_config.json of {name_or_path} cannot be read ({reason_of(error)}); mend it, or "
            "remove it"
        ) from error


def neutralise(
    hf: PreTrainedModel, own: GenerationConfig, tokenizer: PreTrainedTokenizerBase, name_or_path: str, flag: str
) -> None:
    """Gives `hf` a neutral generation config; its `own` is kept for the export.

    A model's generation_config.json may set top_k, temperature or a repetition penalty. Those would silently change the
    distribution that answers are drawn from, so rollouts start from a neutral configuration that knows the special
    tokens only.
    """
    eos, rows = own.eos_token_id, embedded_tokens(hf)
    eos_ids = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    if strange := [i for i in eos_ids if not isinstance(i, int) or not 0 <= i < rows]:
        raise UserError(
            f"{flag}: the generation config of {name_or_path} ends answers by {strange[0]!r}; expected eos_token_id to "
            f"be ids from 0 to {rows - 1}, which the model embeds"
        )
    eos_ids += [end for end in end_ids(tokenizer) if end not in eos_ids]
    hf.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=eos_ids, pad_token_id=own.pad_token_id
    )
    own.eos_token_id = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    if own.pad_token_id is None:  # `generate` would warn, and take the first end token
        own.pad_token_id = tokenizer.pad_token_id


class PolicyModel(nn.Module):
    """A causal language model that answers one question: how probable is each token of these answers?"""

    def __init__(
        self, hf: PreTrainedModel, own_generation_config: GenerationConfig | None = None, *, packing: bool = False
    ):
        super().__init__()
        self.hf, self.packing = hf, packing
        if packing:
            prepare_packing(hf)
        self.own_generation_config = own_generation_config or hf.generation_config
        head = cast(nn.Linear, hf.get_output_embeddings())
        head.forward = MethodType(_read_by_head, head)  # type: ignore[method-assign]

    def head(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) logits."""
        return self.scale_logits(self.hf.get_output_embeddings()(hidden))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What some families do to the logits after their output embedding."""
        config = self.hf.config
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2 and 3
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def fused(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The head as `token_stats` takes it, None where logits are not a multiple of its products.

        It is asked through the module, whose hooks make its weight whole at ZeRO-3.
        """
        config, head = self.hf.config, self.hf.get_output_embeddings()
        if getattr(config, "final_logit_softcapping", None) is not None or head.weight.dtype == torch.float16:
            return None
        factor = getattr(config, "logit_scale", None) or 1.0
        factor /= getattr(config, "logits_scaling", None) or 1.0
        return lambda hidden, *, scale, **of_targets: head(hidden, scale=factor * scale, **of_targets)

    def hidden(self, sequences: Sequences) -> Tensor:
        """(B, A, H) last hidden states at the positions that predict the answer tokens."""
        return last_hidden(self.hf, sequences, sequences.predictor_columns, self.packing)

    def forward(
        self,
        sequences: Sequences,
        chunks: int = 1,
        sampling: Sampling | None = None,
        entropy: bool = False,
        stats_grad: bool = False,
        reference_hidden: Tensor | None = None,
        reference_head: Head | None = None,
        hidden_only: bool = False,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """What `token_stats` gives of every answer token, for the rows of the sequences.

        Args:
            hidden: What `hidden_only` gave of them, where that is known.

        Returns:
            Log-probs, entropy, KL to the reference over the whole vocabulary; each (B, A), 0 beyond an answer's end.
            With `hidden_only` the (B, A, H) hidden states instead.
        """
        if hidden is None:
            hidden = self.hidden(sequences)
        if hidden_only:
            return hidden
        return self.stats(
            hidden,
            sequences,
            chunks=chunks,
            sampling=sampling or Sampling(),
            entropy=entropy,
            stats_grad=stats_grad,
            reference_hidden=None if reference_hidden is None else reference_hidden[sequences.answer_places],
            reference_head=reference_head,
        )

    def stats(self, hidden: Tensor, sequences: Sequences, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(B, A, H) hidden states of the sequences -> what `forward` returns, with the options of `token_stats`."""
        mask, places = sequences.answer_mask, sequences.answer_places  # (B, A), 2 of (N,)
        stats = token_stats(hidden[places], self.head, sequences.answer_ids[places], fused=self.fused, **options)
        logprobs, h, kl = (
            torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in stats
        )
        return logprobs, h, kl


def _read_by_head(head: nn.Linear, hidden: Tensor, **of_targets: Any) -> Any:
    """Logits, or with `targets` what `fused_stats` gives."""
    if of_targets:
        return fused_stats(hidden, head.weight, head.bias, **of_targets)
    return linear_in_float32(hidden, head.weight, head.bias)


def load_policy(
    name_or_path: str,
    flag: str,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    disable_dropout: bool = True,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    packing: bool = False,
    merged: bool = True,
) -> PolicyModel:
    """A causal language model from a folder or the hub, with weights in `dtype` whatever the checkpoint holds.

    Of a PEFT folder it is the base model with the adapters merged in, unless `merged` is False: without them.
    """
    config = load_config(name_or_path, flag, disable_dropout=disable_dropout)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": attn_implementation}
    options |= on_the_gpu()
    check_policy_config(config, name_or_path, flag)
    base, of_base = base_model(name_or_path, flag)
    own = read_generation_config(base, of_base)
    hf, _ = from_pretrained(AutoModelForCausalLM, base, of_base, spare_head=has_both_heads(config), **options)
    if len(tokenizer) > embedded_tokens(hf):
        raise UserError(
            f"{flag}: the tokenizer of {name_or_path} has {len(tokenizer)} tokens, the model only embeds "
            f"{embedded_tokens(hf)}; resize the model's embeddings, or use its own tokenizer"
        )
    if merged and is_adapter(name_or_path):
        merge_saved(hf, name_or_path, flag)
    own = own or hf.generation_config
    neutralise(hf, own, tokenizer, name_or_path, flag)
    prepare_training(hf, gradient_checkpointing)
    return PolicyModel(hf, own, packing=packing)
