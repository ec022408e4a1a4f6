"""The bandwidth that everything is measured against: that of a plain copy, on this device, in this run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from .clock import Clock
from .memory import available_bytes, cache_bytes

#: Bytes of the buffer at the least: a GPU moves less in no time worth timing.
LEAST = {"cpu": 128 << 20, "cuda": 1 << 30}
WARM = 5


class Copy:
    """`torch.Tensor.copy_` of a buffer of four times the last-level cache or more, to be timed in turns with whoever is held against it:
    on a machine with neighbours the bandwidth of one second is not that of the next."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        size = max(4 * cache_bytes(device), LEAST[device.type])
        available = available_bytes(device)
        if available is not None:
            size = min(size, available // 8)
        # Random: zeros and ones move faster than data does.
        self._source = torch.rand(size // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._clock = clock
        self.measure(WARM)

    def measure(self, calls: int) -> list[float]:
        """Milliseconds of some copies."""
        return self._clock.measure([lambda: self._target.copy_(self._source)] * calls)

    def rate(self, ms: Sequence[float]) -> float:
        """Bytes a second at the median of these times; bytes read and bytes written both count."""
        return 2 * self._source.nbytes / (1e-3 * median(ms))
