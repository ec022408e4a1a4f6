"""Box regression by a distribution: the last convolution gives logits over a fixed support, the regressed number is their mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DistributionRegression(nn.Module):
    """In place of the last convolution of a box regression (Generalized Focal Loss, arXiv 2006.04388, Eq. 3-5).

    sum_i P(y_i) y_i with P = softmax of reg_max + 1 logits over the support y, which is fixed: 0, 1, ..., reg_max (FCOS: strides), or
    `symmetric`, evenly from -2 to 2 (the deltas of an anchor). Maps (N, C, H, W) to (N, 4 * anchors, H, W) in fp32 (fp64 for fp64).

    convolution: the one that it replaces: its in_channels, kernel and initial deviation are kept;   reg_max: at least 1
    The logits are those of its submodule `logits`, (N, anchors * 4 * (reg_max + 1), H, W), channels in that order.
    """

    support: Tensor

    def __init__(self, convolution: nn.Conv2d, reg_max: int, symmetric: bool = False) -> None:
        super().__init__()
        if reg_max < 1:
            raise ValueError(f"reg_max is {reg_max}, should be at least 1")
        self.bins = reg_max + 1
        kernel, padding = convolution.kernel_size, convolution.padding
        self.logits = nn.Conv2d(convolution.in_channels, convolution.out_channels * self.bins, kernel, padding=padding)  # type: ignore[arg-type]
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(self.logits.bias)  # type: ignore[arg-type]
        support = torch.linspace(-2, 2, self.bins) if symmetric else torch.arange(self.bins, dtype=torch.float32)
        self.register_buffer("support", support, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.expectation(self.logits(x))

    def expectation(self, logits: Tensor) -> Tensor:
        """Logits (N, 4 * anchors * bins, H, W) -> (N, 4 * anchors, H, W)."""
        apart = logits.unflatten(1, (logits.shape[1] // self.bins, self.bins))
        weights = (apart if apart.dtype == torch.float64 else apart.float()).softmax(2)
        return (weights * self.support.to(weights.dtype)[:, None, None]).sum(2)
