"""The inside of the simulated GPU: its tensors, and what happens at each operator. device.py says what is simulated.

Imported by device.simulate alone, after the shim.
"""

from __future__ import annotations

import collections
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
import torch._dynamo  # before torch.compile is replaced
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types, register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from common import graphs

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)

# how often CUDA's operators wait for the device inside
WAITS = {
    "_local_scalar_dense": 1, "nonzero": 1, "masked_select": 1, "bincount": 2, "repeat_interleave": 1, "equal": 1,
    "_unique2": 1, "unique_consecutive": 1, "unique_dim": 1, "_linalg_svd": 1, "_linalg_check_errors": 1,
}  # fmt: skip
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")  # with indices on either device
PACKING = ("_pack_padded_sequence", "_pad_packed_sequence", "_pack_padded_sequence_backward")  # with lengths on the CPU
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "convolution")


# ---- tensors and generators ------------------------------------------------------------------------------------------------


class DeviceTensor(Tensor):
    """A tensor on the device. Its values are those of `values`, on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return Tensor._make_wrapper_subclass(cls, values.shape, device=CUDA, **layout)

    def __init__(self, values: Tensor):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return Device.active.__torch_dispatch__(operator, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)  # a Parameter, to isinstance
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values.__reduce_ex__(protocol)  # for torch.save

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """With its reverse, this lets Module.to keep parameters the objects that they are."""
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> DeviceTensor:
        return DeviceTensor(inner["values"])

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first"
        )

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.values!r})"


class Generator(torch.Generator):
    """torch.Generator, of either device. Those of the GPU give the numbers of a CPU's with the same seed."""

    on_device: ClassVar[set[int]] = set()  # by address, as operators get another Python object

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cls.on_device.add(made._cdata)
        else:
            cls.on_device.discard(made._cdata)  # addresses are used again
        return made

    @property
    def device(self) -> torch.device:
        return CUDA if self._cdata in self.on_device else CPU


