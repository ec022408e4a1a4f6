"""`map_distance`: maps only, in fp32 whatever the features are."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import functional

from . import published, vectorised
from .case import Case
from .entry import TOLERANCES, Entry, Inputs
from .settle import settle_maps


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = {
        name: [torch.randn(case.batch, *size, generator=generator).abs().to(device) for size in case.level_sizes] for name in ("m_s", "m_t")
    }
    settle(made)
    return made


def settle(made: Inputs) -> None:
    settle_maps(made["m_s"], made["m_t"])


def eager(m_s: list[Tensor], m_t: list[Tensor]) -> Tensor:
    """(L, N)"""
    rows = [(vectorised.minmax(a) - vectorised.minmax(b)).abs().mean((1, 2)) / a.shape[0] for a, b in zip(m_s, m_t, strict=True)]
    return torch.stack(rows)


def paper(m_s: list[Tensor], m_t: list[Tensor]) -> Tensor:
    """Map by map."""
    rows = []
    for a, b in zip(m_s, m_t, strict=True):
        images = [(published.normalised(x) - published.normalised(y)).abs().sum() for x, y in zip(a, b, strict=True)]
        rows.append(torch.stack(images) / a.numel())
    return torch.stack(rows)


def small_bytes(case: Case, mode: str) -> int:
    """Both maps are read and the (L, N) distances written; with a gradient, their upstream gradient is read and a map written."""
    maps, rows = 4 * case.batch * case.pixels, 4 * case.batch * len(case.level_sizes)
    return 2 * maps + rows if mode == "forward" else 3 * maps + 2 * rows


ENTRIES = (
    Entry(
        name="map_distance",
        kind="primitive",
        inputs=inputs,
        call=functional.map_distance,
        eager=eager,
        paper=paper,
        # No pyramid is touched. A map (at most 269 kB) stays in a cache between its extrema and its normalisation.
        units={"forward": 0, "backward": 0, "backward_scaled": 0},
        small_bytes=small_bytes,
        differentiable="m_s",
        tolerances={dtype: TOLERANCES["fp32"] for dtype in TOLERANCES},
        settle=settle,
    ),
)
