"""Choice of the implementation behind the primitives: `auto`, `reference`, `triton` or `native`."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native

BACKENDS = ("auto", "reference", "triton", "native")
#: Pixels of a map, from which on the Triton kernels do not take it: 4096 x 4096.
MOST_PIXELS = 1 << 24
logger = logging.getLogger("kdkernels")


class Implementation(NamedTuple):
    """What a backend offers for one primitive.

    function: takes the primitive's arguments
    refuses:  takes them too and says why the function cannot serve them, "" when it can
    dtypes:   of the deciding tensors that it takes; None: all
    """

    function: Callable[..., Any]
    refuses: Callable[..., str]
    dtypes: frozenset[torch.dtype] | None


_FUSED_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_implementations: dict[str, dict[str, Implementation]] = {"reference": {}, "triton": {}, "native": {}}
_fallback_told = False


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


# Looked up once: torch.compile traces through the choice of a backend, and neither can change later.
_TRITON_INSTALLED = _found("triton")
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "on", "yes", "y")


def from_environment() -> str:
    """What KDKERNELS_BACKEND says; not validated: a wrong environment must not stop `import kdkernels`, the first use raises."""
    return os.environ.get("KDKERNELS_BACKEND", "").strip().lower() or "auto"


_choice = from_environment()


def set_backend(name: str) -> None:
    """Chooses the backend for the whole process; overrides KDKERNELS_BACKEND.

    `auto` takes the fastest that can run. A named backend that cannot run raises RuntimeError with the reason, an unknown name ValueError.
    A named backend also raises at a call that it cannot serve (tensors elsewhere, fp64, an option that only the reference has), where
    `auto` takes the reference.
    """
    global _choice
    _validate(name)
    _choice = name


def backend_info() -> dict[str, dict[str, Any]]:
    """What each backend is: {"reference" | "triton" | "native": {"available", "active", "reason", "version"}}.

    `active`: what the present choice resolves to, for `auto` with features on the GPU where there is one.
    `reason`: why it is not available, "" when it is. `version`: of the software underneath, or None.
    """
    versions = {"reference": torch.__version__, "triton": _installed("triton"), "native": native.version()}
    reasons = {name: _absent(name) for name in versions}
    fastest = _fastest(torch.cuda.is_available())
    active = _choice if _choice != "auto" else "reference" if reasons[fastest] else fastest
    return {
        name: {"available": not reasons[name], "active": name == active and not reasons[name], "reason": reasons[name], "version": version}
        for name, version in versions.items()
    }


def register(
    backend: str,
    primitive: str,
    function: Callable[..., Any],
    refuses: Callable[..., str] = lambda *args: "",
    dtypes: frozenset[torch.dtype] | None = _FUSED_DTYPES,
) -> None:
    """Makes `function` the one that `backend` offers for `primitive`; see `Implementation`. The reference takes everything."""
    _implementations[backend][primitive] = Implementation(function, refuses, None if backend == "reference" else dtypes)


def register_fused(
    primitive: str,
    fused: Callable[..., Any],
    refuses: Callable[..., str] = lambda *args: "",
    dtypes: frozenset[torch.dtype] | None = _FUSED_DTYPES,
) -> None:
    """Registers `fused`, which takes a backend's name before the primitive's arguments, for every backend that has fused kernels."""
    for name in ("triton", "native"):
        register(name, primitive, functools.partial(fused, name), refuses, dtypes)


def resolve(primitive: str, tensors: Sequence[Tensor], *args: Any) -> Callable[..., Any]:
    """The implementation of `primitive` for these deciding tensors and arguments.

    Raises RuntimeError when a named backend cannot serve them, ValueError when the environment names a backend that does not exist.
    """
    if _choice not in BACKENDS:
        _validate(_choice)
    # Without tensors there is nothing to compute, so nothing that a backend could not do.
    if _choice != "reference" and len(tensors) > 0:
        name = _fastest(tensors[0].is_cuda) if _choice == "auto" else _choice
        reason = _refusal(name, primitive, tensors, args)
        if not reason:
            return _implementations[name][primitive].function
        if _choice != "auto":
            raise RuntimeError(f"backend {name!r} cannot run {primitive}: {reason}; choose 'auto' or 'reference'")
        if not torch.compiler.is_compiling():
            _tell_fallback(primitive, name, reason)
    return _implementations["reference"][primitive].function


def refuses_constants(constants: Iterable[Tensor], device: torch.device, what: str) -> str:
    """Why fused kernels cannot take these beside the features on `device`: they treat them as fp32 constants. "" when they can.

    what: the constants' name in the plural, for the sentence
    """
    given = list(constants)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return f"{what} require a gradient, which only the reference gives"
    if any(x.dtype == torch.float64 or x.device != device for x in given):
        return f"{what} are in float64 or on another device"
    return ""


def call(primitive: str, tensors: Sequence[Tensor], *args: Any) -> Any:
    """Runs `primitive` on `args` with autocast off; `tensors` are those that decide about backend and device."""
    implementation = resolve(primitive, tensors, *args)
    device = tensors[0].device.type if len(tensors) else "cpu"
    if not torch.is_autocast_enabled(device):
        return implementation(*args)
    with torch.autocast(device, enabled=False):
        return implementation(*args)


def _fastest(on_gpu: bool) -> str:
    """The backend that `auto` tries. Interpreted Triton kernels serve tests: who does not name them does not get them."""
    return "triton" if on_gpu else "native"


def _refusal(name: str, primitive: str, tensors: Sequence[Tensor], args: Sequence[Any]) -> str:
    """Why a backend with fused kernels cannot serve this call; "" when it can."""
    found, device = _implementations[name][primitive], tensors[0].device
    reason = _refuses_device(name, device)
    if reason:
        return reason
    if transformed():
        return "torch.func and forward-mode differentiation work on the reference only"
    for x in tensors:
        if x.device != device:
            return f"the tensors are on several devices ({', '.join(sorted({str(x.device) for x in tensors}))})"
        if found.dtypes is not None and x.dtype not in found.dtypes:
            return f"it does not take {str(x.dtype).removeprefix('torch.')}"
        shape = x.shape
        if name == "triton" and len(shape) >= 3 and shape[-2] * shape[-1] >= MOST_PIXELS:
            return f"it takes maps of fewer than {MOST_PIXELS} pixels, got {shape[-2]} x {shape[-1]}"
    return found.refuses(*args)


def _refuses_device(name: str, device: torch.device) -> str:
    """Why a backend with fused kernels cannot serve tensors on this device; "" when it can."""
    if name == "native":
        if native.library().reason:
            return native.library().reason
        if device.type == "cuda":
            return "the compiled library has no kernels for CUDA"
        return "" if device.type == "cpu" else f"the tensors are on {device}, not on the CPU"
    if not _TRITON_INSTALLED:
        return _absent(name)
    if device.type == "cuda" or (_INTERPRETED and device.type == "cpu"):
        return ""
    return f"the tensors are on {device}, not on a GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"


def transformed() -> bool:
    """Whether the call is within vmap, jvp or another transformation, whose rules the fused operators have not: a tangent would be lost."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _absent(name: str) -> str:
    """Why a backend cannot run here at all; "" when it can."""
    if name == "native":
        return native.library().reason
    if name == "triton" and not _TRITON_INSTALLED:
        return "triton is not installed"
    if name == "triton" and not _INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"
    return ""


def _validate(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)} (set_backend or KDKERNELS_BACKEND)")
    reason = _absent(name)
    if reason:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}; choose 'auto' or 'reference'")


def _tell_fallback(primitive: str, name: str, reason: str) -> None:
    global _fallback_told
    if not _fallback_told:
        _fallback_told = True
        # A library that is there was meant to be used.
        unfit = name == "native" and native.library().reason and native.library().file is not None
        level = logging.WARNING if unfit else logging.INFO
        logger.log(level, "backend auto: using 'reference' for %s, not %r: %s", primitive, name, reason)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
