"""Hugging Face models as this project uses them: loading, dropout, adapters, and the policy's per-token forward.

`PolicyModel` and `reward_model.RewardModel` are what DeepSpeed wraps: their forward is one call that returns only small
tensors, so the ZeRO-3 hooks see one ordinary forward and the full-vocabulary logits never leave it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from remax.logprobs import Head, Sampling, token_stats
from remax.packing import last_hidden, prepare_packing
from remax.sequences import Sequences
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
    """The model's configuration; a UserError naming `flag` when there is none."""
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
    if disable_dropout:
        zero_dropout(config)
    return config


def check_length(config: PreTrainedConfig, tokens: int, flags: str, model_flag: str = "--model_name_or_path") -> None:
    """Refuses sequences longer than the model has positions for, where it says how many that is."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"{flags}: {tokens} tokens, but the model of {model_flag} has {positions} positions; lower it")


def zero_dropout(config: PreTrainedConfig) -> None:
    """Every dropout rate of the configuration to 0. Families name them differently: OPT `dropout`, GPT-2 `resid_pdrop`,
    ...
    """
    for name, value in list(config.to_dict().items()):
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop")) or "layerdrop" in name):
            setattr(config, name, 0.0)


def from_pretrained(auto_class: type, name_or_path: str, flag: str, **kwargs) -> tuple[PreTrainedModel, dict]:
    """`auto_class.from_pretrained`, with its loading report; loading trouble becomes one line naming the flag."""
    try:
        return auto_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: cannot load {name_or_path!r}: {str(error).strip().splitlines()[0]}") from error


def read_generation_config(name_or_path: str, hf: PreTrainedModel, tokenizer_eos: int | None) -> GenerationConfig:
    """The folder's own generation config, kept for the export; `hf` itself gets a neutral one.

    A model's generation_config.json may set top_k, temperature or a repetition penalty. Those would change the
    distribution answers are drawn from behind our back, so rollouts start from a neutral configuration that knows the
    special tokens only.
    """
    own = hf.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer_eos
    eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
    if tokenizer_eos is not None and tokenizer_eos not in eos_ids:
        eos_ids.append(tokenizer_eos)
    if not eos_ids:
        raise UserError(
            f"{name_or_path}: neither the tokenizer nor the generation config names an EOS token, so no answer could "
            "end; set eos_token in its tokenizer_config.json"
        )
    hf.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=eos_ids, pad_token_id=own.pad_token_id
    )
    own.eos_token_id = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    return own


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

    def head(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) logits."""
        return self.scale_logits(self.hf.get_output_embeddings()(hidden))

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What some families put behind their output embedding."""
        config = self.hf.config
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2 and 3
            logits = torch.tanh(logits / cap) * cap
        return logits

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
    ) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """-> log-probs, entropy, KL to the reference over the whole vocabulary; each (B, A), 0 behind an answer's end.

        `hidden_only`: the (B, A, H) hidden states instead.
        """
        if hidden_only:
            return self.hidden(sequences)
        mask = sequences.answer_mask  # (B, A)
        stats = token_stats(
            self.hidden(sequences)[mask],
            self.head,
            sequences.answer_ids[mask],
            chunks=chunks,
            sampling=sampling or Sampling(),
            entropy=entropy,
            stats_grad=stats_grad,
            reference_hidden=None if reference_hidden is None else reference_hidden[mask],
            reference_head=reference_head,
        )
        return tuple(torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in stats)


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
) -> PolicyModel:
    """A causal language model from a folder or the hub, with weights in `dtype` whatever the checkpoint holds.

    packing: see `remax.packing`.
    """
    config = load_config(name_or_path, flag, disable_dropout=disable_dropout)
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    hf, _ = from_pretrained(AutoModelForCausalLM, name_or_path, flag, config=config, dtype=dtype, **extra)
    if len(tokenizer) > hf.get_input_embeddings().num_embeddings:
        raise UserError(
            f"{flag}: the tokenizer of {name_or_path} has {len(tokenizer)} tokens, the model only embeds "
            f"{hf.get_input_embeddings().num_embeddings}; resize the model's embeddings, or use its own tokenizer"
        )
    own = read_generation_config(name_or_path, hf, tokenizer.eos_token_id)
    prepare_training(hf, gradient_checkpointing)
    return PolicyModel(hf, own, packing=packing)


def prepare_training(hf: PreTrainedModel, gradient_checkpointing: bool) -> None:
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_lora(hf: PreTrainedModel, dim: int, module_name: str, only_lora: bool, flag: str) -> None:
    """peft LoRA adapters of rank `dim`, scale 1, on every linear layer whose name contains `module_name`.

    With `only_lora` everything else is frozen; otherwise the whole model trains together with its adapters, as in
    DeepSpeed-Chat.
    Raises UserError when no layer has that name: adapters that train nothing must not pass for training.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in hf.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    targets = [name for name in linear if module_name in name and not name.endswith(("lm_head", "score"))]
    if not targets:
        raise UserError(
            f"{flag} {module_name!r} is part of no linear layer's name in this model; its layers are named like "
            f"{linear[0]!r}"
        )
    hf.add_adapter(LoraConfig(r=dim, lora_alpha=dim, target_modules=targets))
    for name, parameter in hf.named_parameters():
        parameter.requires_grad = not only_lora or "lora_" in name or name.startswith("score.")


def optimizer_groups(model: nn.Module, weight_decay: float, lora_learning_rate: float | None = None) -> list[dict]:
    """Parameter groups: no weight decay on biases and normalisation (1-dimensional weights); adapters at their own
    learning rate.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a partitioned parameter is flat; DeepSpeed keeps its true shape in ds_shape.
            one_dimensional = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            groups.setdefault((one_dimensional or name.endswith(".bias"), "lora_" in name), []).append(parameter)
    if not groups:
        raise UserError("no parameter is trainable: check --only_optimize_lora and --lora_module_name")
    return [
        {
            "params": params,
            "weight_decay": 0.0 if undecayed else weight_decay,
            **({"lr": lora_learning_rate} if lora and lora_learning_rate is not None else {}),
        }
        for (undecayed, lora), params in groups.items()
    ]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside, the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def count_parameters(model: nn.Module) -> int:
    """Parameters at full size, also under ZeRO-3."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
