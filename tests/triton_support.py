"""What the tests of the Triton kernels share: where they run, inputs, and outputs that show what was never written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from levels import DTYPES, LAYOUTS, pyramid, relative_error
from torch import Tensor

__all__ = ["DEVICES", "DTYPES", "LAYOUTS", "ROUNDING", "poisoned", "pyramid", "relative_error"]

#: On the CPU where kernels are interpreted, on a GPU where they are compiled.
DEVICES = [*(["cpu"] if triton.knobs.runtime.interpret else []), pytest.param("cuda", marks=pytest.mark.gpu)]
#: Relative error of one rounding to the type; the interpreter truncates to bf16 where a GPU rounds.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


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
