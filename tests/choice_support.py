"""What tests of the choice of a backend share: tables, and tensors on a GPU that need not be there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kdkernels import backend, choice, native, tables
from kdkernels.tables import LAYOUTS

HOPPER = (9, 0)
KEY = "channel_mean bf16 contiguous small"
PRIMITIVES = [name for name in backend._implementations["reference"] if name not in backend._unfused()]
#: Those that have kernels of their own whatever was measured, and what is said of the others where nothing was.
FUSED = tuple(name for name in PRIMITIVES if name != "terms_persistent")
UNFUSED = {
    **dict.fromkeys(backend._unfused(), "not fused"),
    "terms_persistent": "made of other primitives, as it was not measured as faster",
}
FORMATS = dict(zip(LAYOUTS, (torch.contiguous_format, torch.channels_last), strict=True))
#: Elements of a level of two images of each size.
ELEMENTS = {"small": 1 << 10, "medium": 1 << 21, "large": 1 << 25, "huge": 1 << 27}


def table(entries: Mapping[str, tuple[float, float]], capability: tuple[int, int] = HOPPER) -> str:
    """entries: key -> milliseconds of Triton and of native"""
    found = {name: {"ms": dict(zip(choice.BACKENDS, ms, strict=True)), "run": 0} for name, ms in entries.items()}
    return json.dumps({"schema": choice.SCHEMA, "capability": capability, "runs": [{}], "entries": found})


def forget() -> None:
    choice.forget()
    tables.capability.cache_clear()


@contextmanager
def two_backends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`folder`, where tables are looked for; a GPU of compute capability 9.0; and both backends able to use it."""
    monkeypatch.setattr(choice, "TABLES", folder)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(backend, "_choice", "auto")
    monkeypatch.setattr(backend, "_fallbacks_told", set())
    monkeypatch.setitem(native._loaded, "cuda", native.Library(folder / "_C_cuda.so", ""))
    forget()
    yield folder
    forget()


def level(size: str = "small", dtype: torch.dtype = torch.bfloat16, layout: str = "contiguous", *, shape: Sequence[int] = ()) -> Tensor:
    """A level on a GPU, without memory. size: one of `kdkernels.tables.sizes` of any primitive"""
    of_image, _, images = size.partition("-x")
    with FakeTensorMode():
        x = torch.empty(shape or (int(images or 2), 4, 2, ELEMENTS[of_image] // 16), dtype=dtype, device="cuda:0")
        return x.contiguous(memory_format=FORMATS[layout]) if x.dim() == 4 else x


def taken(x: Tensor, primitive: str = "channel_mean", *args: Any) -> str:
    """The backend that serves this call."""
    found = backend.resolve(primitive, [x], *(args or ([x], "signed")))
    return next(name for name, offered in backend._implementations.items() if offered[primitive].function is found)
