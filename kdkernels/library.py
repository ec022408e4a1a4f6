"""Registration of the fused operators: one schema and one fake each, whichever backend's kernels are behind them; and of gradients that
are final."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native

_LIBRARY = torch.library.Library("kdkernels", "FRAGMENT")


def define(name: str, schema: str, fake: Callable[..., Any], primitive: str | None = None) -> Callable[..., Any]:
    """Registers `kdkernels::name` and returns what calls it.

    schema: "(Tensor[] x, ...) -> Tensor"; the operator takes the backend's name before these arguments.
    fake:   of the arguments without the backend's name: results of the right shape, type and strides.
    The work is done by the function `name` of kdkernels.<backend>.<primitive>, for the backend "native" by the operator
    kdkernels_native::name, called with the same arguments; primitive None is the name without "_backward".
    """
    module = primitive or name.removesuffix("_backward")
    native.expect(name, schema)
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
    if backend == "native":
        return getattr(torch.ops.kdkernels_native, name).default
    return getattr(importlib.import_module(f"kdkernels.{backend}.{module}"), name)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """`save_for_backward` for tensors of which some may have been made in inference mode, as a teacher's, and cannot be saved so."""
    # Nobody traces with such tensors, and dynamo cannot look.
    looks = not torch.compiler.is_compiling()
    ctx.of_inference = {i: x for i, x in enumerate(tensors) if looks and x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.of_inference else x for i, x in enumerate(tensors)))


def kept(ctx: Any) -> list[Any]:
    """What `keep` was given."""
    return [ctx.of_inference.get(i, x) for i, x in enumerate(ctx.saved_tensors)]


class _Final(torch.autograd.Function):
    """Gradients as they are. They depend on `sources` in a way that nothing can differentiate."""

    @staticmethod
    def forward(ctx: Any, count: int, *gradients_and_sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in gradients_and_sources[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("this loss cannot be differentiated twice; with the backend 'reference', in explicit mode, it can")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd.Function: differentiating its result raises RuntimeError.

    torch's own takes the result for a constant, without a word, where the upstream gradient is one.
    """

    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        made = [x for x in results if x is not None]
        final = iter(_Final.apply(len(made), *made, *sources))
        return tuple(None if x is None else next(final) for x in results)

    return run
