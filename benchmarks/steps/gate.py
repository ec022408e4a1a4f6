"""Before a step is timed: its distillation must change the student's gradient as the reference backend's does."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..providers import providers
from ..registry import Entry
from .step import Bench, Step, Variant

#: Largest relative L2 error over all parameters. Under autocast the gradient is rounded to bf16 in every layer on its way down.
TOLERANCES = {False: 1e-3, True: 2e-2}


class Truth(NamedTuple):
    """What distillation by the reference backend in explicit mode adds to the gradient of a student.

    plain:  (P,) the gradient of the step without distillation
    wanted: (P,) what is added at `factor`
    factor: of the distillation losses, a power of two that makes what they add as large as `plain`: otherwise the rounding of
            `plain`, or of the difference, would hide it
    """

    plain: Tensor
    wanted: Tensor
    factor: float


def truth(bench: Bench, variant: Variant, entry: Entry) -> Truth:
    """For all providers and modes of `entry`. Raises ValueError where the loss adds nothing, so that nothing could be checked."""
    plain = bench.step(variant.probe).gradient()
    step = bench.step(Variant(variant.asks, entry.name, "reference", "explicit"), entry, providers()["reference"])
    wanted = step.gradient() - plain
    norm, size = wanted.norm().item(), plain.norm().item()
    if not (0 < norm < math.inf and 0 < size < math.inf):
        raise ValueError(f"the reference's gradient has norm {norm:.3g} beside {size:.3g} of the task's: nothing to compare with")
    factor = 2.0 ** max(0, round(math.log2(size / norm)))
    return Truth(plain, step.gradient(factor) - plain, factor)


def error(step: Step, truth: Truth) -> float:
    """Relative L2 error of what distillation adds to the gradient of all parameters; NaN where the step's gradient is NaN."""
    added = step.gradient(truth.factor) - truth.plain
    return ((added - truth.wanted).norm() / truth.wanted.norm()).item()


def refusal(error: float, amp: bool) -> str:
    """Why a step with this error gets no time; "" when it does."""
    if error <= TOLERANCES[amp]:
        return ""
    return f"distillation's gradient is off by {error:.2g} of its norm, more than {TOLERANCES[amp]:g} (explicit mode, reference backend)"
