"""LoRA adapters: added, and merged into a state dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.run import UserError


def add_lora(hf: PreTrainedModel, dim: int, module_name: str, only_lora: bool, flag: str) -> None:
    """Adds LoRA adapters of rank `dim`, scale 1, to every linear layer whose name contains `module_name`.

    With `only_lora` everything else is frozen; otherwise the whole model trains together with its adapters, as in
    DeepSpeed-Chat.

    Raises:
        UserError: No layer has that name; adapters that train nothing must not pass for training.
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


def merge_adapters(state: dict[str, Tensor], hf: PreTrainedModel) -> dict[str, Tensor]:
    """Folds LoRA into the weights, W + scale * B A, under the names of the model without adapters.

    The given state dict is left as it is.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        merged[name.replace(".base_layer.", ".")] = tensor
        if name.endswith(".base_layer.weight"):
            stem = name[: -len(".base_layer.weight")]
            layer: Any = hf.get_submodule(stem)  # peft's, of one of its classes
            for adapter in layer.active_adapters:
                a, b = state[f"{stem}.lora_A.{adapter}.weight"], state[f"{stem}.lora_B.{adapter}.weight"]
                delta = layer.scaling[adapter] * (b.float() @ a.float())  # (out, in)
                delta = delta.T if layer.fan_in_fan_out else delta  # GPT-2's Conv1D stores (in, out)
                merged[f"{stem}.weight"] = (tensor.float() + delta).to(tensor.dtype)
    return merged
