"""What a trained engine has learned, in parts that know neither ranks nor ZeRO stages.

A trained parameter of n numbers is the same vector at every stage; a rank holds numbers `start` to `start + length` of
it in fp32, with Adam's two moments of them. DeepSpeed keeps these parts in flat tensors whose cut depends on the stage
and the number of ranks. Here they have names, so that a state can be read back under another cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remax.engines.base import TrainedEngine
from utils.distributed import rank, world_size

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic loss scale

# (name of a parameter, kind, start, length) -> (length,) float32 numbers in CPU memory
Reader = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True)
class Part:
    """Numbers of one parameter that lie on this rank.

    Attributes:
        name: The parameter's.
        start: Place of the first number in the flattened parameter.
        weight: (length,) The fp32 numbers themselves, not a copy.
        flat: The tensor that Adam steps, which its state is kept under, and in which this part begins at `offset`.
    """

    name: str
    start: int
    weight: Tensor
    flat: Tensor
    offset: int

    def of_state(self, state: dict[str, Any], moment: str) -> Tensor:
        """(length,) of one of Adam's moments, not a copy."""
        return state[moment].view(-1).narrow(0, self.offset, len(self.weight))


def parts(engine: TrainedEngine) -> Iterator[Part]:
    """All that this rank holds of the trained parameters: at ZeRO-0 the whole of each."""
    optimizer, stage = engine.wrapped.optimizer, _stage(engine)
    for name, p in engine.model.named_parameters():
        if not p.requires_grad:
            continue
        if stage == 0:
            yield Part(name, 0, p.detach().view(-1), p, 0)
        elif stage == 3:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(p)]
            flat, start = optimizer.fp32_partitioned_groups_flat[group], rank() * length
            length = min(length, p.ds_numel - start)  # the last ranks' shares are filled up
            if length > 0:
                yield Part(name, start, flat.detach().narrow(0, offset, length), flat, offset)
        elif (mapping := p._hp_mapping) is not None:
            flat = _flat_partitions(optimizer)[mapping.param_group_index]
            inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
            part = flat.detach().narrow(0, inside.start, inside.numel)
            yield Part(name, outside.start, part, flat, inside.start)


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """This rank's fp32 weights at ZeRO 1 and 2, a tensor for each parameter group."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_groups_flat_partition  # DeepSpeed's BF16_Optimizer, which some versions take for ZeRO-1


def _stage(engine: TrainedEngine) -> int:
    """The ZeRO stage whose cut the parts have: 0 where DeepSpeed leaves the optimizer as it is."""
    return 0 if engine.wrapped.optimizer is _adam(engine) else engine.config.zero_stage


def _adam(engine: TrainedEngine) -> torch.optim.Optimizer:
    return engine.wrapped.lr_scheduler.optimizer


def tensors(engine: TrainedEngine) -> dict[tuple[str, str, int], Tensor]:
    """(kind, parameter, start) -> this rank's share of what all ranks together must keep; not copies."""
    states, found = _adam(engine).state, {}
    for part in parts(engine):
        first, length = 0, len(part.weight)
        if _stage(engine) == 0:  # every rank has all of it
            share = -(-length // world_size())
            first, length = rank() * share, min(share, length - rank() * share)
        if length <= 0:
            continue
        kinds = {WEIGHT: part.weight}
        if state := states.get(part.flat):
            kinds |= {moment: part.of_state(state, moment) for moment in MOMENTS}
        for kind, numbers in kinds.items():
            found[kind, part.name, part.start + first] = numbers.narrow(0, first, length)
    return found


def values(engine: TrainedEngine) -> dict[str, Any]:
    """The rest of the state, which is the same on every rank: numbers of steps and the loss scale."""
    states, scales = _adam(engine).state, {}
    if engine.config.dtype == "fp16":
        scales = {name: value for name, value in vars(engine.wrapped.optimizer.loss_scaler).items() if name in SCALER}
    steps = [float(state["step"]) for state in states.values() if "step" in state]
    return {
        "updates": int(max(steps, default=0)),  # that Adam has made
        "schedule": engine.wrapped.lr_scheduler.last_epoch,
        "loss_scale": scales,
    }


@torch.no_grad()
def restore(engine: TrainedEngine, saved: dict[str, Any], read: Reader) -> None:
    """Goes on from what `tensors` and `values` gave, on any number of ranks, at any ZeRO stage.

    Every rank must call it.
    """
    adam, optimizer = _adam(engine), engine.wrapped.optimizer
    stage, updates = _stage(engine), saved["updates"]
    if stage == 3:
        optimizer._partition_all_parameters()  # nothing gathered with the old numbers may stay
    flats = {part.flat: part for part in parts(engine)}
    for flat in flats if updates else ():
        adam.state[flat] = _fresh_state(adam, flat, updates)
    for part in parts(engine):
        length = len(part.weight)
        part.weight.copy_(read(part.name, WEIGHT, part.start, length))
        for moment in MOMENTS if updates else ():
            part.of_state(adam.state[part.flat], moment).copy_(read(part.name, moment, part.start, length))
    _recount(adam, updates, len(flats))
    _hand_down(engine, read)
    schedule = engine.wrapped.lr_scheduler
    schedule.last_epoch = saved["schedule"]
    schedule._last_lr = rates = schedule.get_lr()
    for group, rate in zip(adam.param_groups, rates, strict=True):
        group["lr"] = rate
    for name, value in saved["loss_scale"].items() if engine.config.dtype == "fp16" else ():
        setattr(optimizer.loss_scaler, name, value)


def _fresh_state(adam: torch.optim.Optimizer, flat: Tensor, updates: int) -> dict[str, Any]:
    """Adam's state of a tensor, as its first step makes it, with the count of its updates."""
    step: Any = updates
    if isinstance(adam, torch.optim.AdamW):
        fused = any(group["fused"] for group in adam.param_groups)
        step = torch.tensor(float(updates), dtype=torch.float32, device=flat.device if fused else "cpu")
    return {"step": step} | {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}


def _recount(adam: Any, updates: int, flats: int) -> None:
    """DeepSpeed's CPU Adam counts in C++, too, and multiplies its powers of beta up, step by step and tensor by tensor.

    The last bits of those powers depend on that course, so it is gone through again, with tensors of one number.
    """
    if isinstance(adam, torch.optim.AdamW):
        return
    beta1, beta2 = adam.param_groups[0]["betas"]
    weight, gradient, mean, square = torch.zeros(4, 1)
    for step in range(1, updates + 1):
        for _ in range(flats):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, weight, gradient, mean, square
            )


def _hand_down(engine: TrainedEngine, read: Reader) -> None:
    """From the fp32 numbers to those that the model computes with."""
    optimizer, stage = engine.wrapped.optimizer, _stage(engine)
    if stage == 3:
        for low, high in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            if low is not high:
                low.copy_(high)
        if kept := optimizer.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)
    elif stage:
        for name, p in engine.model.named_parameters():
            if p.requires_grad:
                p.view(-1).copy_(read(name, WEIGHT, 0, p.numel()))
