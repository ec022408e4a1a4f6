"""What a call may not leave behind in torch's global state, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Item(NamedTuple):
    read: Callable[[], Any]
    put_back: Callable[[Any], Any]


def _attribute(owner: Any, name: str) -> _Item:
    return _Item(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


_ITEMS: dict[str, _Item] = {
    "the random state": _Item(torch.get_rng_state, torch.set_rng_state),
    "grad mode": _Item(torch.is_grad_enabled, torch._C._set_grad_enabled),
    "the default dtype": _Item(torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": _Item(torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": _Item(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "matmul precision": _Item(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "autocast": _Item(lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    "denormal numbers": _Item(lambda: bool(torch.tensor(1e-310, dtype=torch.float64) * 1 == 0), torch.set_flush_denormal),
    "cudnn.benchmark": _attribute(torch.backends.cudnn, "benchmark"),
    "cudnn.deterministic": _attribute(torch.backends.cudnn, "deterministic"),
    "cudnn.allow_tf32": _attribute(torch.backends.cudnn, "allow_tf32"),
}
_CUDA_ITEMS: dict[str, _Item] = {
    "the GPU's random state": _Item(torch.cuda.get_rng_state, torch.cuda.set_rng_state),
    "the current device": _Item(torch.cuda.current_device, torch.cuda.set_device),
    "autocast on the GPU": _Item(lambda: torch.is_autocast_enabled("cuda"), lambda on: torch.set_autocast_enabled("cuda", on)),
}


class State:
    """torch's global state as it is now."""

    def __init__(self, device: torch.device) -> None:
        self._items = {**_ITEMS, **(_CUDA_ITEMS if device.type == "cuda" else {})}
        self._values = {name: item.read() for name, item in self._items.items()}

    def put_back(self) -> list[str]:
        """Names of what has changed since; all of it is as it was, once this returns."""
        changed = []
        for name, item in self._items.items():
            if not _equal(item.read(), self._values[name]):
                changed.append(name)
                item.put_back(self._values[name])
        return changed


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
