"""The read pass against sums in float64: every output alone and together, layouts, strides, tile sizes, what is not finite."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from triton_support import DEVICES, DTYPES, LAYOUTS, poisoned, pyramid, relative_error

from kdkernels.pyramid import unpack
from kdkernels.triton import launch
from kdkernels.triton.channel_sums import ChannelParts, channel_sums
from kdkernels.triton.reduce import reduce

#: Two bands; odd sizes; aligned rows; one element.
SHAPES = [(2, 20, 14, 19), (2, 3, 7, 11), (2, 16, 4, 8), (2, 1, 1, 1)]
OUTPUTS = ("raw", "absolute", "error", "channel")
TOLERANCE = 1e-6


def _vectors(x, seed, device="cpu"):
    """Packed (N, C) of random numbers."""
    return torch.randn(sum(level.shape[0] * level.shape[1] for level in x), generator=torch.Generator().manual_seed(seed)).to(device)


def _factors(packed, x):
    return [w[:, :, None, None] for w in unpack(packed.double(), [level.shape[:2] for level in x])]


def _packed(levels):
    return torch.cat([level.reshape(-1) for level in levels])


def _expected(x, target, weights, error_channel=None, absolute=False, channel="abs"):
    """Float64 sums by the names of the outputs."""
    doubles = [level.double() for level in x]
    squares = [(s - t.double()) ** 2 for s, t in zip(doubles, target, strict=True)]
    if error_channel is not None:
        squares = [square * e for square, e in zip(squares, _factors(error_channel, x), strict=True)]
    return {
        "raw": _packed([((s.abs() if absolute else s) * w).sum(1) for s, w in zip(doubles, _factors(weights, x), strict=True)]),
        "absolute": _packed([s.abs().sum(1) for s in doubles]),
        "error": _packed([square.sum(1) for square in squares]),
        "channel": _packed([(s.abs() if channel == "abs" else s).sum((2, 3)) for s in doubles]),
    }


def _arguments(outputs, x, target, weights, channel="abs"):
    """The arguments of `reduce` that ask for these outputs."""
    every = {"raw": ("weights", weights), "absolute": ("spatial_abs", True), "error": ("target", target), "channel": ("channel", channel)}
    return dict(every[name] for name in outputs)


def _sums(x, **arguments):
    """The outputs by name, channel sums added up; outputs begin as NaN."""
    with poisoned():
        sums = reduce(x, **arguments)._asdict()
        if sums["channel"] is not None:
            channels = [level.shape[1] for level in x]
            sums["channel"] = channel_sums(sums["channel"], channels, [1] * len(x))
    return sums


def _compare(x, target, weights, outputs=OUTPUTS, channel="abs", error_channel=None, absolute=False):
    """The largest relative error of the outputs asked for; the others must be absent."""
    arguments = _arguments(outputs, x, target, weights, channel)
    got = _sums(x, **arguments, error_channel=error_channel, absolute=absolute)
    want = _expected(x, target, weights, error_channel, absolute, channel)
    assert {name for name, value in got.items() if value is not None} == set(outputs)
    return max(relative_error(got[name], want[name]) for name in outputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_everything_from_one_read(dtype, layout, device):
    x, target = (pyramid(SHAPES, dtype, layout, seed, device) for seed in (1, 2))
    weights, error_channel = _vectors(x, 3, device), _vectors(x, 4, device)
    assert _compare(x, target, weights, error_channel=error_channel) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [c for k in (1, 2, 3) for c in itertools.combinations(OUTPUTS, k)], ids="+".join)
def test_outputs_that_were_not_asked_for(outputs, layout, device):
    x, target = (pyramid(SHAPES[1:3], torch.bfloat16, layout, seed, device) for seed in (1, 2))
    assert _compare(x, target, _vectors(x, 3, device), outputs, channel="signed", absolute=True) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(16))
def test_any_shape(seed, device):
    """Without hypothesis, which GPU machines may lack."""
    draw = random.Random(seed)
    images, layout, dtype, target_dtype = draw.choice([1, 2]), *(draw.choice(list(values)) for values in (LAYOUTS, DTYPES, DTYPES))
    shapes = [(images, draw.randint(1, 20), draw.randint(1, 14), draw.randint(1, 19)) for _ in range(draw.randint(1, 3))]
    x, target = (pyramid(shapes, DTYPES[name], layout, seed, device) for name in (dtype, target_dtype))
    error_channel = draw.choice([None, _vectors(x, 4, device)])
    assert _compare(x, target, _vectors(x, 3, device), absolute=draw.random() < 0.5, error_channel=error_channel) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, device):
    """A slice with gaps, the other layout, and a dense level that begins at an odd address, next to a target in a layout of its own."""
    other = next(name for name in LAYOUTS if name != layout)
    largest, shorter, moved = pyramid([(2, 8, 8, 9), (2, 6, 10, 4), (2, 8, 3, 8)], torch.bfloat16, layout, 1, device)
    turned = pyramid([(2, 5, 4, 6)], torch.bfloat16, other, 2, device)[0]
    moved = moved.new_empty(moved.numel() + 1)[1:].view(moved.shape).copy_(moved)
    x = [largest, shorter[:, 1:5, 2:8], turned, moved]
    target = pyramid([level.shape for level in x], torch.float32, other, 4, device)
    assert _compare(x, target, _vectors(x, 5, device)) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_levels_than_a_launch_takes(layout, device):
    """Seven levels, not in the order of their sizes, of channels that channels_last launches apart."""
    shapes = [(2, c, 3, w) for w, c in enumerate((3, 70, 8, 130, 1, 64, 5), 1)]
    x, target = (pyramid(shapes, torch.float32, layout, seed, device) for seed in (1, 2))
    assert _compare(x, target, _vectors(x, 3, device)) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", [{"PIXELS": 64, "PIECES": 2, "UNROLL": 1}, {"PIXELS": 512, "PIECES": 4, "num_warps": 4}], ids=str)
def test_tile_sizes(changes, layout, device):
    x, target = (pyramid(SHAPES, torch.float32, layout, seed, device) for seed in (1, 2))
    with launch.override("reduce", changes) as used:
        assert _compare(x, target, _vectors(x, 3, device)) < TOLERANCE
        assert used["PIECES"] == changes["PIECES"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_what_depends_on_it(poison, layout, device):
    x, target = (pyramid(SHAPES[:2], torch.bfloat16, layout, seed, device) for seed in (1, 2))
    weights = _vectors(x, 3, device)
    weights[20:40] = 0  # image 1 of level 0
    x[0][1, 7, 13, 18] = poison
    got = _sums(x, **_arguments(OUTPUTS, x, target, weights))
    hit = torch.zeros(sum(level[:, 0].numel() for level in x), dtype=torch.bool)
    hit[2 * 14 * 19 - 1] = True
    for name in ("raw", "absolute", "error"):
        assert torch.equal(~got[name].isfinite().cpu(), hit), name
    assert (~got["channel"].isfinite()).nonzero().flatten().tolist() == [20 + 7]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_bit_equal(layout, device):
    x, target = (pyramid(SHAPES, torch.float16, layout, seed, device) for seed in (1, 2))
    first, second = (_sums(x, **_arguments(OUTPUTS, x, target, _vectors(x, 3, device))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in OUTPUTS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_images(layout, device):
    x = pyramid([(0, 4, 3, 5), (0, 2, 1, 1)], torch.float16, layout, device=device)
    got = _sums(x, **_arguments(OUTPUTS, x, x, _vectors(x, 1, device)))
    assert [got[name].shape for name in OUTPUTS] == [(0,)] * 4


@pytest.mark.parametrize("device", DEVICES)
def test_channel_sums_of_many_bands(device):
    """More bands than a program takes at a time, more channels than it is wide, seven levels."""
    images, tiles, channels, divisors = 2, (130, 1, 64, 65, 3, 2, 1), (40, 3, 1, 32, 33, 5, 64), (7, 1, 2, 3, 1000, 1, 9)
    parts = pyramid([(images, t, c) for t, c in zip(tiles, channels, strict=True)], device=device)
    with poisoned():
        got = channel_sums(ChannelParts(_packed(parts), tiles), channels, divisors)
    want = _packed([part.double().sum(1) / divisor for part, divisor in zip(parts, divisors, strict=True)])
    assert got.shape == (images * sum(channels),) and relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_parts_are_small(layout, device):
    x = torch.ones(1, 16, 32, 32, dtype=torch.bfloat16, device=device).contiguous(memory_format=layout)
    parts = reduce([x], channel="abs").channel
    assert parts.parts.tolist() == [256.0] * (4 * 16) and parts.tiles == (4,)
    assert parts.parts.nbytes < 0.01 * x.nbytes


@pytest.mark.parametrize("device", DEVICES)
def test_more_channels_than_a_program_holds(device):
    """Beside a level that alone would be read as channels_last."""
    x, target = (pyramid([(1, 4097, 3, 1), (1, 40, 25, 42)], torch.float32, "channels_last", seed, device) for seed in (1, 2))
    assert _compare(x, target, _vectors(x, 3, device)) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_detector_s_pyramid(dtype, layout):
    shapes = [(2, 256, 100, 168), (2, 256, 50, 84), (2, 256, 25, 42), (2, 256, 13, 21), (2, 2048, 7, 11)]
    x, target = (pyramid(shapes, dtype, layout, seed, "cuda") for seed in (1, 2))
    assert _compare(x, target, _vectors(x, 3, "cuda"), error_channel=_vectors(x, 4, "cuda"), absolute=True) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_more_elements_than_32_bits_count(layout):
    x = torch.empty(3, 256, 1700, 1700, dtype=torch.bfloat16, device="cuda", memory_format=layout)
    for image in range(3):
        x[image] = image
    sums = reduce([x], spatial_abs=True, channel="abs")
    means = channel_sums(sums.channel, [256], [1700 * 1700])
    assert torch.equal(sums.absolute.view(3, -1), torch.tensor([[0.0], [256.0], [512.0]], device="cuda").expand(3, 1700 * 1700))
    assert relative_error(means, torch.arange(3).repeat_interleave(256)) < TOLERANCE
