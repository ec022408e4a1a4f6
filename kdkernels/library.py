"""Registration of the fused operators: one schema and one fake each, whichever backend's kernels are behind them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("kdkernels", "FRAGMENT")


def define(name: str, schema: str, fake: Callable[..., Any], primitive: str | None = None) -> Callable[..., Any]:
    """Registers `kdkernels::name` and returns what calls it.

    schema: "(Tensor[] x, ...) -> Tensor"; the operator takes the backend's name before these arguments.
    fake:   of the arguments without the backend's name: results of the right shape, type and strides.
    The work is done by the function `name` of kdkernels.<backend>.<primitive>, called with the same arguments; primitive None is the name
    without "_backward".
    """
    module = primitive or name.removesuffix("_backward")
    _LIBRARY.define(f"{name}(str backend, {schema.removeprefix('(')}")

    def run(backend: str, *args: Any) -> Any:
        kernel, index = _kernel(backend, module, name), _gpu(args)
        if index is None or index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(index):
            return kernel(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{name}", lambda backend, *args: fake(*args), lib=_LIBRARY)
    return getattr(torch.ops.kdkernels, name).default


def _gpu(args: tuple[Any, ...]) -> int | None:
    """The GPU of the first tensor: Triton launches on the current device, which need not be the tensors'."""
    for value in args:
        x = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(x, Tensor):
            return x.device.index if x.is_cuda else None
    return None


@cache
def _kernel(backend: str, module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"kdkernels.{backend}.{module}"), name)
