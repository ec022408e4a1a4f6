"""Every primitive and method, declared once: one file a name, as in kdkernels.ops and kdkernels.losses."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .case import BATCHES, BOXES, CHANNELS, DTYPES, LAYOUTS, PYRAMIDS, QUICK, Case, all_cases
from .entry import MODES, UPSTREAM, Entry, Function, Inputs, Tolerance, flat

__all__ = [
    "BATCHES",
    "BOXES",
    "CHANNELS",
    "DTYPES",
    "ENTRIES",
    "LAYOUTS",
    "MODES",
    "PYRAMIDS",
    "QUICK",
    "UPSTREAM",
    "Case",
    "Entry",
    "Function",
    "Inputs",
    "Tolerance",
    "all_cases",
    "flat",
]

#: Name -> entry, of all files of this folder.
ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for module in iter_modules(__path__)
    if module.name not in ("case", "entry")
    for entry in import_module(f"{__name__}.{module.name}").ENTRIES
}
