"""Choice of the implementation behind the primitives: `auto`, `reference`, `triton` or `native`."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import choice, native

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


#: What `auto` tries for tensors that are not on a GPU.
_ON_CPU = ("native",)
_FUSED_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_implementations: dict[str, dict[str, Implementation]] = {"reference": {}, "triton": {}, "native": {}}
#: Primitive -> the backend that `auto` takes for it, whatever is measured.
_assigned: dict[str, str] = {}
#: Backends that calls have fallen back to, and that this was said of.
_fallbacks_told: set[str] = set()


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

    `auto` takes the fastest that can run: on a GPU by what was measured (`kdkernels.choice`). A named backend that cannot run raises
    RuntimeError with the reason, an unknown name ValueError. A named backend also raises at a call that it cannot serve (tensors elsewhere,
    fp64, an option that only the reference has), where `auto` takes another one, the reference in the end.
    """
    global _choice
    _validate(name)
    _choice = name


@contextmanager
def assigned(primitive: str, name: str) -> Iterator[None]:
    """Within it `auto` has only the named backend for `primitive`, and raises RuntimeError where that cannot serve a call. For measuring.

    It counts for all threads, and those of one primitive are not to be nested. Raises ValueError for an unknown primitive or backend.
    """
    for what, given, known in (("primitive", primitive, _implementations["reference"]), ("backend", name, _implementations)):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; they are {', '.join(known)}")
    _assigned[primitive] = name
    try:
        yield
    finally:
        del _assigned[primitive]


def backend_info() -> dict[str, dict[str, Any]]:
    """What each backend is: {"reference" | "triton" | "native": {"available", "active", "reason", "version", "primitives"}}.

    `available`: it can be named. `reason`: why it cannot, "" when it can. `version`: of the software underneath, or None.
    `active`: the present choice is this one; `auto`: it takes this one for some primitive, with features on the GPU where there is one,
    the current one of several.
    `primitives`: those that the present choice takes this backend for, on that device, and why: {"terms": "measured faster: ..."}. `auto`
    may take several for one primitive, by type, layout and size.
    `libraries`, of native only: {"cpu": "", "cuda": "there is no ..."}, why its library for CPUs, and that for CUDA on that GPU, cannot be
    used, "" where it can. That for CPUs decides whether native can be named.

    Where there is a GPU this starts CUDA, and loads what is compiled for it. Raises ValueError for a malformed table of measurements.
    """
    versions = {"reference": torch.__version__, "triton": _installed("triton"), "native": native.version()}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    given = _given(device)
    # Whoever makes up a primitive of others does not serve it.
    idle = {"reference": _unfused() | _by_others()}
    info: dict[str, dict[str, Any]] = {}
    for name, version in versions.items():
        reason, primitives = _absent(name), given[name]
        used = name == _choice or (_choice == "auto" and not primitives.keys() <= idle.get(name, set()))
        info[name] = {
            "available": not reason,
            "active": used and not reason,
            "reason": reason,
            "version": version,
            "primitives": primitives,
        }
    on_gpu = _refuses_device("native", device) if device.type == "cuda" else native.library("cuda").reason
    info["native"]["libraries"] = {"cpu": native.library("cpu").reason, "cuda": on_gpu}
    return info


def register(
    backend: str,
    primitive: str,
    function: Callable[..., Any],
    refuses: Callable[..., str] = lambda *args: "",
    dtypes: frozenset[torch.dtype] | None = _FUSED_DTYPES,
) -> None:
    """Makes `function` the one that `backend` offers for `primitive`; see `Implementation`. The reference takes everything."""
    choice.PRIMITIVES.add(primitive)
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
    chosen = _assigned.get(primitive, _choice) if _choice == "auto" else _choice
    # Without tensors there is nothing to compute, so nothing that a backend could not do.
    if chosen != "reference" and len(tensors) > 0:
        refused: dict[str, str] = {}
        for name in _order(primitive, tensors) if chosen == "auto" else (chosen,):
            reason = refusal(name, primitive, tensors, args)
            if not reason:
                _tell_fallback(primitive, name, refused)
                return _implementations[name][primitive].function
            refused[name] = reason
        if chosen != "auto":
            raise RuntimeError(f"backend {chosen!r} cannot run {primitive}: {refused[chosen]}; choose 'auto' or 'reference'")
        _tell_fallback(primitive, "reference", refused)
    return _implementations["reference"][primitive].function


