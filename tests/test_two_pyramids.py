"""What `channel_kl` and `correlation`, the primitives of two pyramids channel by channel, have in common: layouts, types, the teacher."""

from __future__ import annotations

import pytest
import torch
from oracle import cases
from oracle.compare import RTOL32, assert_close

from kdkernels import functional

primitives = pytest.mark.parametrize("primitive", [functional.channel_kl, functional.correlation])


@primitives
def test_the_teacher_is_a_constant(primitive):
    s, t = (cases.tensors(cases.pyramid(k), requires_grad=True) for k in (1, 2))
    primitive(s, t).sum().backward()
    assert all(x.grad is not None for x in s) and all(x.grad is None for x in t)


@primitives
def test_layouts_and_mixed_types(primitive):
    s, t = (cases.tensors(cases.pyramid(k)) for k in (11, 12))
    want = primitive(s, t)
    last = [x.contiguous(memory_format=torch.channels_last) for x in s]
    assert_close(primitive(last, t), want)
    assert_close(primitive(dict(zip("abc", last, strict=True)), dict(zip("abc", t, strict=True))), want)
    halves = [x.half() for x in t]
    mixed = primitive([x.float() for x in s], halves)
    assert mixed.dtype == torch.float32
    assert_close(mixed, primitive([x.float().double() for x in s], [x.double() for x in halves]), RTOL32)
