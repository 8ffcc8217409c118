"""ReMax: reinforcement learning from human feedback without a value model, on DeepSpeed.

What a notebook needs is found here, by name: `remax.load_actor`, `remax.ReMax`, ...; `dir(remax)` lists the names. Each
is imported from its own module when it is first asked for, so `import remax` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FACE = {
    # models, loaded with their tokenizer, in their roles
    "remax.engines.pretrained": ("load_actor", "load_reference", "load_reward"),
    "remax.engines.policy": ("Actor", "Reference"),
    "remax.engines.scorer": ("Reward",),
    "remax.engines.deepspeed_config": ("EngineConfig",),
    "remax.engines.optimizer": ("OptimizerConfig",),
    # texts to tensors, answers, and back
    "remax.core.sequences": ("Prompts", "Sequences"),
    "remax.core.sampling": ("Sampling",),
    "remax.generation.decoder": ("GenerationSettings",),
    "remax.evaluation.answers": ("answer_prompts", "as_prompts", "read_answers"),
    "remax.evaluation.texts": ("as_sequences",),
    # rewards of several parts, and of Python functions
    "remax.rewards.functions": ("reward_function",),
    "remax.rewards.process": ("load_function",),
    "remax.rewards.composite": ("CompositeReward", "FunctionReward", "Part"),
    # learning
    "remax.core.rollout": ("Rollout",),
    "remax.algorithms": ("ALGORITHMS", "Algorithm", "KLPenalty", "build_algorithm"),
    "remax.algorithms.remax": ("ReMax", "remax_advantages"),
    "remax.training.loop": ("Cadence",),
    "remax.training.trainer": ("Trainer", "TrainerSettings"),
}
_MODULE_OF = {name: module for module, names in _FACE.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Imports a name of the library's face when it is first asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
