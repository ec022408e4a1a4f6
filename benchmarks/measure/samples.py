"""The inputs of a cell: enough of them that no cache holds what a call will read."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..call import Sample, sample
from ..providers import reference_of
from ..registry import DTYPES, Case, Entry, flat
from .contents import tensors
from .memory import available_bytes, cache_bytes

#: Of tiny inputs, so many; three times a large cache of them would be hundreds of thousands.
MOST_SAMPLES = 512
#: float64 copies of a sample that the gate needs at a time: inputs, what the oracle keeps for its backward pass, answers that are kept.
ORACLE_COPIES = 9


def nbytes(sample: Sample) -> int:
    """Bytes of all tensors of a sample, each counted once."""
    return sum(x.nbytes for x in tensors(sample))


def needed_bytes(entry: Entry, case: Case, device: torch.device) -> int:
    """What a cell takes at the most, from the inputs of a small case: its samples, and the oracle in float64."""
    small = replace(case, pyramid="tiny", batch=1)
    inputs = entry.inputs(small, torch.Generator().manual_seed(0), torch.device("cpu"))
    # Every method's inline mode has the arriving gradients besides, if they are not among its inputs.
    one = round((nbytes(Sample(inputs)) + small.unit) * case.unit / small.unit)
    wide = one * torch.float64.itemsize // DTYPES[case.dtype].itemsize
    return one * _count(one, device) + ORACLE_COPIES * wide


def samples(entry: Entry, case: Case, mode: str, device: torch.device, seed: int) -> list[Sample]:
    """Samples of different contents, together more than three times the last-level cache."""
    generator = torch.Generator().manual_seed(seed)
    inputs = entry.inputs(case, generator, device)
    with torch.no_grad():
        shapes = [value.shape for value in flat(reference_of(entry)(**inputs))]
    made = [sample(entry, inputs, mode, shapes, generator)]
    for _ in range(_count(nbytes(made[0]), device) - 1):
        made.append(sample(entry, entry.inputs(case, generator, device), mode, shapes, generator))
    return made


def _count(one: int, device: torch.device) -> int:
    """How many samples of `one` byte each: past three times the cache, two at least, and no more than a quarter of the memory."""
    count = min(MOST_SAMPLES, -(-3 * cache_bytes(device) // max(1, one)) + 1)
    available = available_bytes(device)
    if available is not None:
        count = min(count, available // 4 // max(1, one))
    return max(2, count)
