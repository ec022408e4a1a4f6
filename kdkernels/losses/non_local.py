"""Non-local blocks with dot-product affinity, in the associative form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .trainable import as_parameters


class NonLocal(nn.Module):
    """x + BatchNorm(W y), where y at each position i is the mean over the positions j of (theta_i . phi_j) g_j (arXiv 1711.07971).

    theta, phi and g are 1x1 convolutions of x (N, C, H, W) to `inner` channels, phi and g max-pooled; W is one back to C. The affinity is
    a plain product, so that the order of the two products is free: theta (phi^T g) takes O(H W inner^2) time and O(inner^2) memory an
    image, where (theta phi^T) g makes a matrix of H W times the number of pooled positions. The result is the same.

    channels: C;   inner: at least 1
    pool:     side and stride of the windows of phi and g, at most the map's; what is left over at right and bottom is dropped

    BatchNorm's weight and bias start at 0: the block starts as the identity. A single value (N H W = 1) is its own mean.
    """

    def __init__(self, channels: int, inner: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = as_parameters(x, self)
        y = self.attend(*self.embed(x))
        return x + self._normalized(self.out(y.unflatten(2, x.shape[2:])))

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta (N, inner, H W), phi and g (N, inner, P)."""
        window = (min(self.pool, x.shape[2]), min(self.pool, x.shape[3]))
        pooled = [F.max_pool2d(convolution(x), window).flatten(2) for convolution in (self.phi, self.g)]
        return self.theta(x).flatten(2), pooled[0], pooled[1]

    @staticmethod
    def attend(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """y (N, inner, H W). The mean over P comes first: the sum might leave fp16's range."""
        return torch.bmm(torch.bmm(g, (phi / phi.shape[2]).transpose(1, 2)), theta)

    def _normalized(self, y: Tensor) -> Tensor:
        if self.training and y.shape[0] * y.shape[2] * y.shape[3] == 1:
            return y * 0 * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        return self.norm(y)
