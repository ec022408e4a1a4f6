"""Runs the launchers of Triton kernels without a GPU: what they would launch is compiled or merely listed, and nothing runs.

Triton must compile kernels rather than interpret them: TRITON_INTERPRET may not be set when it is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from unittest import mock

from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it.

    kernel:    names of its file and function, without leading underscores;   key: what distinguishes its compiled versions
    grid:      number of programs along each axis
    arguments: by name, tensors included;   constants: values of the constexprs
    compiled:  None where launches are only listed;   seconds: that compiling took, 0.0 if it was compiled before
    """

    kernel: str
    key: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    compiled: CompiledKernel | None
    seconds: float

    @property
    def on_pyramids(self) -> bool:
        return any(map(is_pyramid, self.arguments.values()))


def is_pyramid(argument: Any) -> bool:
    """Whether it is a tuple of levels (N, C, H, W)."""
    return isinstance(argument, tuple) and len(argument) > 0 and all(isinstance(x, Tensor) and x.dim() == 4 for x in argument)


class Compiler(DriverBase):
    """In the place of a GPU's driver: knows what to compile for and can do nothing else.

    Each is a device of its own number, far above those of GPUs: what is compiled for it is not taken for what was compiled elsewhere.
    """

    _numbers = count(1000)

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self._number = next(self._numbers)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise RuntimeError("there is no device: kernels are only compiled")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("there is nothing to call a kernel with: kernels are only compiled")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed: kernels are only compiled")


@contextmanager
def recorded(capability: int, compiling: Callable[[str], bool] = lambda kernel: True) -> Iterator[list[Launch]]:
    """Within it launches are added to the list; the kernels that `compiling` picks by name are compiled for `capability` (80, 90, 100)."""
    launches: list[Launch] = []
    run = JITFunction.run
    keys: list[str] = []
    known: dict[str, str] = {}

    def listed(key: str, fn: Any, **_: Any) -> bool:
        keys.append(f"{fn.module}.{fn.name} {key}")
        return not compiling(_name(fn.jit_function.fn))

    def recording(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel | None:
        bound = self.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in self.signature.parameters})
        bound.apply_defaults()
        shape = grid(bound.arguments) if callable(grid) else grid
        keys.clear()
        start = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        seconds = time.perf_counter() - start if keys else 0.0
        key = known.setdefault(compiled.hash, keys[0] if keys else "") if compiled else keys[0]
        constexprs = {param.name for param in self.params if param.is_constexpr}
        arguments = {name: value for name, value in bound.arguments.items() if name not in constexprs}
        constants = {name: value for name, value in bound.arguments.items() if name in constexprs}
        launches.append(Launch(_name(self.fn), key, tuple(shape), arguments, constants, compiled, seconds))
        return compiled

    with (
        mock.patch.object(JITFunction, "run", recording),
        mock.patch.object(driver, "_active", Compiler(capability)),
        mock.patch.object(knobs.runtime, "jit_cache_hook", listed),
    ):
        yield launches


def variants(calls: Iterable[Callable[[], Any]], capability: int = 90) -> dict[str, set[str]]:
    """Kernel -> what distinguishes the versions of it that these calls together would compile. Compiles nothing."""
    with recorded(capability, lambda kernel: False) as launches:
        for call in calls:
            call()
    found: dict[str, set[str]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, set()).add(launch.key)
    return found


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__.lstrip('_')}"
