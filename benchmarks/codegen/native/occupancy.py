"""How many blocks of a kernel a multiprocessor holds at a time, by the limits of the chip.

The numbers are those of "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide, the units of allocation
those of the toolkit's cuda_occupancy.h, whose arithmetic this is.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
#: Of every chip below: registers of a multiprocessor, which lie in four parts; registers that a warp gets at a time; the most warps and
#: blocks of a multiprocessor; bytes of shared memory that a block gets at a time, and those that CUDA itself takes of every block.
REGISTERS, PARTS, REGISTER_UNIT = 65536, 4, 256
WARPS, BLOCKS = 64, 32
SHARED_UNIT, SHARED_RESERVED = 128, 1024
#: Compute capability -> bytes of shared memory of a multiprocessor.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Occupancy:
    """blocks: of a multiprocessor;   warps: in per cent of those that it can hold;   limits: what keeps more from fitting"""

    blocks: int
    warps: float
    limits: tuple[str, ...]


def occupancy(capability: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Of a kernel with so many threads a block, registers a thread and bytes of shared memory a block, on a chip of `SHARED`."""
    warps = -(-threads // WARP)
    of_warp = _rounded_up(registers * WARP, REGISTER_UNIT)
    fitting = {
        "registers": REGISTERS // PARTS // of_warp * PARTS // warps if of_warp else BLOCKS,
        "shared memory": SHARED[capability] // _rounded_up(shared + SHARED_RESERVED, SHARED_UNIT),
        "threads": WARPS // warps,
        "blocks": BLOCKS,
    }
    # A launch is checked as if its warps were dealt out to all parts evenly.
    if of_warp * _rounded_up(warps, PARTS) > REGISTERS:
        fitting["registers"] = 0
    blocks = min(fitting.values())
    return Occupancy(blocks, 100 * blocks * warps / WARPS, tuple(name for name, most in fitting.items() if most == blocks))


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
