"""Choice of the implementation behind the primitives: `auto`, `reference`, `triton` or `native`."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    versions = {"reference": torch.__version__, "triton": _installed("triton"), "native": None}
    reasons = {name: _absent(name) for name in versions}
    # Interpreted kernels serve tests: who does not name them does not get them.
    fastest = "triton" if not reasons["triton"] and torch.cuda.is_available() else "reference"
    active = fastest if _choice == "auto" else _choice
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


def resolve(primitive: str, tensors: Sequence[Tensor], *args: Any) -> Callable[..., Any]:
    """The implementation of `primitive` for these deciding tensors and arguments.

    Raises RuntimeError when a named backend cannot serve them, ValueError when the environment names a backend that does not exist.
    """
    if _choice not in ("auto", "reference", "triton"):
        _validate(_choice)
    if len(tensors) == 0:
        # Nothing to compute, so nothing that a backend could not do.
        return _implementations["reference"][primitive].function
    if _choice == "triton" or (_choice == "auto" and tensors[0].is_cuda):
        reason = _refusal("triton", primitive, tensors, args)
        if not reason:
            return _implementations["triton"][primitive].function
        if _choice == "triton":
            raise RuntimeError(f"backend 'triton' cannot run {primitive}: {reason}; choose 'auto' or 'reference'")
    else:
        reason = "the features are not on a GPU"
    if _choice == "auto" and not torch.compiler.is_compiling():
        _tell_fallback(primitive, reason)
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
    with torch.autocast(device, enabled=False):
        return implementation(*args)


def _refusal(backend: str, primitive: str, tensors: Sequence[Tensor], args: Sequence[Any]) -> str:
    """Why `backend` cannot serve this call; "" when it can."""
    if not _TRITON_INSTALLED:
        return _absent(backend)
    found = _implementations[backend][primitive]
    device, dtypes = tensors[0].device, found.dtypes
    if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
        return f"the tensors are on {device}, not on a GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    for x in tensors:
        if x.device != device:
            return f"the tensors are on several devices ({', '.join(sorted({str(x.device) for x in tensors}))})"
        if dtypes is not None and x.dtype not in dtypes:
            return f"it does not take {str(x.dtype).removeprefix('torch.')}"
        shape = x.shape
        if len(shape) >= 3 and shape[-2] * shape[-1] >= MOST_PIXELS:
            return f"it takes maps of fewer than {MOST_PIXELS} pixels, got {shape[-2]} x {shape[-1]}"
    return found.refuses(*args)


def _absent(name: str) -> str:
    """Why a backend cannot run here at all; "" when it can."""
    if name == "native":
        return "this version of kdkernels contains no compiled library"
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


def _tell_fallback(primitive: str, reason: str) -> None:
    global _fallback_told
    if not _fallback_told:
        _fallback_told = True
        logger.info("backend auto: using 'reference' for %s (triton: %s; native: %s)", primitive, reason, _absent("native"))


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
