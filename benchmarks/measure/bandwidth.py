"""The bandwidth that everything is measured against: that of a plain copy, on this device, in this run."""

from __future__ import annotations

from statistics import median

import torch

from .clock import Clock
from .memory import available_bytes, cache_bytes

#: A GPU moves less than this in no time worth timing.
LEAST = {"cpu": 128 << 20, "cuda": 1 << 30}
COPIES, WARM = 20, 5


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second of `torch.Tensor.copy_`, bytes read and bytes written both counted; median of 20 copies of a buffer of four times
    the last-level cache or more."""
    size = max(4 * cache_bytes(device), LEAST[device.type])
    available = available_bytes(device)
    if available is not None:
        size = min(size, available // 8)
    # Random: zeros and ones move faster than data does.
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    ms = clock.measure([lambda: target.copy_(source)] * (WARM + COPIES))[WARM:]
    return 2 * source.nbytes / (1e-3 * median(ms))