def prefers(name: str, primitive: str, tensors: Sequence[Tensor]) -> bool:
    """Whether `name` was measured as the fastest for this call of a primitive that other primitives can do as well.

    Where nothing was measured: no. The present choice has to be `auto` or `name`. Within `assigned` that says it.
    """
    if _choice not in ("auto", name):
        return False
    if primitive in _assigned:
        return _assigned[primitive] == name
    return tensors[0].is_cuda and choice.order(primitive, tensors)[0] == name


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


def _order(primitive: str, tensors: Sequence[Tensor]) -> Sequence[str]:
    """The backends that `auto` tries, in order. Interpreted Triton kernels serve tests: who does not name them does not get them."""
    return choice.order(primitive, tensors) if tensors[0].is_cuda else _ON_CPU


def refusal(name: str, primitive: str, tensors: Sequence[Tensor], args: Sequence[Any]) -> str:
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
        return native.refuses(device.type, device.index)
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


def _tell_fallback(primitive: str, used: str, refused: Mapping[str, str]) -> None:
    """Says once of each backend that `auto` uses it after others have refused, and why these did."""
    if not refused or torch.compiler.is_compiling() or used in _fallbacks_told:
        return
    _fallbacks_told.add(used)
    level = logging.WARNING if native.unfit(refused.get("native", "")) else logging.INFO
    why = ", ".join(f"not {name!r}: {reason}" for name, reason in refused.items())
    logger.log(level, "backend auto: using %r for %s, %s", used, primitive, why)


def _given(device: torch.device) -> dict[str, dict[str, str]]:
    """Backend -> primitives that the present choice takes it for on this device, and why."""
    given: dict[str, dict[str, str]] = {name: {} for name in _implementations}
    for primitive in _implementations["reference"]:
        for name, why in _why(primitive, device).items():
            given[name][primitive] = why
    return given


def _why(primitive: str, device: torch.device) -> dict[str, str]:
    """Backend -> why the present choice takes it for calls of this primitive on this device."""
    if _choice not in BACKENDS:
        return {}
    if primitive in _unfused():
        return {"reference": "not fused"}
    if primitive in _by_others():
        return _why_whole(primitive, device)
    if _choice != "auto":
        reason = "" if _choice == "reference" else _refuses_device(_choice, device)
        return {_choice: f"named, but calls raise: {reason}" if reason else "named"}
    on_gpu = device.type == "cuda"
    refused = {name: reason for name in (choice.BACKENDS if on_gpu else _ON_CPU) if (reason := _refuses_device(name, device))}
    others = ", ".join(f"not {name!r}: {reason}" for name, reason in refused.items())
    if not on_gpu:
        return {"reference": others} if refused else {_ON_CPU[0]: "the only one with kernels for a CPU"}
    able = [name for name in choice.BACKENDS if name not in refused]
    if not refused:
        return choice.why(primitive, device.index) or {choice.BACKENDS[0]: choice.unmeasured(device.index)}
    return {able[0] if able else "reference": others}


def _why_whole(primitive: str, device: torch.device) -> dict[str, str]:
    """`_why` of a primitive that others make up. A table has the native kernel beside those others, whichever backends do them."""
    refused = ""
    if _choice not in ("auto", "native"):
        refused = f"as {_choice!r} is named"
    elif device.type != "cuda":
        refused = "as its kernel is for a GPU, and there is none"
    elif reason := _refuses_device("native", device):
        refused = f"not 'native': {reason}"
    found = {} if refused else choice.why(primitive, device.index, {"triton": "the passes", "native": "one launch"})
    if not found:
        return {"reference": f"made of other primitives, {refused or 'as it was not measured as faster'}"}
    if "triton" in found:
        found["reference"] = f"made of other primitives: {found.pop('triton')}"
    return found


def _by_others() -> set[str]:
    """Primitives that other primitives make up, and that only the native backend has kernels of their own for."""
    reference, triton, native = (_implementations[name] for name in ("reference", "triton", "native"))
    own = {name for name in native if native[name].function is not reference[name].function}
    return {name for name in own if triton[name].function is reference[name].function}


def _unfused() -> set[str]:
    """Primitives that are PyTorch's own operations whichever backend is chosen."""
    own = _implementations["reference"]
    return {primitive for primitive in own if all(of[primitive].function is own[primitive].function for of in _implementations.values())}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
