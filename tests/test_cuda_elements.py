"""The inner functions of the CUDA kernels, compiled for the CPU: rows in vectors of 16 bytes, sums over threads, levels of a launch.

Levels lie in memory of their exact size: a read beyond it fails, a byte written around it is seen.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from emulation import emulated
from levels import DTYPES
from native_support import same_bits
from toolchain import needs_compiler
from torch import Tensor

pytestmark = needs_compiler
#: Threads of each of the two blocks that call a function together.
THREADS = 96
ROWS = 3
NAMES = [*((name, False) for name in DTYPES), *((name, True) for name in DTYPES)]
#: Each bit pattern that a 16-bit type has.
PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def to_bytes(x: Tensor) -> bytes:
    return bytes(x.contiguous().view(torch.uint8).numpy())


def to_floats(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def lengths(span: int) -> list[int]:
    """Row lengths: all short ones, and those around one and two warps' elements."""
    return [*range(1, 19), 31, 32, 33, 36, *(k * span + more for k in (1, 2) for more in (-9, -4, -1, 0, 1, 4, 7, 8))]


def levels(emulator, dtype, span):
    """Random levels of ROWS rows of every length, beginning at every place within 16 bytes that an element may have: memory and values."""
    generator = torch.Generator().manual_seed(0)
    for length, slack in itertools.product(lengths(span), range(0, 16, dtype.itemsize)):
        values = torch.randn(ROWS, length, generator=generator).to(dtype)
        yield emulator.Guarded(to_bytes(values), slack), values


def vectors_around(memory, at: int, size: int) -> int:
    """Aligned 16 bytes around `size` bytes from `at` on, and one more, that lie in the memory."""
    first = at - (memory.misalignment + at) % 16
    return sum(begin >= 0 and begin + 16 <= len(memory.bytes()) for begin in range(first, first + size + 16, 16))


@pytest.mark.parametrize(("name", "any_type"), NAMES)
def test_rows_are_loaded_as_they_are(name, any_type):
    seen = set()
    with emulated() as emulator:
        span = emulator.span(any_type or name != "fp32")
        for memory, values in levels(emulator, DTYPES[name], span):
            length, size = values.shape[1], values.element_size()
            for number in range(ROWS):
                emulator.reset_counts()
                got = to_floats(emulator.load_row(memory, name, any_type, length, number))
                where = f"row {number} of {length} elements, {memory.misalignment} bytes into a vector"
                assert torch.equal(got[:length], values[number].float()), where
                assert not got[length:].any(), f"{where}: something behind the row"
                # Vectors that lie in the memory are all that a thread may read: no more, though a part of it would be its own.
                width = span // 32
                inside = sum(vectors_around(memory, (number * length + i) * size, width * size) for i in range(0, length, width))
                assert emulator.counts()["bytes_read"] <= 16 * inside, f"{where}: a vector that is only in part the level's"
            seen.add(memory.misalignment)
    assert seen == set(range(0, 16, size))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "any_type"), NAMES)
def test_rows_are_stored_and_nothing_beside_them(name, any_type, seed):
    """Nor does a block of a row disturb what the next one has stored already."""
    stored = 0
    with emulated(seed) as emulator:
        span = emulator.span(any_type or name != "fp32")
        for memory, values in levels(emulator, DTYPES[name], span):
            length, number = values.shape[1], (values.shape[1] + memory.misalignment) % ROWS
            beyond = torch.randn(-(-length // span) * span)
            emulator.store_row(memory, name, any_type, length, number, to_bytes(beyond))
            want = values.clone()
            want[number] = beyond[:length].to(want.dtype)
            where = f"row {number} of {length} elements, {memory.misalignment} bytes into a vector"
            assert memory.bytes() == to_bytes(want), where
            assert memory.intact(), f"{where}: written outside of the level"
            stored += 1
    assert stored == len(lengths(span)) * 16 // values.element_size()


def test_what_lies_outside_of_the_memory_fails():
    with emulated() as emulator:
        memory = emulator.Guarded(bytes(range(40)))
        assert [memory.at(place) for place in (0, 39)] == [0, 39] and memory.misalignment == 8
        for _ in range(2):
            with pytest.raises(IndexError):
                memory.at(40)
        # A level of one row more than there is memory for.
        with pytest.raises(IndexError):
            emulator.load_row(memory, "fp32", False, 5, 2)
        with pytest.raises(IndexError):
            emulator.store_row(memory, "fp16", False, 10, 2, to_bytes(torch.zeros(256)))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_every_number_of_16_bits_becomes_fp32_and_comes_back(name):
    values = PATTERNS.view(DTYPES[name])
    with emulated() as emulator:
        wide = to_floats(emulator.widen(name, to_bytes(values)))
        assert same_bits(wide, values.float())
        back = torch.frombuffer(bytearray(emulator.narrow(name, to_bytes(wide))), dtype=DTYPES[name])
    assert same_bits(back, values)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_fp32_is_rounded_to_the_nearest_and_ties_to_the_even_one(name):
    """Around every number of the type: the middle to the next one, and a little to both sides of it."""
    values = PATTERNS.view(DTYPES[name])
    values = values[values.isfinite()].float().sort().values
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    edges = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 3.4028234e38, 1e-45, -1e-45, 2e-8, 3e-8, 6e-8]
    )
    given = torch.cat([middles, *(torch.nextafter(middles, torch.full_like(middles, end)) for end in (-torch.inf, torch.inf)), edges])
    given = torch.cat([given, given[: given.numel() % 2]])
    with emulated() as emulator:
        got = torch.frombuffer(bytearray(emulator.narrow(name, to_bytes(given))), dtype=DTYPES[name])
    want = given.to(DTYPES[name])
    assert same_bits(got, want) and torch.equal(got.signbit()[~got.isnan()], want.signbit()[~want.isnan()])


