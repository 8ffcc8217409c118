"""A second device for a torch that knows only the CPU: it finds what would break, or slow down, on a GPU.

A tensor on `sim:0` wraps a CPU tensor that holds its values. An operation that mixes it with CPU tensors is refused as
CUDA refuses it, and what would make the host wait for a GPU is counted by the line of ours that asked for it.

`install` registers the device and replaces some functions of torch, once and for good: for a process of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._device as torch_devices
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / room}/" for room in ("remax", "utils"))
aten = torch.ops.aten


class DeviceMismatch(RuntimeError):
    """An operation mixes tensors of two devices."""


# --------------------------------------------------------------------------------------------------- what is waited for


class Waits:
    """How often the host waited for the device, by place and operation, while it was `watched`."""

    watched = False
    reads: Counter[str] = Counter()  # of the device's values
    copies: Counter[str] = Counter()  # to the device: from ordinary memory they block, too


@contextmanager
def watching() -> Iterator[None]:
    """Inside, waits are counted, from zero."""
    Waits.reads, Waits.copies, Waits.watched = Counter(), Counter(), True
    try:
        yield
    finally:
        Waits.watched = False


def place() -> str:
    """The innermost line of ours that is being executed, such as `remax/core/sums.py:54 reduce`."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            return f"{code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "the backward pass"  # in a thread of its own, below no line of ours


def count(waits: Counter[str], what: str) -> None:
    """Counts a wait at this place."""
    if Waits.watched:
        waits[f"{place()}: {what}"] += 1


def count_copy(to_device: bool) -> None:
    """Counts a copy between the devices."""
    count(Waits.copies if to_device else Waits.reads, f"copy to the {'device' if to_device else 'CPU'}")


# ----------------------------------------------------------------------------------------------------------- the device


class SimTensor(torch.Tensor):
    """A tensor on the device."""

    raw: torch.Tensor  # its values, on the CPU

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> SimTensor:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "layout": raw.layout}
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device="sim:0", **layout)

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    def tolist(self) -> Any:
        count(Waits.reads, "tolist")
        return self.raw.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert sim:0 device type tensor to numpy")

    def __repr__(self) -> str:
        return f"sim({self.raw})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        # A list becomes a CPU tensor of indices, as on CUDA.
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return execute(function, args, kwargs or {})


class Sim(TorchDispatchMode):
    """Inside, functions that create tensors know the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return execute(function, args, kwargs or {})


# Operations with a result whose shape depends on the values, or which is a number.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


def each(change: Callable[[Any], Any], x: Any) -> Any:
    """The same lists and tuples with everything in them changed."""
    return type(x)(each(change, item) for item in x) if type(x) in (list, tuple) else change(x)


def wrap(x: Any) -> Any:
    return SimTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, SimTensor) else x


def unwrap(x: Any) -> Any:
    return x.raw if isinstance(x, SimTensor) else x


def tensors_of(x: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, which may be lists."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from tensors_of(item)


def execute(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation, as the device would do it.

    Raises:
        DeviceMismatch: It mixes tensors of both devices, and is not one of those that may.
    """
    tensors = [*tensors_of(args), *tensors_of(tuple(kwargs.values()))]
    on_device = any(isinstance(x, SimTensor) for x in tensors)
    target = kwargs.get("device")
    to_device = on_device if target is None else torch.device(target).type == "sim"
    if not on_device and not to_device:
        return function(*args, **kwargs)
    if function is aten._to_copy.default:
        if to_device != on_device:
            count_copy(to_device)
    elif on_device:
        check_devices(function, args, tensors)
    if function in READS and not (function is aten.repeat_interleave.Tensor and "output_size" in kwargs):
        count(Waits.reads, function.overloadpacket.__name__)
    given = {name: each(unwrap, value) for name, value in kwargs.items()}
    if target is not None:
        given["device"] = torch.device("cpu")
    result = function(*each(unwrap, args), **given)
    if written := written_to(function, args, kwargs):
        # In place: the very arguments that were written to.
        returned = len(function._schema.returns)
        if returned in (1, len(written)):
            return written[0] if returned == 1 else tuple(written)
    return each(wrap, result) if to_device else result


def written_to(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    schema = function._schema
    if not schema.is_mutable:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    marked = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return [given[name] for name in marked if name in given]


def check_devices(function: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Refuses mixed devices as CUDA does: of the CPU there may be single numbers, and indices."""
    if function is aten.copy_.default:
        if not all(isinstance(x, SimTensor) for x in args[:2]):
            count_copy(to_device=isinstance(args[0], SimTensor))
        return
    if function in INDEXING:
        for index in (x for x in args[1] if x is not None):
            if index.dtype in (torch.bool, torch.uint8):
                count(Waits.reads, "index by a mask")
            if not isinstance(index, SimTensor):
                count_copy(to_device=True)
        tensors = [x for x in (args[0], *args[2:3]) if isinstance(x, torch.Tensor)]
        if not isinstance(args[0], SimTensor):
            raise DeviceMismatch(f"{place()}: {function}: a CPU tensor is indexed by one of the device")
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, SimTensor) and x.dim()]
    if strangers:
        raise DeviceMismatch(f"{place()}: {function}: CPU tensors of shapes {strangers} among tensors of the device")


# --------------------------------------------------------------------------------------------------------- registration


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Generator(torch.Generator):
    """The device's noise is the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == "sim" else device)


def made_on_the_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor` and its like do not dispatch: they make the tensor on the CPU and copy it, for CUDA too."""

    def wrapper(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "sim":
            return make(*args, device=device, **options)
        return make(*args, **options).to(device)

    return wrapper


def install() -> torch.device:
    """Registers the device, which is then this process's in all our code."""
    import utils.distributed

    backend_registration._setup_privateuseone_for_python_backend("sim", Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` must change the tensors' class
    torch_devices._device_constructors()  # kept by torch; it must hold the functions that are replaced here
    torch.tensor, torch.as_tensor = made_on_the_cpu(torch.tensor), made_on_the_cpu(torch.as_tensor)
    torch.Generator = Generator
    device = torch.device("sim", 0)
    utils.distributed.device = lambda: device  # before others import it by name
    return device
