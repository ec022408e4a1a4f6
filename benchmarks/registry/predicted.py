"""What kdkernels' own fused kernels move: their launches and the pyramids that each reads and writes, written down before any measurement.

The least that anybody must move is `Entry.units`; this is what the kernels of the Triton backend do move. From it and a bandwidth follows
the time that is expected of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .case import Case
from .entry import Entry

#: Milliseconds of a launch that moves next to nothing, besides its share of the bandwidth: an assumption to be measured.
SMALL_LAUNCH_MS = 0.003
#: Bytes a second of a large copy on an H200, whose data sheet says 4.8e12: an assumption, replaced by the measured one in reports.
ASSUMED_BANDWIDTH = 4.2e12


class Launch(NamedTuple):
    """units: pyramids read and written; 0 for a launch over maps and channel vectors only."""

    kernel: str
    units: float


_MEAN = (Launch("reduce", 1), Launch("channel_sums", 0))
_READ_TEACHER = (Launch("reduce", 1), Launch("attention", 0))
_MASK = (Launch("box_mask", 0),)
#: Values and gradient of an imitation come from one pass when the gradient is made in the forward: student, teacher, gradient.
_EARLY = (Launch("terms_backward", 0), Launch("gradient", 3), Launch("row_sums", 0))
#: The backward pass then looks at d and finds 1.
_UNCHANGED = (Launch("terms_backward", 0), Launch("gradient", 0))
#: At another power of two it multiplies what it finds.
_SCALED = (Launch("terms_backward", 0), Launch("gradient", 2))
_STUDENT = (Launch("reduce", 1), Launch("terms", 0))
_STUDENT_AND_TEACHER = (Launch("reduce", 2), Launch("terms", 0))

_BMFI_TEACHER = (*_READ_TEACHER, *_MASK)
_GKD_TEACHER = (*_MEAN, Launch("reduce", 1))
_BOTH_TEACHERS = (*_MEAN, *_BMFI_TEACHER)
_GKD_BACKWARD = (Launch("terms_backward", 0), Launch("gradient", 1))

#: Entry -> mode -> launches.
PREDICTED: Mapping[str, Mapping[str, tuple[Launch, ...]]] = {
    "channel_mean": {"forward": _MEAN},
    "weighted_channel_sum": {"forward": (Launch("reduce", 1),), "backward": (Launch("reduce", 1), Launch("gradient", 1))},
    "attention": {"forward": _READ_TEACHER, "backward": (*_READ_TEACHER, Launch("attention_backward", 0), Launch("gradient", 2))},
    "feature_imitation": {
        "forward": _STUDENT_AND_TEACHER,
        "backward": (*_EARLY, *_UNCHANGED),
        "backward_scaled": (*_EARLY, *_SCALED),
    },
    "map_distance": {"forward": (Launch("map_distance", 0),), "backward": (Launch("map_distance", 0), Launch("map_distance_backward", 0))},
    "box_mask": {"forward": _MASK},
    "gkd": {
        "forward": (*_GKD_TEACHER, *_MEAN, *_STUDENT),
        "backward": (*_GKD_TEACHER, *_MEAN, *_STUDENT, *_GKD_BACKWARD),
        "inline": (*_GKD_TEACHER, *_MEAN, *_STUDENT, Launch("terms_backward", 0), Launch("gradient", 2)),
    },
    "gkd_imitation": {
        # The channel factors are made of the means of G_T again, beside those of the map.
        "forward": (*_GKD_TEACHER, *_MEAN, *_STUDENT_AND_TEACHER),
        "backward": (*_GKD_TEACHER, *_MEAN, *_EARLY, *_UNCHANGED),
        "backward_scaled": (*_GKD_TEACHER, *_MEAN, *_EARLY, *_SCALED),
        "inline": (*_GKD_TEACHER, *_MEAN, *_STUDENT_AND_TEACHER, Launch("terms_backward", 0), Launch("gradient", 4)),
    },
    "bmfi": {
        "forward": (*_BMFI_TEACHER, *_STUDENT_AND_TEACHER),
        "backward": (*_BMFI_TEACHER, *_STUDENT, *_EARLY, *_UNCHANGED),
        "backward_scaled": (*_BMFI_TEACHER, *_STUDENT, *_EARLY, *_SCALED),
        "inline": (*_BMFI_TEACHER, *_STUDENT_AND_TEACHER, Launch("terms_backward", 0), Launch("gradient", 4)),
    },
    "gkd_bmfi": {
        "forward": (*_BOTH_TEACHERS, *_MEAN, *_STUDENT_AND_TEACHER),
        "backward": (*_BOTH_TEACHERS, *_MEAN, *_STUDENT, *_EARLY, *_UNCHANGED),
        "backward_scaled": (*_BOTH_TEACHERS, *_MEAN, *_STUDENT, *_EARLY, *_SCALED),
        # The values are wanted too, and come before the gradient: student and teacher are read once more.
        "inline": (*_BOTH_TEACHERS, *_MEAN, *_STUDENT_AND_TEACHER, Launch("terms_backward", 0), Launch("gradient", 4)),
    },
}


def launches(entry: Entry, case: Case, mode: str) -> tuple[Launch, ...] | None:
    """The launches of one call; None where none were written down.

    fp16 has no gradient in the forward pass: student and teacher are read for the values and again for the gradient, whatever d is.
    """
    name = {"aid_bmfi": "bmfi"}.get(entry.name, entry.name)
    modes = PREDICTED.get(name, {})
    found = modes.get(mode, modes.get("backward") if mode == "backward_scaled" else None)
    if found is None or case.dtype != "fp16" or not set(_EARLY) <= set(found):
        return found
    kept = found[: found.index(_EARLY[0])]
    student = tuple(Launch("reduce", 2) if launch == _STUDENT[0] and k == len(kept) - 2 else launch for k, launch in enumerate(kept))
    values = () if student != kept else _STUDENT_AND_TEACHER
    return (*student, *values, Launch("terms_backward", 0), Launch("gradient", 3))


def units(entry: Entry, case: Case, mode: str) -> float | None:
    """Pyramids moved by one call; None where it was not written down."""
    found = launches(entry, case, mode)
    return None if found is None else sum(launch.units for launch in found)


def milliseconds(entry: Entry, case: Case, mode: str, bandwidth: float = ASSUMED_BANDWIDTH) -> float | None:
    """Expected time of one call at `bandwidth` bytes a second; None where nothing was written down."""
    found = launches(entry, case, mode)
    if found is None:
        return None
    large = sum(launch.units for launch in found) * case.unit / bandwidth * 1e3
    return large + SMALL_LAUNCH_MS * sum(launch.units == 0 for launch in found)
