"""Inputs for the comparisons: random pyramids whose entries keep away from 0, where |x| has no derivative, and boxes worth testing."""

from __future__ import annotations

import numpy as np
import torch

IMAGE_SIZE = (64, 96)

# Three levels of one image frame, with odd, even and single sizes and different channel counts.
SHAPES = [(2, 3, 5, 6), (2, 4, 3, 3), (2, 2, 1, 2)]

# In the first image two overlapping boxes and one partly outside, in the second a single one.
BOXES = [
    np.array([[8.0, 10.0, 40.0, 30.0], [30.0, 20.0, 60.0, 50.0], [80.0, -12.0, 130.0, 25.0]]),
    np.array([[33.3, 5.1, 71.7, 60.2]]),
]


def pyramid(seed: int, shapes=SHAPES, scale: float = 1.0) -> list[np.ndarray]:
    """Random float64 levels; every entry is at least 0.2 * scale from 0."""
    rng = np.random.RandomState(seed)
    return [scale * rng.choice([-1.0, 1.0], shape) * (0.2 + np.abs(rng.randn(*shape))) for shape in shapes]


def four(seed: int, shapes=SHAPES) -> tuple[list[np.ndarray], ...]:
    """Student features, teacher features, student gradients, teacher gradients."""
    return tuple(pyramid(10 * seed + k, shapes) for k in range(4))


def upstream(seed: int, levels: int, images: int) -> np.ndarray:
    """An (L, N) matrix of different factors."""
    return np.random.RandomState(1000 + seed).uniform(0.3, 1.7, (levels, images))


def tensors(levels: list[np.ndarray], dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[torch.Tensor]:
    """The same numbers as torch tensors."""
    return [torch.tensor(level, dtype=dtype, requires_grad=requires_grad) for level in levels]


def rounded(levels: list[np.ndarray], dtype: torch.dtype) -> list[np.ndarray]:
    """The float64 values that a 16-bit or 32-bit tensor of these numbers holds."""
    return [torch.tensor(level, dtype=dtype).double().numpy() for level in levels]


def box_tensors(boxes=BOXES, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor(np.asarray(one).reshape(-1, 4), dtype=dtype) for one in boxes]
