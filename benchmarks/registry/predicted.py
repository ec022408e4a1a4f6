"""What kdkernels' own kernels move, written down before any measurement: the launches of the Triton backend and the pyramids of each.

`Entry.units` is the least that anybody must move; this is what these kernels do move. With a bandwidth it gives the time to expect of
them. tests/test_predicted.py holds it against what the launchers ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from . import random_mask
from .case import Case

#: What no launch takes less than, in milliseconds. Not measured yet.
SHORTEST_MS = 0.003
#: Bytes a second of a large copy on an H200, whose data sheet says 4.8e12. Not measured yet; reports take what their run measured.
ASSUMED_BANDWIDTH = 4.2e12


class Launch(NamedTuple):
    """kernel: names of its file in kdkernels/triton and of its function, or torch. and an operator of PyTorch's own

    units: pyramids read and written; 0 over maps and channel vectors only
    """

    kernel: str
    units: float


class Passes(NamedTuple):
    """Launches for the values, and behind them those for the gradient."""

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...] = ()


_READ, _READ_BOTH = Launch("reduce.reduce", 1), Launch("reduce.reduce", 2)
_MEAN = (_READ, Launch("channel_sums.channel_sums", 0))
_ATTENTION = (_READ, Launch("attention.attention_kernel", 0))
_COMPARED, _WRITE_COMPARED = Launch("compared_read.read", 2), Launch("compared_write.write", 3)
_MASK = Launch("box_mask.rasterise", 0)
_VALUES, _SLOPES = Launch("terms.terms_kernel", 0), Launch("terms.terms_backward_kernel", 0)


def _write(units: float) -> Launch:
    return Launch("gradient.kernel", units)


def _by_level(case: Case, kernel: str, units: int) -> list[Launch]:
    """A launch a level, each of which moves its level's share of the units."""
    return [Launch(kernel, units * height * width / case.pixels) for height, width in case.level_sizes]


def _terms(case: Case, mode: str, before: tuple[Launch, ...] = (), reads: bool = True, imitates: bool = True) -> Passes:
    """Terms of the student's features.

    before: what is launched for the teacher's side and the weights;   reads: a term needs the student before its gradient can be written
    imitates: student and teacher are compared
    """
    gradient = 3 if imitates else 1  # besides the gradient itself the student and the teacher
    if imitates and mode in ("backward", "backward_scaled") and case.dtype != "fp16":
        # The error and the gradient for d = 1 come from one pass. The backward pass looks at d and makes the gradient again if it differs.
        values = (_READ, _VALUES) if reads else ()
        early = (_SLOPES, _write(gradient), Launch("gradient.sum_parts", 0))
        again = gradient if mode == "backward_scaled" else 0
        return Passes((*before, *values, *early), (Launch("terms.all_ones", 0), _SLOPES, _write(again)))
    values = (_READ_BOTH if imitates else _READ, _VALUES)
    return Passes((*before, *values), (_SLOPES, _write(gradient + (mode == "inline"))))


def _separate(case: Case, mode: str) -> Passes:
    """Autograd goes back in the reverse order and adds the two gradients."""
    gkd, bmfi = PREDICTED["gkd"](case, mode), PREDICTED["bmfi"](case, mode)
    return Passes(gkd.forward + bmfi.forward, (*bmfi.backward, *gkd.backward, *_by_level(case, "torch.add", 3)))


def _random_mask(case: Case, mode: str) -> Passes:
    """A masked pixel of a channels_last level is not read. In a contiguous one its elements lie among those that are kept."""
    return Passes((Launch("random_mask.kernel", 2 - (random_mask.RATIO if case.layout == "channels_last" else 0)),))


def _always(*forward: Launch, backward: tuple[Launch, ...] = ()) -> Callable[[Case, str], Passes]:
    return lambda case, mode: Passes(forward, backward)


_GKD_BMFI = partial(_terms, before=(*_MEAN, *_ATTENTION, _MASK, *_MEAN))
#: The gradient is made of the logits again.
_LOGITS = _always(Launch("logits.kernel", 2), Launch("gradient.sum_parts", 0), backward=(Launch("logits.kernel", 3),))
#: Entry -> its passes at a case, in a mode: of the primitives and of the methods of arXiv 2303.04240. The others are made of the same
#: primitives, many of them with convolutions of PyTorch's beside them.
PREDICTED: Mapping[str, Callable[[Case, str], Passes]] = {
    "channel_kl": _always(_COMPARED, Launch("channel_kl.rows", 0), backward=(_WRITE_COMPARED,)),
    "channel_mean": _always(*_MEAN),
    "correlation": _always(
        _COMPARED, Launch("correlation.channels", 0), Launch("correlation.rows", 0), backward=(_WRITE_COMPARED,)
    ),
    "weighted_channel_sum": _always(_READ, backward=(_write(1),)),
    "attention": _always(*_ATTENTION, backward=(Launch("attention.attention_backward_kernel", 0), _write(2))),
    "random_mask": _random_mask,
    "spatial_pool": _always(Launch("spatial_pool.pool_weights_kernel", 0), *_MEAN, backward=(_write(1),)),
    "feature_imitation": partial(_terms, reads=False),
    "logit_bce": _LOGITS,
    "logit_kl": _LOGITS,
    "map_distance": _always(
        Launch("map_distance.map_distance_kernel", 0), backward=(Launch("map_distance.map_distance_backward_kernel", 0),)
    ),
    "box_mask": _always(_MASK),
    "gkd": partial(_terms, before=(*_MEAN, _READ, *_MEAN), imitates=False),
    "gkd_imitation": partial(_terms, before=(*_MEAN, _READ), reads=False),
    "bmfi": partial(_terms, before=(*_ATTENTION, _MASK)),
    "aid_bmfi": partial(_terms, before=(*_ATTENTION, _MASK)),
    "gkd_bmfi": _GKD_BMFI,
    "gkd_bmfi_separate": _separate,
    # Triton has no one launch.
    "terms_persistent": _GKD_BMFI,
}


def launches(entry: str, case: Case, mode: str) -> tuple[Launch, ...]:
    """Those of one call, in their order."""
    passes = PREDICTED[entry](case, mode)
    return passes.forward if mode == "forward" else passes.forward + passes.backward


def units(entry: str, case: Case, mode: str) -> float:
    """Pyramids that one call moves."""
    return sum(launch.units for launch in launches(entry, case, mode))


def milliseconds(entry: str, case: Case, mode: str, bandwidth: float = ASSUMED_BANDWIDTH) -> float:
    """Time to expect of one call on a device that moves `bandwidth` bytes a second."""
    return sum(max(SHORTEST_MS, 1e3 * launch.units * case.unit / bandwidth) for launch in launches(entry, case, mode))
