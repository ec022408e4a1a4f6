"""Whether a result is the oracle's: what every number that gets a time is held to.

Relative L2 error alone is blind: GKD's gradient at the pixels of a map's minimum and maximum is a hundred times that of the others, and two
pixels hide the rest. So of every result, for example the gradient of a level,

- the L2 error of the bulk, all but the largest `EXTREMES` of the elements, is within the tolerance;
- every single element is within `ELEMENT` tolerances of |want| + the bulk's root mean square, or that of its own pixel's channels if
  it is larger: at the pixel of an extremum, a channel whose weight is a sum that nearly cancels has the rounding of the others;
- of every image the two pixels that are farthest off are held against its largest pixel: the gradient at a map's minimum and maximum is a
  sum over the whole map, a thousand times that of other pixels, and where it happens to cancel its rounding remains.

There are no exceptions for signs that flip where a gradient jumps: `Entry.settle` keeps inputs away from there. What the result's own type
cannot hold (a rounding to its smallest number; inline, one rounding of the sum) is no error.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

EXTREMES = 1e-3
#: Pixels of a map's minimum and maximum.
EXTREMA = 2
ELEMENT = 10.0
#: What the bulk is like is read off so many elements, evenly spaced.
_SAMPLED = 1 << 17
#: Elements compared at a time: their float64 temporaries stay in a cache.
_CHUNK = 1 << 19


class Agreement(NamedTuple):
    """reason: "" or what is wrong;   error: relative L2 error of the bulk, None if it says nothing"""

    reason: str
    error: float | None


class Bulk(NamedTuple):
    """All elements but the largest.   limit: the largest magnitude that still belongs to it;   typical: root mean square of it"""

    limit: float
    typical: float


def agree(got: Tensor, want: Tensor, tolerance: float, arriving: Tensor | None = None) -> Agreement:
    """`got` against float64 `want` of the same shape; inline: both hold `arriving` too, and what is compared is the rest.

    Raises nothing; NaN and infinity in `got` are errors unless `want` is beyond what the type of `got` can hold.
    """
    own = want if arriving is None else want - arriving.double()
    bulk = bulk_of(own)
    scale = _scale(own, got.double() - want, bulk)
    total = torch.zeros(5, dtype=torch.float64, device=got.device)
    for chunks in zip(_chunks(got), _chunks(want), _chunks(scale), repeat(None) if arriving is None else _chunks(arriving), strict=False):
        total += _compared(*chunks, bulk, ELEMENT * tolerance)
    broken, infinite, off, error, norm = total.tolist()
    if broken:
        return Agreement("the reference itself is not finite: no verdict", None)
    if infinite:
        return Agreement(f"{infinite:.0f} of {got.numel()} of the elements are NaN or infinite", None)
    relative = 0.0 if error == 0 else (error / norm) ** 0.5 if norm else float("inf")
    reasons = [f"relative error {relative:.1e} is above {tolerance:.0e}"] if relative > tolerance else []
    if off:
        reasons.append(f"{off:.0f} of {got.numel()} of the elements are wrong")
    return Agreement("; ".join(reasons), relative)


def bulk_of(x: Tensor) -> Bulk:
    """What most elements of x are like."""
    size = x.reshape(-1)[:: 1 + x.numel() // _SAMPLED].double().abs()
    few = int(EXTREMES * size.numel())
    if few:
        size = size.sort().values[:-few]
        return Bulk(float(size[-1]), float(size.square().mean().sqrt()))
    return Bulk(float("inf"), float(size.square().mean().sqrt()) if size.numel() else 0.0)


def _scale(own: Tensor, error: Tensor, bulk: Bulk) -> Tensor:
    """What an element is held against besides its own size, of the shape of `own`."""
    typical = own.new_full((), bulk.typical)
    if own.dim() != 4 or own.numel() == 0:
        return typical.expand_as(own)
    pixel, off = (x.masked_fill(~x.isfinite(), 0).square().mean(1).sqrt().flatten(1) for x in (own, error))
    worst = off.topk(min(EXTREMA, off.shape[1]), 1).indices
    largest = pixel.amax(1, keepdim=True).expand_as(worst)
    scale = torch.maximum(pixel.scatter(1, worst, largest), typical)
    return scale.view(own.shape[0], 1, *own.shape[2:]).expand_as(own)


def _compared(got: Tensor, want: Tensor, scale: Tensor, arriving: Tensor | None, bulk: Bulk, allowed: float) -> Tensor:
    """Of a chunk: how many wants are not finite, results not finite, results off; squares of error and want in the bulk."""
    own, got64 = want if arriving is None else want - arriving.double(), got.double()
    error = ((got64 - want).abs_() - _rounding(got, want, arriving)).clamp_(min=0)
    infinite, size = ~got64.isfinite(), own.abs()
    saturated = _saturated(got, got64, want, own)
    if saturated is not None:
        infinite &= ~saturated
        error, size = error.masked_fill_(saturated, 0), size.masked_fill_(saturated, 0)
    off = error > (size + scale).mul_(allowed)
    outside = size > bulk.limit
    squares = [x.masked_fill(outside, 0).square_().sum() for x in (error, size)]
    return torch.stack([(~want.isfinite()).sum(), infinite.sum(), off.sum(), *squares])


def _rounding(got: Tensor, want: Tensor, arriving: Tensor | None) -> Tensor | float:
    """The error that the result's type makes unavoidable: per element, absolute."""
    kind = torch.finfo(got.dtype)
    # Slightly more than half a unit in the last place: the sum that was rounded is not exactly `want`.
    return kind.smallest_normal * kind.eps if arriving is None else 0.501 * kind.eps * want.abs() + kind.smallest_normal * kind.eps


def _saturated(got: Tensor, got64: Tensor, want: Tensor, own: Tensor) -> Tensor | None:
    """Where the right number is too large for fp16, and the result infinite or nearly, as it should be. No other type is so narrow.

    Inline it is enough that d * dKD is too large: added by hand, it has been rounded to the type before.
    """
    if got.dtype != torch.float16:
        return None
    limit = torch.finfo(got.dtype).max
    large = torch.maximum(want.abs(), own.abs()) > 0.99 * limit
    return large & (got64.abs() > 0.98 * limit) & (got64.sign() == own.sign())


def _chunks(x: Tensor) -> Iterator[Tensor]:
    flat = x.reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.numel(), _CHUNK))
