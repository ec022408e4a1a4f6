"""What the tests of the losses that compare two pyramids share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracle import cases
from torch import Tensor

from kdkernels.losses.trainable import Trainable


def pyramids(seed: int, shapes: Any = cases.SHAPES, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Student features, which require gradients, and teacher features."""
    s, t, _, _ = cases.four(seed, shapes)
    return cases.tensors(s, dtype, requires_grad=True), cases.tensors(t, dtype)


def built(loss: Any, s: Sequence[Tensor], t: Sequence[Tensor]) -> Any:
    """The loss; the parts that it trains are made, in the features' type if that is fp64, with no parameter at 0, as biases would be."""
    if isinstance(loss, Trainable) and s:
        loss.build(s, t)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in loss.trainable.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
        if s[0].dtype == torch.float64:
            loss.trainable.double()
    return loss


def value_and_gradients(loss: Any, s: Sequence[Tensor], t: Sequence[Tensor], **given: Any) -> tuple[Tensor, list[Tensor]]:
    value = loss(s, t, **given)
    gradients = torch.autograd.grad(value.sum(), s, allow_unused=True)
    return value, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, s, strict=True)]
