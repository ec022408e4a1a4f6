"""Levels of more than 2^31 elements, of which there is hardly any memory: what comes before the last elements is one piece of it."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
from collections.abc import Iterator

import pytest
import torch
from levels import relative_error
from native_support import needs_library
from torch import Tensor

pytestmark = needs_library
#: Elements, of two bytes, before those that are looked at: their offsets need more than 32 bits, in bytes and in elements.
BEFORE = 1 << 31
#: Bytes of a piece.
PIECE = 1 << 24
HEIGHT, WIDTH, CHANNELS = 64, 128, 1024
#: Name -> shape, memory format and how much of which axis is behind BEFORE: an image, channels, rows of pixels.
LARGE = {
    "many images": ((257, CHANNELS, HEIGHT, WIDTH), torch.contiguous_format, (0, 1)),
    "many channels": ((1, (1 << 18) + CHANNELS, HEIGHT, WIDTH), torch.contiguous_format, (1, CHANNELS)),
    "many pixels, channels_last": ((1, CHANNELS, (1 << 14) + HEIGHT, WIDTH), torch.channels_last, (2, HEIGHT)),
}


def last(x: Tensor, name: str) -> Tensor:
    """Of a level of such a shape what is behind BEFORE: (1, CHANNELS, HEIGHT, WIDTH)."""
    axis, count = LARGE[name][2]
    return x.narrow(axis, x.shape[axis] - count, count)


def large(name: str, seed: int | None = None) -> Tensor:
    """A bf16 level: 0, and behind BEFORE random. What is before is the same PIECE bytes over and over, mapped to many addresses."""
    shape, memory_format, _ = LARGE[name]
    count = torch.Size(shape).numel()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    memory = mmap.mmap(-1, 2 * count)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    flags = mmap.MAP_SHARED | 0x10  # MAP_FIXED, in the place of what is mapped there
    with tempfile.TemporaryFile() as file:
        file.truncate(PIECE)
        for address in range(begin, begin + 2 * BEFORE, PIECE):
            assert libc.mmap(address, PIECE, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fileno(), 0) == address
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    n, c, h, w = shape
    level = flat.view(n, h, w, c).permute(0, 3, 1, 2) if memory_format == torch.channels_last else flat.view(shape)
    assert level.is_contiguous(memory_format=memory_format) and last(level, name).shape == (1, CHANNELS, HEIGHT, WIDTH)
    if seed is not None:
        last(level, name).copy_(torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return level


@pytest.fixture(scope="module", params=LARGE)
def named(request: pytest.FixtureRequest) -> Iterator[tuple[str, Tensor]]:
    """A large level and its name."""
    yield request.param, large(request.param, 0)


def test_sums_over_channels_and_over_pixels_are_of_the_last_elements(named: tuple[str, Tensor]) -> None:
    name, x = named
    n, c, h, w = x.shape
    weights = torch.randn(n, c)
    raw, _, channel = torch.ops.kdkernels.shared_read("native", [x], weights.flatten(), True, 0.5)
    means = torch.ops.kdkernels.channel_mean("native", [x], True).view(n, c)[-1, -CHANNELS:]
    magnitudes = last(x, name)[0].abs().double()
    maps = torch.einsum("chw,c->hw", magnitudes, weights[-1, -CHANNELS:].double())
    assert relative_error(raw.view(n, h, w)[-1, -HEIGHT:], maps) < 2e-5
    assert relative_error(means, magnitudes.sum((1, 2)) / (h * w)) < 2e-5
    factor = 1 / (0.5 * h * w)
    # Those of channels that are 0 among them, whose exponential is 1.
    exponentials = (magnitudes.sum((1, 2)) * factor).exp()
    assert relative_error(channel.view(n, c)[-1, -CHANNELS:], c * exponentials / (exponentials.sum() + c - CHANNELS)) < 2e-5


def test_imitation_and_its_gradient_are_of_the_last_elements(named: tuple[str, Tensor]) -> None:
    name, s = named
    t, gradient = large(name, 1), large(name)
    n, c, h, w = s.shape
    channel, spatial = torch.rand(n, c), torch.rand(n, h, w)
    operands = ([s], [t], None, None, None, None, None, channel.flatten(), [spatial.flatten()], None)
    arguments = (*operands, False, "abs", "minmax", "minmax", "l1", 1e-6, True, 1.0, "nhw", 0.5, 1, [1.0])
    rows, *saved = torch.ops.kdkernels.terms("native", *arguments)
    upstream = torch.zeros(1, 1, n)
    upstream[..., -1] = 3.0
    torch.ops.kdkernels.terms_correct_gradient("native", [gradient], upstream, saved, *arguments)
    difference = (last(s, name).double() - last(t, name).double())[0]
    factors = channel[-1, -CHANNELS:, None, None].double() * spatial[-1, -HEIGHT:].double()
    assert relative_error(rows[0, 0, -1], (factors * difference.square()).sum()) < 2e-5
    assert relative_error(last(gradient, name)[0], 2 * 3 * factors * difference) < 4e-3
