"""FBKD (methods.md 6.1): attention-guided and non-local distillation, each term the root of a sum over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import non_local
from .layers import Level, channel_means, conv2d, linear, norm, pairs, pixel_means, size
from .primitives import attention
from .tape import Rows, constants, split, square, total


@dataclass(frozen=True)
class Parameters:
    """Of one level. Each of the first four is (weight, bias)."""

    feature: tuple[list, list]
    channel: tuple[list, list]
    spatial: tuple[list, list]
    adapt_non_local: tuple[list, list]
    of_student: non_local.Parameters
    of_teacher: non_local.Parameters


def _layer(parameters: dict, name: str) -> tuple[list, list]:
    return parameters[f"{name}.weight"], parameters[f"{name}.bias"]


def _block(parameters: dict, name: str) -> non_local.Parameters:
    layers = {part: _layer(parameters, f"{name}.{part}") for part in ("theta", "phi", "g", "out", "norm")}
    return non_local.Parameters(**layers)


def named(parameters: dict, level: int) -> Parameters:
    """Of a level, from parameters by their names in the library."""
    return Parameters(
        feature=_layer(parameters, f"feature.convolutions.{level}"),
        channel=_layer(parameters, f"channel.{level}"),
        spatial=_layer(parameters, f"spatial.{level}"),
        adapt_non_local=_layer(parameters, f"relation.{level}"),
        of_student=_block(parameters, f"student_blocks.{level}"),
        of_teacher=_block(parameters, f"teacher_blocks.{level}"),
    )


def terms(
    s: list[Level],
    t: list[Level],
    parameters: list[Parameters],
    weights: dict[str, float],
    temperature: float,
    channel_attention: bool,
    pools: Sequence[int] = (8, 4, 2, 2, 2),
) -> dict[str, Rows]:
    totals: dict[str, list] = {"feature": [], "channel": [], "spatial": [], "nonlocal": []}
    numerators: dict[str, list] = {term: [] for term in totals}
    for level, (a, b) in enumerate(zip(s, t, strict=True)):
        p = parameters[level]
        images = range(size(b)[0])
        own: dict[str, list] = {}
        x = conv2d(a, *p.feature)
        # Channels can be compared with the teacher's only where there are as many; the positions always.
        facing = a if size(a)[1] == size(b)[1] else x
        of_student, of_facing, of_teacher = (attention(np.asarray(constants(y)), temperature) for y in (a, facing, b))
        spatial = ((of_student[0] + of_teacher[0]) / 2).tolist()
        channel = ((of_facing[1] + of_teacher[1]) / 2).tolist() if channel_attention else None
        own["feature"] = [
            total([square(d) * (spatial[n][h][w] * (channel[n][c] if channel else 1.0)) for c, h, w, d in pairs(x, b, n)]) for n in images
        ]
        means = linear(channel_means(a), *p.channel)
        wanted = channel_means(b)
        own["channel"] = [total([square(u - v) for u, v in zip(means[n], wanted[n], strict=True)]) for n in images]
        x, y = conv2d(pixel_means(a), *p.spatial), pixel_means(b)
        own["spatial"] = [total([square(d) for _, _, _, d in pairs(x, y, n)]) for n in images]
        pool = pools[min(level, len(pools) - 1)]
        x = conv2d(non_local.block(a, p.of_student, pool), *p.adapt_non_local)
        y = non_local.block(b, p.of_teacher, pool)
        own["nonlocal"] = [total([square(d) for _, _, _, d in pairs(x, y, n)]) for n in images]
        for term, parts in own.items():
            totals[term].append(norm(parts) * weights[term])
            numerators[term].append(parts)
    return {term: split(totals[term], numerators[term]) for term in totals}
