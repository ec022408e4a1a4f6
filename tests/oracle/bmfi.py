"""BMFI's four terms, value per (level, image) and gradient to the student's features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import boxes as box_oracle
from .numeric import array, sign, zeros
from .primitives import attention, attention_gradient, feature_imitation, feature_imitation_gradient

Levels = list[np.ndarray]
TERMS = ("region", "attention", "whole", "background")


@dataclass(frozen=True)
class BMFI:
    """The options of the loss with the library's defaults."""

    weight: float = 1.0
    alpha: float = 1e-3
    gamma: float = 1e-3
    lambda_: float = 0.0
    beta_bg: float = 0.0
    temperature: float = 0.5
    mask: str = "gaussian"
    expand: float = 2.0
    placement: str = "centered"
    inner_ones: bool = True
    area_norm: bool = True
    attention_from: str = "teacher"

    def coefficient(self, term: str) -> float:
        return {"region": self.alpha, "attention": self.gamma, "whole": self.lambda_, "background": self.beta_bg}[term]


def _imitation_parts(term: str, s: np.ndarray, t: np.ndarray, foreground: np.ndarray, options: BMFI):
    """spatial factor, channel factor and coefficient of an imitation term of one level."""
    count, _, height, width = s.shape
    spatial, channel = attention(t, options.temperature)
    if options.attention_from == "mean":
        of_student = attention(s, options.temperature)
        spatial, channel = (spatial + of_student[0]) / 2, (channel + of_student[1]) / 2
    scale = options.weight * options.coefficient(term) / count
    if term == "whole":
        return spatial, channel, scale / (height * width)
    mask = foreground if term == "region" else box_oracle.background(foreground)
    return spatial * mask, channel, scale


def _foreground(s: Levels, boxes, image_size, options: BMFI) -> Levels:
    sizes = [level.shape[2:] for level in s]
    return box_oracle.box_mask(
        boxes, image_size, sizes, options.mask, options.expand, options.placement, options.inner_ones, options.area_norm
    )


def term_value(term: str, s: Levels, t: Levels, boxes, image_size, options: BMFI) -> np.ndarray:
    """(L, N) of one term, coefficient and normalisers included."""
    rows = []
    for level, foreground in enumerate(_foreground(s, boxes, image_size, options)):
        if term == "attention":
            rows.append(_attention_term(s[level], t[level], options))
        else:
            spatial, channel, scale = _imitation_parts(term, s[level], t[level], foreground, options)
            rows.append(scale * feature_imitation(s[level], t[level], spatial, channel))
    return np.stack(rows)


def term_gradient(term: str, s: Levels, t: Levels, boxes, image_size, options: BMFI, upstream: np.ndarray) -> Levels:
    """Gradient to the student's features of sum upstream * term_value; the attention that weighs is a constant."""
    out = []
    for level, foreground in enumerate(_foreground(s, boxes, image_size, options)):
        if term == "attention":
            out.append(_attention_term_gradient(s[level], t[level], options, upstream[level]))
        else:
            spatial, channel, scale = _imitation_parts(term, s[level], t[level], foreground, options)
            out.append(feature_imitation_gradient(s[level], t[level], spatial, channel, scale * upstream[level]))
    return out


def _attention_term(s: np.ndarray, t: np.ndarray, options: BMFI) -> np.ndarray:
    """(1/N) (sum |Ch_S - Ch_T| + sum |S_S - S_T|) of one level."""
    count, channels, height, width = s.shape
    spatial_s, channel_s = attention(s, options.temperature)
    spatial_t, channel_t = attention(t, options.temperature)
    out = zeros(count)
    for n in range(count):
        for c in range(channels):
            out[n] += abs(float(channel_s[n, c] - channel_t[n, c]))
        for h in range(height):
            for w in range(width):
                out[n] += abs(float(spatial_s[n, h, w] - spatial_t[n, h, w]))
        out[n] *= options.weight * options.gamma / count
    return array(out, count)


def _attention_term_gradient(s: np.ndarray, t: np.ndarray, options: BMFI, upstream: np.ndarray) -> np.ndarray:
    count, channels, height, width = s.shape
    spatial_s, channel_s = attention(s, options.temperature)
    spatial_t, channel_t = attention(t, options.temperature)
    u, v = zeros(count, height, width), zeros(count, channels)
    for n in range(count):
        scale = options.weight * options.gamma / count * float(upstream[n])
        for c in range(channels):
            v[n][c] = scale * sign(float(channel_s[n, c] - channel_t[n, c]))
        for h in range(height):
            for w in range(width):
                u[n][h][w] = scale * sign(float(spatial_s[n, h, w] - spatial_t[n, h, w]))
    return attention_gradient(s, options.temperature, array(u, count, height, width), array(v, count, channels))


def value(s: Levels, t: Levels, boxes, image_size, options: BMFI) -> np.ndarray:
    """(L, N): the sum of the terms whose coefficient is not 0."""
    return sum(term_value(term, s, t, boxes, image_size, options) for term in TERMS if options.coefficient(term) != 0)


def gradient(s: Levels, t: Levels, boxes, image_size, options: BMFI, upstream: np.ndarray) -> Levels:
    """Gradient of sum upstream * value."""
    parts = [term_gradient(term, s, t, boxes, image_size, options, upstream) for term in TERMS if options.coefficient(term) != 0]
    return [sum(part[level] for part in parts) for level in range(len(s))]