class Event:
    """torch.cuda.Event. All work is done when it is recorded; its times are those of the host."""

    def __init__(self, *_: Any, **__: Any):
        self.time = 0.0

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Device.active.note("synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1000 * (end.time - self.time)


# ---- operators ------------------------------------------------------------------------------------------------------------


class Device(TorchDispatchMode):
    """The GPU: runs every operator that has a tensor there, or makes one. Counts what happens, by optimiser step."""

    active: Device

    def __init__(self, root: Path):
        super().__init__()
        Device.active = self
        self.root = f"{root.resolve()}/"
        self.events: collections.Counter[str] = collections.Counter()  # since the last step, as "kind file:line"
        self.steps: list[collections.Counter[str]] = []
        self.random = seeded(0)  # state of the default generator

    def note(self, kind: str, n: int = 1) -> None:
        """Count an event for the line of the project that has caused it."""
        frame: FrameType | None = sys._getframe(1)
        while frame and not self.is_of_project(frame.f_code.co_filename):
            frame = frame.f_back
        place = f" {frame.f_code.co_filename.removeprefix(self.root)}:{frame.f_lineno}" if frame else ""
        self.events[kind + place] += n

    def is_of_project(self, file: str) -> bool:
        return file.startswith(self.root) and "/site-packages/" not in file and file != __file__

    def end_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not isinstance(optimizer, torch.optim.LBFGS):  # a step of which is a whole fit
            self.steps.append(self.events)
        self.events = collections.Counter()

    def forget(self) -> None:
        """Count from here on, as in a new process."""
        self.events, self.steps = collections.Counter(), []

    def summary(self) -> dict[str, Any]:
        """The number of steps; the usual one, in the middle by its waits; without steps, the whole run in its place."""
        steps = sorted(self.steps[1:] or self.steps or [self.events], key=waits)
        usual = steps[len(steps) // 2]
        events = {event: n for event, n in sorted(usual.items()) if event != "kernels"}
        return {"steps": len(self.steps), "waits": waits(usual), "kernels": usual["kernels"], "events": events}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = leaves_of((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        generator = next((leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)), None)
        target = target_of(tensors, kwargs)
        if generator is not None and (generator._cdata in Generator.on_device) != (target == "cuda"):
            raise RuntimeError(f"Expected a '{target}' device type for generator, but found another: {operator}")
        if target != "cuda" and not any(isinstance(tensor, DeviceTensor) for tensor in tensors):
            return operator(*args, **kwargs)
        check_devices(operator, tensors)
        self.count(operator, tensors, args, kwargs)
        return self.run(operator, args, kwargs, target, generator)

    def count(self, operator: Any, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note what an operator waits for, and that it is launched."""
        name = name_of(operator)
        if name in ("_to_copy", "copy_"):
            kind = copy_kind(name, tensors, args, kwargs)
            if kind:
                self.note(kind)
        elif name in INDEXING:
            if any(tensor.ndim and not tensor.is_cuda for tensor in tensors):
                self.note("blocking copy")
            if any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None):
                self.note(f"wait inside {name}")
        elif name in WAITS and kwargs.get("output_size") is None:
            self.note("wait" if name == "_local_scalar_dense" else f"wait inside {name}", WAITS[name])
        if all(returned.alias_info is None or returned.alias_info.is_write for returned in operator._schema.returns):
            self.events["kernels"] += 1

    def run(self, operator: Any, args: Any, kwargs: Any, target: str, generator: torch._C.Generator | None) -> Any:
        """Run an operator on the CPU; its results are tensors of the target device."""
        leaves = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, DeviceTensor)]
        by_values = {id(leaf.values): leaf for leaf in leaves}
        layouts = [(leaf.values, leaf.values.shape, leaf.values.stride()) for leaf in leaves]
        args, kwargs = mapped(lambda leaf: leaf.values if isinstance(leaf, DeviceTensor) else leaf, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = CPU
        call = CUDA_ONLY.get(name_of(operator), operator)
        if torch.Tag.nondeterministic_seeded in operator.tags and generator is None:
            results = self.run_with_own_random_numbers(call, args, kwargs)
        else:
            results = call(*args, **kwargs)
        if any(values.shape != shape or values.stride() != stride for values, shape, stride in layouts):
            raise NotImplementedError(f"{operator} changes a tensor's shape in place, which is not simulated")
        if name_of(operator) in PACKING and isinstance(results, tuple):
            return DeviceTensor(results[0]), results[1]  # lengths stay on the CPU
        if target != "cuda":
            return results

        def to_device(result: Any) -> Any:
            return by_values.get(id(result), DeviceTensor(result)) if isinstance(result, Tensor) else result

        return mapped(to_device, results)

    def run_with_own_random_numbers(self, call: Any, args: Any, kwargs: Any) -> Any:
        host = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            return call(*args, **kwargs)
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(host)


def leaves_of(arguments: Any) -> list[Any]:
    """The values in nested lists, tuples and dicts (torch.utils._pytree takes most of a run's time)."""
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, list | tuple):
        return [arguments]
    return [leaf for argument in arguments for leaf in leaves_of(argument)]


def mapped(function: Callable[[Any], Any], arguments: Any) -> Any:
    """The same nesting, with a function's values in place of the leaves."""
    if isinstance(arguments, dict):
        return {name: mapped(function, argument) for name, argument in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)([mapped(function, argument) for argument in arguments])
    return function(arguments)


def name_of(operator: Any) -> str:
    return operator._schema.name.split("::")[1]


def waits(events: Mapping[str, int]) -> int:
    """How often the host waits for the device."""
    return sum(n for event, n in events.items() if event != "kernels" and not event.startswith("async"))


def target_of(tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> str:
    """The type of the device that an operator's results lie on."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type
    return "cuda" if any(isinstance(tensor, DeviceTensor) for tensor in tensors) else "cpu"


def check_devices(operator: Any, tensors: Sequence[Tensor]) -> None:
    """Raise CUDA's errors: operands on two devices, products of integers."""
    name = name_of(operator)
    if name in PRODUCTS and not tensors[-1].dtype.is_floating_point:
        raise RuntimeError(f'"{name}_cuda" not implemented for {tensors[-1].dtype}')
    if name in INDEXING and not tensors[0].is_cuda:
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if name in ("_to_copy", "copy_", *INDEXING, *PACKING) or name.startswith("new_") or name.endswith("_like"):
        return
    # a single number on the CPU goes with tensors on the device
    if any(not tensor.is_cuda and (tensor.ndim or name in ("cat", "stack")) for tensor in tensors):
        places = ", ".join(f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices: {operator} {places}"
        )


def copy_kind(name: str, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What a copy between host and device does to the host; empty for one within a device.

    From pageable memory it is staged. Back, only pinned memory makes it asynchronous, which Tensor.to takes automatically.
    """
    source, destination = tensors[-1], tensors[0]
    to_device = torch.device(kwargs["device"]).type == "cuda" if kwargs.get("device") is not None else source.is_cuda
    if name == "copy_":
        to_device = destination.is_cuda
    if to_device == source.is_cuda:
        return ""
    non_blocking = kwargs.get("non_blocking") or (name == "copy_" and tuple(args[2:3]) == (True,))
    if not to_device and name == "copy_" and not destination.is_pinned():
        non_blocking = False
    return ("async" if non_blocking else "blocking") + (" copy" if to_device else " copy back")


def lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    c_before: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """_thnn_fused_lstm_cell: hidden state and cell state (B, H), and the gates (B, 4 H) for the gradient."""
    gates = input_gates + hidden_gates
    if input_bias is not None and hidden_bias is not None:
        gates = gates + input_bias + hidden_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c_before + i * g
    return o * c.tanh(), c, torch.cat([i, f, g, o], 1)


def lstm_cell_backward(
    dh: Tensor | None, dc: Tensor | None, c_before: Tensor, c: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """_thnn_fused_lstm_cell_backward_impl: gradients of gates, cell state and bias."""
    i, f, g, o = gates.chunk(4, 1)
    dh = torch.zeros_like(c) if dh is None else dh
    dc = torch.zeros_like(c) if dc is None else dc
    t = c.tanh()
    dc = dc + dh * o * (1 - t * t)
    d_gates = [dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)]
    d_input = torch.cat(d_gates, 1)
    return d_input, dc * f, d_input.sum(0) if has_bias else d_input.new_empty(0)


CUDA_ONLY = {"_thnn_fused_lstm_cell": lstm_cell, "_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward}


# ---- torch.cuda -----------------------------------------------------------------------------------------------------------


def seeded(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()


class Properties:
    """torch.cuda.get_device_properties."""

    name, total_memory, major, minor, multi_processor_count = "simulated", 80 << 30, 9, 0, 132


def returning(value: Any) -> Any:
    """A function that returns this, whatever it is called with."""
    return lambda *_, **__: value


CONSTANTS = {
    "_lazy_init": None, "init": None, "is_available": True, "is_initialized": True, "is_bf16_supported": True,
    "current_device": 0, "set_device": None, "get_device_name": "simulated", "get_device_capability": (9, 0),
    "get_device_properties": Properties, "is_current_stream_capturing": False, "empty_cache": None, "memory_allocated": 0,
    "max_memory_allocated": 0, "max_memory_reserved": 0, "reset_peak_memory_stats": None, "mem_get_info": (80 << 30, 80 << 30),
    "set_sync_debug_mode": None, "get_sync_debug_mode": 0,
}  # fmt: skip


def replace_torch_cuda(device: Device) -> None:
    """Give torch.cuda the functions of one GPU, and torch a Generator of either device. torch.compile does nothing."""

    def seed(value: int) -> None:
        device.random = seeded(value)

    def set_state(state: Tensor, *_: Any) -> None:
        device.random = state.clone()

    def set_states(states: Sequence[Tensor]) -> None:
        for state in states[:1]:
            set_state(state)

    for name, value in CONSTANTS.items():
        setattr(torch.cuda, name, returning(value))
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = seed
    torch.cuda.set_rng_state, torch.cuda.set_rng_state_all = set_state, set_states
    torch.cuda.get_rng_state = lambda *_: device.random.clone()
    torch.cuda.get_rng_state_all = lambda: [device.random.clone()]
    torch.cuda.synchronize = lambda *_: device.note("synchronize")
    torch.cuda.Event = Event
    torch.cuda.device_count = returning(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # one for each process of torchrun
    init_process_group = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *_, **named: init_process_group("gloo", **named)
    torch.Generator = Generator
    torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)
    torch.nn.Module.compile = returning(None)
    # CUDA graphs launch kernel by kernel
    graphs.record = lambda step, **_: step
    torch.cuda.graph_pool_handle = returning(None)
    torch.cuda.make_graphed_callables = lambda module, *_, **__: module


def start(root: Path) -> Device:
    """The device, from now on to the end of the process."""
    device = Device(root)
    replace_torch_cuda(device)
    _foreach_supported_types.append(DeviceTensor)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy
    torch.autograd.set_multithreading_enabled(False)  # a mode is in force in one thread
    register_optimizer_step_post_hook(device.end_step)
    device.__enter__()
    return device
