"""Samples for the tests of the benchmarks' gate."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.call import Sample
from benchmarks.call import sample as make_sample
from benchmarks.providers import reference_of
from benchmarks.registry import ENTRIES, Case, Entry, flat

CPU = torch.device("cpu")
SMALL = Case("tiny", batch=1, channels=4, boxes=3)
METHOD = replace(ENTRIES["feature_imitation"], units={"forward": 2, "backward": 3, "backward_scaled": 5, "inline": 4})


def a_sample(entry: Entry, mode: str, case: Case = SMALL, seed: int = 0, device: torch.device = CPU) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    inputs = entry.inputs(case, generator, device)
    with torch.no_grad():
        shapes = [value.shape for value in flat(reference_of(entry)(**inputs))]
    return make_sample(entry, inputs, mode, shapes, generator)
