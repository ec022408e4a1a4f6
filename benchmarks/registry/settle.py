"""Random inputs, moved off the points where a gradient jumps.

GKD's and BMFI's gradients have signs and extrema in them: sign of the map before |.|, the cells that are a map's minimum and maximum,
sign(M_S - M_T), the signs of the attentions' differences. Among 10^5 random cells some lie so close to such a point that fp32 and fp64
rightly differ, and one cell on the other side is 1 % of a level's gradient (a minimum: all of it). The gate would have to be blind to
errors of that size. Instead those few cells get other values: every cell is then farther from a jump than fp32 errs, by a factor of 10.

Written through `.data`: a sample's `_version` must not betray to a provider that its contents are new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .entry import Inputs
from .vectorised import attention, channel_sum, channel_weights, minmax

#: Least distances: of map values, in units of the map's range; of attentions, whose mean is 1.
MAP_MARGIN, ATTENTION_MARGIN = 3e-5, 5e-6
#: Of what a ReLU gets, and of two logits.
RECTIFIED_MARGIN, NUMBER_MARGIN = 5e-6, 1e-4
#: From 0, where the extrema themselves are results: a sum close to 0 has a large relative error, and a minimum is the closest.
SUM_MARGIN = 1e-2
ROUNDS = 100
#: Both exact in all types. A maximum where the other map has its own leaves only by shrinking.
FACTOR, SHRINKING, GROWING = 1.0625, 0.9375, 8


def settle_student(inputs: Inputs, maps: bool, attentions: bool, released: bool = False) -> None:
    """The student's features of a method whose gradient goes through GKD's maps, BMFI's attentions or both.

    released: the maps are those of GKD's released code, of absolute features and gradients.
    """
    for level, (s, t) in enumerate(zip(inputs["student_features"], inputs["teacher_features"], strict=True)):
        tests = [_attention_test(*attention(t))] if attentions else []
        if maps:
            value = torch.abs if released else torch.Tensor.detach
            weight, other = (channel_weights(value(inputs[f"{who}_gradients"][level])) for who in ("student", "teacher"))
            tests.append(_map_test(weight, minmax(channel_sum(value(t), other).abs()), value=value))
        _settle(s, tests)


def settle_features(features: list[Tensor], weights: list[Tensor]) -> None:
    """Features of `weighted_channel_sum`: the signs of its sums, and its extrema."""
    for x, weight in zip(features, weights, strict=True):
        _settle(x, [_map_test(weight, None, SUM_MARGIN)])


@torch.no_grad()
def settle_maps(m_s: list[Tensor], m_t: list[Tensor]) -> None:
    """Maps (N, H, W) of `map_distance`."""
    for r, other in zip((x.data for x in m_s), m_t, strict=True):
        target = minmax(other)
        low, high = r.amin(), r.amax()
        for k in range(ROUNDS):
            bad = near_extremum(r) | ((minmax(r) - target).abs() < MAP_MARGIN)
            if not bad.any():
                break
            # Half way to another place of the range each time: a maximum where the other map has its own must be left as well.
            r.copy_(torch.where(bad, (r + torch.lerp(low, high, 0.618 * k % 1)) / 2, r))
        else:
            raise RuntimeError(f"a map of shape {tuple(r.shape)} stays at a point where the gradient jumps")


def settle_rectified(features: list[Tensor], convolutions: Iterable[Callable[[Tensor], Tensor]]) -> None:
    """Features whose convolutions of 3 x 3 cells meet a ReLU: the signs of what these make, numbers of size 1."""
    for x, convolution in zip(features, convolutions, strict=True):
        _settle(x, [_sign_test(convolution)])


@torch.no_grad()
def settle_numbers(values: list[Tensor], others: list[Tensor]) -> None:
    """Numbers of size 1 whose difference's sign counts. Equal ones stay: they are so in every type, and 0 has no sign."""
    for x, other in zip((x.data for x in values), others, strict=True):
        apart = (x.double() - other).abs()
        x.copy_(torch.where((apart > 0) & (apart < NUMBER_MARGIN), other + 0.125, x))


def near_extremum(r: Tensor) -> Tensor:
    """(N, H, W): cells that nearly are their map's minimum or maximum."""
    flat = r.flatten(1)
    low, high = flat.min(1, keepdim=True), flat.max(1, keepdim=True)
    margin = MAP_MARGIN * (high.values - low.values)
    near = (flat < low.values + margin) | (flat > high.values - margin)
    near = near.scatter(1, torch.cat([low.indices, high.indices], 1), False)
    return near.view_as(r)


#: What is to be changed: cells (N, H, W) and channels (N, C), or None.
Test = Callable[[Tensor], "tuple[Tensor, Tensor | None]"]


def _map_test(
    weight: Tensor, target: Tensor | None, zero: float = MAP_MARGIN, value: Callable[[Tensor], Tensor] = torch.Tensor.detach
) -> Test:
    def test(x: Tensor) -> tuple[Tensor, None]:
        r = channel_sum(value(x), weight).abs()
        span = r.amax((1, 2), keepdim=True) - r.amin((1, 2), keepdim=True)
        bad = near_extremum(r) | (r < zero * span)
        return bad if target is None else bad | ((minmax(r) - target).abs() < MAP_MARGIN), None

    return test


def _attention_test(target_spatial: Tensor, target_channel: Tensor) -> Test:
    def test(x: Tensor) -> tuple[Tensor, Tensor]:
        spatial, channel = attention(x)
        return (spatial - target_spatial).abs() < ATTENTION_MARGIN, (channel - target_channel).abs() < ATTENTION_MARGIN

    return test


def _sign_test(convolution: Callable[[Tensor], Tensor]) -> Test:
    def test(x: Tensor) -> tuple[Tensor, None]:
        near = (convolution(x.float()).abs() < RECTIFIED_MARGIN).any(1, keepdim=True)
        # The neighbours too: a masked cell may be what changes nothing.
        return F.max_pool2d(near.float(), 3, 1, 1)[:, 0] > 0, None

    return test


@torch.no_grad()
def _settle(x: Tensor, tests: list[Test]) -> None:
    x = x.data
    cells = x.permute(0, 2, 3, 1)
    for k in range(ROUNDS):
        bad = torch.zeros_like(cells[..., 0], dtype=torch.bool)
        for test in tests:
            found, channels = test(x)
            if channels is not None and channels.any():
                # Channels first: one of them moves every cell.
                x[channels] *= FACTOR
                break
            bad |= found
        else:
            if not bad.any():
                return
            # Other channels' values make another sum; the factor makes another mean of |x|.
            cells[bad] = cells[bad].roll(1, 1) * (FACTOR if k < GROWING else SHRINKING)
    raise RuntimeError(f"features of shape {tuple(x.shape)} stay at a point where the gradient jumps")
