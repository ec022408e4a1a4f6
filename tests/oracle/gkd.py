"""GKD, map and imitation form, value per (level, image) and gradient to the student's features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import boxes as box_oracle
from .maps import Options, map_distance, map_distance_gradient, normalised
from .numeric import array, zeros
from .primitives import (
    channel_mean,
    feature_imitation,
    feature_imitation_gradient,
    weighted_channel_sum,
    weighted_channel_sum_gradient,
)

Levels = list[np.ndarray]


@dataclass(frozen=True)
class GKD:
    """The options of the loss; the defaults are the preset "paper"."""

    weight: float = 1.0
    form: str = "map"
    spatial: bool = True
    channel_weight: str = "signed"
    activation: str = "raw"
    rectify: str = "abs"
    normalize: str = "minmax"
    distance: str = "l1"
    eps: float = 1e-6
    eps_mode: str = "relative"
    temperature: float = 0.5
    average: str = "nhw"
    box_weight: str = "none"

    @property
    def map_options(self) -> Options:
        return Options(self.normalize, self.distance, self.eps, self.eps_mode, self.temperature, self.average)


PAPER = GKD()
RELEASE = GKD(channel_weight="abs", activation="abs", rectify="relu", eps=1e-7, eps_mode="absolute")


def channel_weights(gradient: np.ndarray, mode: str) -> np.ndarray:
    """w of one level: (N, C), or |g| itself for "elementwise"."""
    return np.abs(gradient) if mode == "elementwise" else channel_mean(gradient, mode)


def raw_map(features: np.ndarray, gradient: np.ndarray, options: GKD) -> np.ndarray:
    """r of one level, (N, H, W)."""
    weights = channel_weights(gradient, options.channel_weight)
    return weighted_channel_sum(features, weights, options.activation, options.rectify)[0]


def _root_mask(options: GKD, boxes, image_size, sizes) -> list[np.ndarray | None]:
    if options.box_weight == "none":
        return [None] * len(sizes)
    return [np.sqrt(mask) for mask in box_oracle.box_mask(boxes, image_size, sizes)]


def _sizes(levels: Levels) -> list[tuple[int, int]]:
    return [level.shape[2:] for level in levels]


def map_value(s: Levels, t: Levels, g_s: Levels, g_t: Levels, options: GKD = PAPER, boxes=None, image_size=None) -> np.ndarray:
    """(L, N) of the map form."""
    rows = []
    for level, mask in enumerate(_root_mask(options, boxes, image_size, _sizes(s))):
        m_s, m_t = raw_map(s[level], g_s[level], options), raw_map(t[level], g_t[level], options)
        rows.append(options.weight * map_distance(m_s, m_t, options.map_options, mask))
    return np.stack(rows)


def map_gradient(
    s: Levels, t: Levels, g_s: Levels, g_t: Levels, upstream: np.ndarray, options: GKD = PAPER, boxes=None, image_size=None
) -> Levels:
    """Gradient to the student's features of sum upstream * map_value, the channel weights held constant."""
    out = []
    for level, mask in enumerate(_root_mask(options, boxes, image_size, _sizes(s))):
        weights = channel_weights(g_s[level], options.channel_weight)
        m_s, m_t = raw_map(s[level], g_s[level], options), raw_map(t[level], g_t[level], options)
        d_map = map_distance_gradient(m_s, m_t, options.weight * upstream[level], options.map_options, mask)
        out.append(weighted_channel_sum_gradient(s[level], weights, options.activation, options.rectify, d_map)[0])
    return out


def _imitation_factors(t: Levels, g_t: Levels, options: GKD, boxes, image_size) -> tuple[list[np.ndarray], list[np.ndarray]]:
    masks = box_oracle.box_mask(boxes, image_size, _sizes(t)) if boxes is not None else None
    spatial, channel = [], []
    for level, features in enumerate(t):
        count, channels, height, width = features.shape
        # With weights per element the channel factor is that of their means, mean |g|.
        w = channel_mean(g_t[level], "signed" if options.channel_weight == "signed" else "abs").tolist()
        out = zeros(count, channels)
        for n in range(count):
            total = math.fsum(abs(value) for value in w[n])
            for c in range(channels):
                out[n][c] = channels * abs(w[n][c]) / total if total > 0 else 0.0
        channel.append(array(out, count, channels))
        one = np.ones((count, height, width))
        if options.spatial:
            one = normalised(raw_map(features, g_t[level], options), options.map_options)
        if masks is not None:
            one = one * masks[level]
        spatial.append(one)
    return spatial, channel


def imitation_value(s: Levels, t: Levels, g_t: Levels, options: GKD = PAPER, boxes=None, image_size=None) -> np.ndarray:
    """(L, N) of the imitation form."""
    spatial, channel = _imitation_factors(t, g_t, options, boxes, image_size)
    return np.stack([options.weight / s[i].size * feature_imitation(s[i], t[i], spatial[i], channel[i]) for i in range(len(s))])


def imitation_gradient(
    s: Levels, t: Levels, g_t: Levels, upstream: np.ndarray, options: GKD = PAPER, boxes=None, image_size=None
) -> Levels:
    """Gradient to the student's features of sum upstream * imitation_value."""
    spatial, channel = _imitation_factors(t, g_t, options, boxes, image_size)
    return [feature_imitation_gradient(s[i], t[i], spatial[i], channel[i], options.weight / s[i].size * upstream[i]) for i in range(len(s))]
