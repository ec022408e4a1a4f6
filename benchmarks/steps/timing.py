"""Times of steps taken in turns, and what follows from their differences."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..measure.clock import quantiles
from .step import Variant

Times = Mapping[Variant, Sequence[float]]
STUDENT = Variant(None)
FORWARD = Variant(frozenset())
#: Share -> what the teacher is asked for more than its features.
ASKED = {"teacher_head_gradient_ms": "teacher_gradients", "teacher_losses_ms": "teacher_losses"}


def wall_ms(device: torch.device, step: Callable[[], Any]) -> float:
    """Milliseconds from an idle device to an idle device: what the step costs, the host's part included.

    A detector's step waits for the device many times (sampling, matching), so there is nothing to be enqueued ahead.
    """
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def in_turns(
    steps: Mapping[Variant, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[Variant, list[float]]:
    """ms of each step in each round; the order within a round is random, so that whatever drifts meets all alike. Ctrl-C ends it early,
    if a round is done.

    tell: called after every round with the number of those done
    """
    order, shuffled = list(steps), random.Random(seed)
    times: dict[Variant, list[float]] = {variant: [] for variant in steps}
    collecting = gc.isenabled()
    try:
        for done in range(1, rounds + 1):
            shuffled.shuffle(order)
            # Python's garbage is collected between rounds, not inside of somebody's step.
            gc.collect()
            gc.disable()
            row = {variant: wall_ms(device, steps[variant]) for variant in order}
            # A whole round or nothing: differences are taken within one.
            for variant, ms in row.items():
                times[variant].append(ms)
            tell(done)
    except KeyboardInterrupt:
        if not times[order[0]]:
            raise
    finally:
        if collecting:
            gc.enable()
    return times


def shares(variant: Variant, times: Times) -> dict[str, dict[str, float] | None]:
    """What parts of `variant`'s step take, {"p20", "p50", "p80"} in ms over the rounds' differences; None where there is no such part.

    teacher_forward_ms:       the step with the teacher's features less the student's alone
    teacher_head_gradient_ms: with the gradient of the teacher's detection loss, less the step with its features
    teacher_losses_ms:        the same of its loss on each image
    distillation_ms:          less the step that asks the teacher for the same: masks, maps, losses, tap, and in explicit mode the
                              second backward pass through the student's head
    """
    found: dict[str, dict[str, float] | None] = dict.fromkeys(["teacher_forward_ms", *ASKED, "distillation_ms"])
    if variant.asks is not None:
        found["teacher_forward_ms"] = difference(times, FORWARD, STUDENT)
        for share, need in ASKED.items():
            if need in variant.asks:
                found[share] = difference(times, Variant(frozenset({need})), FORWARD)
    if variant.loss is not None:
        found["distillation_ms"] = difference(times, variant, variant.probe)
    return found


def difference(times: Times, more: Variant, less: Variant) -> dict[str, float] | None:
    """Quantiles of the differences within each round; None where one of the two was not timed."""
    if more not in times or less not in times:
        return None
    return quantiles([a - b for a, b in zip(times[more], times[less], strict=True)])


def ratio(times: Times, variant: Variant, base: Variant = STUDENT) -> float | None:
    """Median over the rounds of the time of `variant` over that of `base`; None where that was not timed."""
    if base not in times:
        return None
    return quantiles([a / b for a, b in zip(times[variant], times[base], strict=True)])["p50"]


def against(times: Times, variant: Variant) -> dict[str, float | None]:
    """Every other provider of the same loss and mode -> how many times as long as the step of `variant` its step takes."""
    same = [v for v in times if v != variant and v.loss is not None and replace(v, provider=variant.provider) == variant]
    return {str(other.provider): ratio(times, other, variant) for other in same}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
