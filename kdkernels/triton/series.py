"""Functions of small numbers to all their digits, in kernels.

Differences of what is nearly equal, sigmas or distributions, come from them.
"""

from __future__ import annotations

import triton


@triton.jit
def log_1_plus(e):
    """log(1 + e) of 0 <= e <= 1 to all its digits: 2 artanh(e / (2 + e)), whose argument is 1/3 at the most."""
    z = e / (2.0 + e)
    y = z * z
    series = 1.0 / 15
    series = series * y + 1.0 / 13
    series = series * y + 1.0 / 11
    series = series * y + 1.0 / 9
    series = series * y + 1.0 / 7
    series = series * y + 1.0 / 5
    series = series * y + 1.0 / 3
    return 2.0 * (z + z * y * series)


@triton.jit
def second_order(x):
    """exp(-x) - 1 + x of |x| <= 1/2."""
    h = -1.0 / 362880
    h = h * x + 1.0 / 40320
    h = h * x - 1.0 / 5040
    h = h * x + 1.0 / 720
    h = h * x - 1.0 / 120
    h = h * x + 1.0 / 24
    h = h * x - 1.0 / 6
    return x * x * (h * x + 0.5)
