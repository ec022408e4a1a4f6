"""Assertions that name the level and the worst element."""

from __future__ import annotations

import numpy as np
import torch

# float64: the library and the loops do the same operations in another order. A sum of n terms differs by at most about n * 2^-53 of the
# sum of the magnitudes; with n of a few hundred and the quotients of a min-max map that is below 1e-12 of the largest entry.
RTOL64 = 1e-11
# fp32: the same bound with 2^-24 (6e-8): a few hundred terms, cancelling gradients at the minimum and maximum of a map.
RTOL32 = 2e-5
# A gaussian box mask is made in fp32 on purpose: two exponentials, a product and a quotient, each good to 1 to 2 units of 2^-24.
RTOL_MASK = 1e-6


def numbers(value) -> np.ndarray:
    return value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype=np.float64)


def assert_close(got, want, rtol: float = RTOL64, atol: float = 0.0, what: str = "value") -> None:
    """|got - want| <= rtol * (largest |want|) + atol everywhere, and the same shape."""
    a, b = numbers(got), numbers(want)
    assert a.shape == b.shape, f"{what}: shape {a.shape}, wanted {b.shape}"
    if b.size == 0:
        return
    assert np.isfinite(a).all(), f"{what}: not finite: {a}"
    error = np.abs(a - b)
    limit = rtol * np.abs(b).max() + atol
    worst = np.unravel_index(error.argmax(), error.shape)
    where = tuple(int(i) for i in worst)
    assert error.max() <= limit, f"{what} at {where}: got {a[worst]!r}, wanted {b[worst]!r}, error {error.max():.3g} > {limit:.3g}"


def assert_levels_close(got, want, rtol: float = RTOL64, atol: float = 0.0, what: str = "level") -> None:
    """`assert_close` for every level of two pyramids; None counts as zeros (no gradient arrived)."""
    assert len(got) == len(want), f"{what}: {len(got)} levels, wanted {len(want)}"
    for level, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(np.zeros_like(b) if a is None else a, b, rtol, atol, f"{what} {level}")
