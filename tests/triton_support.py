"""What the tests of the Triton kernels share: where they run, inputs, and outputs that show what was never written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

#: On the CPU where kernels are interpreted, on a GPU where they are compiled.
DEVICES = [*(["cpu"] if triton.knobs.runtime.interpret else []), pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Relative error of one rounding to the type; the interpreter truncates to bf16 where a GPU rounds.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def pyramid(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0, device: str = "cpu"
) -> list[Tensor]:
    """Normal random levels of these shapes, or small tensors of any other number of dimensions."""
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.contiguous(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x for x in levels]


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it new uninitialised tensors are full of NaN, so that an element which no kernel writes is seen."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def spoilt(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    with (
        mock.patch.object(torch, "empty", spoilt(empty)),
        mock.patch.object(torch, "empty_like", spoilt(empty_like)),
        mock.patch.object(Tensor, "new_empty", spoilt(new_empty)),
    ):
        yield


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; 0 when both are 0."""
    difference = (got.double().cpu() - want.double().cpu()).norm()
    return float(difference / want.double().cpu().norm()) if float(difference) else 0.0
