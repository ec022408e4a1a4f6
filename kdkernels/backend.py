"""Choice of the implementation behind the primitives: `auto`, `reference`, `triton` or `native`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton", "native")
logger = logging.getLogger("kdkernels")

_ABSENT = {
    "triton": "this version of kdkernels contains no Triton kernels",
    "native": "this version of kdkernels contains no compiled library",
}
_implementations: dict[str, dict[str, Callable]] = {"reference": {}}
_fallback_told = False


def from_environment() -> str:
    """What KDKERNELS_BACKEND says; not validated: a wrong environment must not stop `import kdkernels`, the first use raises."""
    return os.environ.get("KDKERNELS_BACKEND", "").strip().lower() or "auto"


_choice = from_environment()


def set_backend(name: str) -> None:
    """Chooses the backend for the whole process; overrides KDKERNELS_BACKEND.

    `auto` takes the fastest that can run. A named backend that cannot run raises RuntimeError with the reason, an unknown name ValueError.
    """
    global _choice
    _validate(name)
    _choice = name


def backend_info() -> dict[str, dict[str, Any]]:
    """What each backend is: {"reference" | "triton" | "native": {"available", "active", "reason", "version"}}.

    `active`: what the present choice resolves to. `reason`: why it is not available, "" when it is.
    `version`: of the software underneath, or None.
    """
    versions = {"reference": torch.__version__, "triton": _installed("triton"), "native": None}
    usable = _choice in ("auto", "reference")
    return {
        name: {
            "available": name not in _ABSENT,
            "active": name == "reference" and usable,
            "reason": _ABSENT.get(name, ""),
            "version": version,
        }
        for name, version in versions.items()
    }


def register(backend: str, primitive: str, implementation: Callable) -> None:
    """Makes `implementation` the one that `backend` offers for `primitive`."""
    _implementations[backend][primitive] = implementation


def resolve(primitive: str, tensors: Sequence[Tensor]) -> Callable:
    """The implementation of `primitive` for these tensors. Raises like `set_backend` when the environment names what cannot run."""
    _validate(_choice)
    if _choice == "auto" and not torch.compiler.is_compiling():
        _tell_fallback()
    return _implementations["reference"][primitive]


def call(primitive: str, tensors: Sequence[Tensor], *args: Any) -> Any:
    """Runs `primitive` on `args` with autocast off; `tensors` are those that decide about backend and device."""
    implementation = resolve(primitive, tensors)
    device = tensors[0].device.type if len(tensors) else "cpu"
    with torch.autocast(device, enabled=False):
        return implementation(*args)


def _validate(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)} (set_backend or KDKERNELS_BACKEND)")
    if name in _ABSENT:
        raise RuntimeError(f"backend {name!r} cannot run: {_ABSENT[name]}; choose 'auto' or 'reference'")


def _tell_fallback() -> None:
    global _fallback_told
    if not _fallback_told:
        _fallback_told = True
        logger.info("backend auto: using 'reference' (%s)", "; ".join(f"{name}: {reason}" for name, reason in _ABSENT.items()))


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