def test_words_shifted_by_bytes():
    data = bytes(range(1, 49))
    with emulated() as emulator:
        assert emulator.funnel(0x03020100, 0x07060504, 0) == 0x03020100
        assert emulator.funnel(0x03020100, 0x07060504, 16) == 0x05040302
        for kept, shift in itertools.product((4, 8), range(0, 16, 2)):
            words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, 4 * kept + 16, 4)]
            got = b"".join(word.to_bytes(4, "little") for word in emulator.shift_down(words, shift))
            assert got == data[shift : shift + 4 * kept], (kept, shift)


def test_blocks_find_their_levels():
    blocks = [3, 1, 0, 5, 2, 7, 1, 1, 4, 0, 2, 1, 1, 1, 1, 1, 9, 3]
    with emulated() as emulator:
        for images in (1, 3):
            launches = emulator.launches(images, blocks)
            assert [len(launch) for launch in launches] == [images * sum(blocks[i : i + 8]) for i in (0, 8, 16)]
            want = [(level, block) for level, count in enumerate(blocks) for block in range(images * count)]
            assert [one for launch in launches for one in launch] == want
        assert emulator.launches(0, blocks) == [] and emulator.launches(2, []) == []


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_sums_over_threads(seed):
    """Each thread finds the same, in any order of the threads; of whole numbers exactly their sum."""
    of_thread = torch.randint(-1000, 1000, (THREADS, 4)).float()
    random = torch.randn(THREADS)
    with emulated(seed) as emulator:
        sums = to_floats(emulator.warp_sums(to_bytes(of_thread))).view(2, 3, 4, 8)
        assert torch.equal(sums, of_thread.view(3, 32, 4).sum(1)[None, :, :, None].expand(2, 3, 4, 8))
        for x in (of_thread[:, 0], random):
            warp, block = (to_floats(run(to_bytes(x))).view(2, 3, 32) for run in (emulator.warp_sum, emulator.block_sum))
            assert torch.equal(warp, warp[:1, :, :1].expand_as(warp)) and torch.equal(block, block[0, 0, 0].expand_as(block))
            torch.testing.assert_close(warp[0, :, 0], x.view(3, 32).sum(1))
            torch.testing.assert_close(block[0, 0, 0], x.sum())
        bits = to_floats(emulator.block_sum(to_bytes(random)))
    with emulated() as emulator:
        assert torch.equal(bits, to_floats(emulator.block_sum(to_bytes(random))))


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_threads_of_a_warp_exchange_numbers(seed):
    x = torch.randn(THREADS)
    lane = torch.arange(32)
    with emulated(seed) as emulator:
        for mask in (1, 2, 16, 31):
            got = to_floats(emulator.across(to_bytes(x), mask)).view(2, 3, 32)
            assert torch.equal(got, x.view(3, 32)[:, lane ^ mask].expand(2, 3, 32)), mask
        for by in (1, 4):
            got = to_floats(emulator.up(to_bytes(x), by)).view(2, 3, 32)
            assert torch.equal(got, x.view(3, 32)[:, torch.where(lane < by, lane, lane - by)].expand(2, 3, 32)), by


def test_a_missing_sync_is_found():
    """Without it a thread may be before its neighbour: it reads what nobody has written, which is NaN, and the order decides who does."""
    x = torch.randn(THREADS)
    found = {}
    for seed, sync in itertools.product((0, 1, 2, 3), (True, False)):
        with emulated(seed) as emulator:
            found[seed, sync] = to_floats(emulator.next_of_block(to_bytes(x), sync)).view(2, THREADS)
    for seed in (0, 1, 2, 3):
        assert torch.equal(found[seed, True], x.roll(-1).expand(2, THREADS)), seed
        assert bool(found[seed, False].isnan().any()), seed
    assert len({to_bytes(found[seed, False].isnan()) for seed in (0, 1, 2, 3)}) == 4


def test_blocks_that_wait_for_each_other():
    for processors, most in ((1, 5), (3, 5), (8, 5)):
        with emulated(2, processors) as emulator:
            emulator.reset_counts()
            assert emulator.meeting(most) == min(processors, most) == emulator.counts()["blocks"]
