"""What is tried: values of the large kernels' parameters, and which of their combinations make sense.

A candidate changes the heuristic's parameters; those that are not named here stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch

#: Kernel -> parameter -> values.
PARAMETERS: Mapping[str, Mapping[str, Sequence[int]]] = {
    "reduce": {"PIXELS": (256, 512), "PIECES": (1, 2, 4), "UNROLL": (1, 2, 4, 8), "num_warps": (4, 8)},
    "gradient": {
        "BLOCK_OUTER": (1, 2, 4, 8, 16, 32),
        "BLOCK_INNER": (128, 256, 512),
        "STEPS": (2, 4, 8),
        "BLOCK_FLAT": (512, 1024, 2048),
        "num_warps": (4, 8),
    },
}


def _reduce(chosen: Mapping[str, int], vector: int, last: bool) -> bool:
    """2 to 8 loads of 16 bytes a thread under way, and sums of at most 16 columns in its registers."""
    return 2 <= chosen["PIECES"] * chosen["UNROLL"] <= 8 and chosen["PIECES"] * vector <= 16


def _gradient(chosen: Mapping[str, int], vector: int, last: bool) -> bool:
    """One or two vectors of 16 bytes a thread, one where factors are gathered; a channels_last row is seldom longer than 256."""
    once = 32 * chosen["num_warps"] * vector
    tile = chosen["BLOCK_OUTER"] * chosen["BLOCK_INNER"]
    return tile in (once, 2 * once) and chosen["BLOCK_FLAT"] == once and chosen["BLOCK_INNER"] in _WIDTHS[last]


_WIDTHS = {False: (256, 512), True: (128, 256)}
_SENSIBLE: Mapping[str, Callable[[Mapping[str, int], int, bool], bool]] = {"reduce": _reduce, "gradient": _gradient}


def candidates(kernel: str, dtype: torch.dtype, last: bool) -> list[dict[str, int]]:
    """Changes to the heuristic's parameters that are worth a try, of one type and layout."""
    values = PARAMETERS[kernel]
    every = (dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))
    return [chosen for chosen in every if _SENSIBLE[kernel](chosen, 16 // dtype.itemsize, last)]
