"""One trunk for several roles: a model with LoRA sets that are switched on and off, and heads of its own for each use.

Hydra-RLHF (Santacroce et al., arXiv 2309.00754) lets the roles of reinforcement learning share the weights of one
frozen backbone. What they differ in is small:

    role         adapters              head
    actor        "actor"               language
    reference    none                  language
    reward       none                  score
    critic       "critic", or the      value
                 actor's (J-Hydra)

A forward says what it uses. Switching copies nothing: the layers read another set, or none, until the switch is left
again, by an error too. At rest no set is switched on. What gradient checkpointing computes once more in the backward
pass sees the set that its forward saw, whatever is switched on by then.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from remax.core.sequences import Sequences
from remax.models.loading import prepare_training
from remax.models.policy import PolicyModel
from remax.models.reward_model import RewardModel, read_scores, score_in_float32
from utils.present import present

ACTOR_SET, CRITIC_SET = "actor", "critic"


@dataclass(frozen=True)
class Use:
    """What a role switches on: a set of adapters, or none, and a head."""

    adapters: str | None
    head: str  # language, score, value, or language and score


ACTOR = Use(ACTOR_SET, "language")
REFERENCE = Use(None, "language")
REWARD = Use(None, "score")
REFERENCE_AND_REWARD = Use(None, "language and score")
CRITIC = Use(CRITIC_SET, "value")
JOINT_CRITIC = Use(ACTOR_SET, "value")


class Trunk(nn.Module):
    """A model that several roles share.

    Attributes:
        reader: The backbone with its own heads: a `PolicyModel`, a `HydraModel`, which scores as well, or the
            `RewardModel` that is a critic too.
        value: (H -> 1) the critic's head.
        active: The set that is switched on.
    """

    def __init__(
        self, reader: PolicyModel | RewardModel, *, value: nn.Linear | None = None, gradient_checkpointing: bool = False
    ):
        """Takes over a model with its adapters. Of all parameters they and the value head learn."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        super().__init__()
        self.reader: PolicyModel | RewardModel = reader
        self.value = value
        if value is not None:
            value.forward = MethodType(score_in_float32, value)  # type: ignore[method-assign]
        for name, parameter in self.named_parameters():
            parameter.requires_grad = ".lora_" in name or name.startswith("value.")
        self.layers: list[Any] = [module for module in reader.hf.modules() if isinstance(module, BaseTunerLayer)]
        self.active: str | None = ACTOR_SET  # so that the switch below acts
        self._switch(None)
        prepare_training(reader.hf, gradient_checkpointing, self._checkpoint_contexts)

    @property
    def packing(self) -> bool:
        """Whether rows are joined before the backbone reads them."""
        return self.reader.packing

    def switched(self, adapters: str | None) -> contextlib.AbstractContextManager[None]:
        """Inside, the layers add these adapters, or none; afterwards what they added before. May be entered again."""
        return _Switched(self, adapters)

    def _switch(self, adapters: str | None) -> None:
        if adapters == self.active:
            return
        for layer in self.layers:
            # peft freezes what is switched off, while here a set also learns when it is off in between.
            learning = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
            if adapters is not None:
                layer.set_adapter(adapters)
            layer.enable_adapters(adapters is not None)
            for parameter, learns in learning:
                parameter.requires_grad = learns
        self.active = adapters

    def _checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager[None], ...]:
        """For the forward of a layer, and for its recomputation in the backward pass."""
        return contextlib.nullcontext(), self.switched(self.active)

    def forward(self, sequences: Sequences, *, use: Use, **options: Any) -> Any:
        """What the reader gives by the head that is used.

        With "value": see `RewardModel.forward`. With "language and score": see `HydraModel.logprobs_and_scores`.
        """
        with self.switched(use.adapters):
            if use.head == "value":
                value = present(self.value, "Trunk.value")
                return read_scores(self.reader.hf, value, sequences, packing=self.packing, **options)
            if use.head == "language" or isinstance(self.reader, RewardModel):
                return self.reader(sequences, **options)
            return self.reader(sequences, head="both" if use.head == "language and score" else use.head, **options)


class _Switched(contextlib.AbstractContextManager[None]):
    """See `Trunk.switched`."""

    def __init__(self, trunk: Trunk, adapters: str | None):
        self.trunk, self.adapters = trunk, adapters
        self.before: list[str | None] = []

    def __enter__(self) -> None:
        self.before.append(self.trunk.active)
        self.trunk._switch(self.adapters)

    def __exit__(self, *error: object) -> None:
        self.trunk._switch(self.before.pop())


def learns_as_critic(name: str) -> bool:
    """Whether a trunk's parameter is its critic's: of the critic's set, or of the value head."""
    return name.startswith("value.") or f".{CRITIC_SET}." in name
