"""LoRA adapters: added, merged into a state dict, and as a folder of their own that PEFT loads."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.run import UserError

ALL_LINEAR = "all-linear"


def adaptable_layers(hf: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers by name, but for the output embedding and a score head; also those that have adapters."""
    heads = [hf.get_output_embeddings(), getattr(hf, "score", None)]
    layers = {name: getattr(module, "base_layer", module) for name, module in hf.named_modules()}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, (nn.Linear, Conv1D)) and not any(layer is head for head in heads)
        if ".base_layer" not in name and ".lora_" not in name
    }


def add_lora(
    hf: PreTrainedModel,
    dim: int,
    module_name: str,
    only_lora: bool,
    flag: str,
    alpha: int | None = None,
    dropout: float = 0.0,
    adapter: str = "default",
) -> None:
    """Adds LoRA adapters of rank `dim` to every linear layer whose name contains `module_name`.

    The output embedding and a score head get none. With `only_lora` everything but the adapters and a score head is
    frozen; otherwise the whole model trains together with its adapters, as in DeepSpeed-Chat.

    Args:
        module_name: "all-linear" for every layer.
        flag: The flag of `module_name`, which errors name.
        alpha: The product B A is scaled by alpha / dim; without it by 1.
        dropout: On what the adapters read, in training.
        adapter: Name of this set of them; a model's own is the first that it gets.

    Raises:
        UserError: No layer has that name; adapters that train nothing must not pass for training. Or a layer's matrix
            has no such rank: more would train nothing further.
    """
    from peft import LoraConfig

    layers = adaptable_layers(hf)
    targets = [name for name in layers if module_name == ALL_LINEAR or module_name in name]
    if not targets:
        raise UserError(
            f"{flag} {module_name!r} is part of no linear layer's name in this model; its layers are named like "
            f"{next(iter(layers))!r}; {ALL_LINEAR} takes all of them"
        )
    modules: dict[str, Any] = {name: layers[name] for name in targets}
    ranks = {name: min(getattr(m.weight, "ds_shape", m.weight.shape)) for name, m in modules.items()}
    smallest = min(ranks, key=lambda name: ranks[name])
    if dim > ranks[smallest]:
        raise UserError(
            f"{flag.replace('module_name', 'dim')} {dim}: the matrix of {smallest} has rank {ranks[smallest]} at most; "
            f"expected no more, or layers without it ({flag})"
        )
    settings = LoraConfig(
        r=dim,
        lora_alpha=dim if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in modules.values()),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several sets are meant
        hf.add_adapter(settings, adapter)
    for name, parameter in hf.named_parameters():
        parameter.requires_grad = not only_lora or "lora_" in name or name.startswith("score.")


def saved_whole(hf: PreTrainedModel) -> list[str]:
    """Modules without adapters that learn beside them: a score head, and what a PEFT folder named before."""
    named = getattr(hf.peft_config[own_adapters(hf)], "modules_to_save", None) or []
    return sorted({*named, *(["score"] if isinstance(getattr(hf, "score", None), nn.Module) else [])})


def adapters_alone(hf: PreTrainedModel) -> bool:
    """Whether the model has adapters, and all that it learns lies in them and in what is saved with them.

    And their base lies somewhere: no folder holds one that other adapters were merged into.
    """
    names = [name for name, parameter in hf.named_parameters() if parameter.requires_grad]
    if not any(".lora_" in name for name in names) or not hf.peft_config[own_adapters(hf)].base_model_name_or_path:
        return False
    whole = saved_whole(hf)
    return all(".lora_" in name or name.rpartition(".")[0] in whole for name in names)


def save_adapter(state: dict[str, Tensor], hf: PreTrainedModel, folder: Path) -> None:
    """Writes the adapters, and what learns with them, so that `PeftModel.from_pretrained` loads them.

    Args:
        state: Weights by the names of the model with adapters.
    """
    from peft import TaskType
    from safetensors.torch import save_file

    adapter = own_adapters(hf)
    config: Any = copy.copy(hf.peft_config[adapter])
    whole = [module for module in saved_whole(hf) if any(name.startswith(f"{module}.") for name in state)]
    config.inference_mode, config.task_type = True, TaskType.SEQ_CLS if "score" in whole else TaskType.CAUSAL_LM
    config.modules_to_save = whole or None
    if Path(base := config.base_model_name_or_path or "").is_dir():
        config.base_model_name_or_path = str(Path(base).absolute())  # found from every folder
    config.save_pretrained(folder)
    kept = {
        f"base_model.model.{name.replace(f'.{adapter}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if (".lora_" in name and f".{adapter}." in name) or name.rpartition(".")[0] in whole
    }
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def own_adapters(hf: PreTrainedModel) -> str:
    """Name of the set of adapters that the model got first."""
    return next(iter(hf.peft_config))


def merge_adapters(state: dict[str, Tensor], hf: PreTrainedModel) -> dict[str, Tensor]:
    """Folds the model's own LoRA set into the weights, W + scale * B A, under the names of the model without adapters.

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
            if (adapter := own_adapters(hf)) in layer.scaling:
                a, b = state[f"{stem}.lora_A.{adapter}.weight"], state[f"{stem}.lora_B.{adapter}.weight"]
                delta = layer.scaling[adapter] * (b.float() @ a.float())  # (out, in)
                delta = delta.T if layer.fan_in_fan_out else delta  # GPT-2's Conv1D stores (in, out)
                merged[f"{stem}.weight"] = (tensor.float() + delta).to(tensor.dtype)
    return merged
