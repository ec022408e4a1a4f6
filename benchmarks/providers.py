"""Who computes: the published way, plain PyTorch, torch.compile, and every backend of kdkernels that runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kdkernels import backend_info, set_backend

from .registry import Case, Entry, Function

BASELINES = ("paper", "eager", "compile", "compile-max")
BACKENDS = ("reference", "triton", "native")
#: The backends of the contexts that are open, innermost last: kdkernels does not tell its present choice.
_OPEN: list[str] = []


@dataclass(frozen=True)
class Provider:
    """One way of computing every entry.

    name:      as given to --provider
    function:  entry -> the function of the entry's inputs that is measured; made anew each time, so that nothing is compiled twice
    backend:   of kdkernels, to be chosen while the function runs; None for the baselines
    primitive: the only one that the backend is chosen for, the others having that of `auto`; None for all
    """

    name: str
    function: Callable[[Entry], Function]
    backend: str | None = None
    primitive: str | None = None

    @contextmanager
    def active(self, tf32: bool = False) -> Iterator[None]:
        """Within it the provider's backend is the chosen one, and torch.compile cannot fall back to eager in silence.

        tf32: convolutions in fp32 are as PyTorch has them; else none is rounded to TF32, which no tolerance would admit.
        """
        with nullcontext() if tf32 else _full_precision(), self._selected():
            yield

    @contextmanager
    def _selected(self) -> Iterator[None]:
        if self.backend is not None and self.primitive is not None:
            # Not above: `compare` measures versions of kdkernels that have no such function.
            from kdkernels.backend import assigned

            with _chosen("auto"), assigned(self.primitive, self.backend):
                yield
        elif self.backend is not None:
            with _chosen(self.backend):
                yield
        elif self.name.startswith("compile"):
            from torch._dynamo import config as dynamo
            from torch._functorch import config as functorch

            donated = {"donated_buffer": False} if self.name == "compile-max" else {}
            with dynamo.patch(fail_on_recompile_limit_hit=True), functorch.patch(donated):
                yield
        else:
            yield


@contextmanager
def _full_precision() -> Iterator[None]:
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def providers() -> dict[str, Provider]:
    """Name -> provider, for all that can exist; `absent` says which cannot run here."""
    found = {
        "paper": Provider("paper", lambda entry: entry.paper),
        "eager": Provider("eager", lambda entry: entry.eager),
        "compile": Provider("compile", lambda entry: _compiled(entry.eager, None)),
        # Without CUDA graphs: those would copy every rotated input into a fixed buffer; graph replay is a figure of its own, for everybody.
        "compile-max": Provider("compile-max", lambda entry: _compiled(entry.eager, "max-autotune-no-cudagraphs")),
    }
    for name in BACKENDS:
        found[name] = Provider(name, lambda entry: entry.call, name)
    return found


def absent(provider: Provider, device: torch.device, entry: Entry | None = None, case: Case | None = None) -> str:
    """Why the provider cannot run on this device, or, where they are given, not this entry on this case there; "" when it can."""
    reason = "" if provider.backend is None else _absent(provider.backend, device)
    return reason or ("" if entry is None or case is None else entry.absent(provider.backend or provider.name, case, device))


def _absent(backend: str, device: torch.device) -> str:
    info = backend_info()[backend]
    if backend == "triton" and device.type != "cuda":
        return str(info["reason"]) or "its kernels would be interpreted, whose time says nothing"
    if backend == "native" and info["available"]:
        return _refuses(device)
    return "" if info["available"] else str(info["reason"])


def _refuses(device: torch.device) -> str:
    """Why the compiled libraries have no kernels for a device of this type; "" when they have. Loads what is wanted for it."""
    # Not above: `compare` measures versions of kdkernels that have no such module.
    from kdkernels import native

    # Without an index, the current device: earlier versions take none.
    return native.refuses(device.type)


@contextmanager
def _chosen(backend: str) -> Iterator[None]:
    """Within it `backend` is the chosen one, after it the one before: the oracle runs while a provider is active."""
    set_backend(backend)
    _OPEN.append(backend)
    try:
        yield
    finally:
        _OPEN.pop()
        set_backend(_OPEN[-1] if _OPEN else "auto")


def _compiled(function: Function, mode: str | None) -> Function:
    # One graph or an error: half of it run eagerly would not be torch.compile.
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def reference_of(entry: Entry) -> Function:
    """The oracle: the public call on the reference backend, to be given float64 inputs."""

    def oracle(**inputs: Any) -> Any:
        with _chosen("reference"):
            return entry.call(**inputs)

    return oracle
