"""The loops' closed-form gradients agree with five-point differences of the loops' values: the oracle is right about itself."""

from __future__ import annotations

import numpy as np
import pytest

from . import bmfi, cases, gkd, maps, numeric, primitives
from .compare import assert_close

# The differences are good to 1e-10 of functions of order one (see numeric.gradient); the gradients here are of order 0.01 to 1.
TOLERANCE = {"rtol": 1e-8, "atol": 1e-11}
SHAPE = (2, 3, 3, 2)


def _level(seed: int) -> np.ndarray:
    return cases.pyramid(seed, [SHAPE])[0]


@pytest.mark.parametrize("activation", ["raw", "abs"])
@pytest.mark.parametrize("rectify", ["abs", "relu", "none"])
def test_weighted_channel_sum(activation, rectify):
    x, w = _level(1), _level(2)[:, :, 0, 0]
    up = _level(3)[:, 0], _level(4)[:, 0, 0, 0], _level(5)[:, 0, 0, 0]

    def value(features, weights):
        return sum(
            float((u * part).sum())
            for u, part in zip(up, primitives.weighted_channel_sum(features, weights, activation, rectify), strict=True)
        )

    dx, dw = primitives.weighted_channel_sum_gradient(x, w, activation, rectify, *up)
    assert_close(dx, numeric.gradient(lambda features: value(features, w), x), **TOLERANCE)
    assert_close(dw, numeric.gradient(lambda weights: value(x, weights), w), **TOLERANCE)


def test_attention():
    x = _level(6)
    u, v = _level(7)[:, 0], _level(8)[:, :, 0, 0]

    def value(features):
        spatial, channel = primitives.attention(features, 0.5)
        return float((u * spatial).sum() + (v * channel).sum())

    assert_close(primitives.attention_gradient(x, 0.5, u, v), numeric.gradient(value, x), **TOLERANCE)


@pytest.mark.parametrize("normalize", ["minmax", "softmax", "zscore", "none"])
@pytest.mark.parametrize("distance", ["l1", "mse", "smooth_l1"])
@pytest.mark.parametrize(("eps_mode", "eps"), [("relative", 0.1), ("absolute", 0.1)])
def test_map_distance(normalize, distance, eps_mode, eps):
    m_s, m_t, spatial = 2 * np.abs(_level(9)[:, 0]), np.abs(_level(11)[:, 0]), np.abs(_level(12)[:, 0])
    options = maps.Options(normalize, distance, eps, eps_mode)
    up = np.array([0.7, 1.3])
    got = maps.map_distance_gradient(m_s, m_t, up, options, spatial)
    assert_close(got, numeric.gradient(lambda m: float(up @ maps.map_distance(m, m_t, options, spatial)), m_s), **TOLERANCE)


@pytest.mark.parametrize(
    "options", [gkd.PAPER, gkd.RELEASE, gkd.GKD(channel_weight="elementwise")], ids=["paper", "release", "elementwise"]
)
def test_gkd_map(options):
    s, t, g_s, g_t = cases.four(2, [SHAPE])
    up = cases.upstream(0, 1, 2)
    got = gkd.map_gradient(s, t, g_s, g_t, up, options)[0]
    want = numeric.gradient(lambda x: float((up * gkd.map_value([x], t, g_s, g_t, options)).sum()), s[0])
    assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("term", bmfi.TERMS)
def test_bmfi_term(term):
    s, t, _, _ = cases.four(3, [SHAPE])
    options = bmfi.BMFI(alpha=0.4, gamma=0.3, lambda_=0.2, beta_bg=0.1)
    up = cases.upstream(1, 1, 2)
    boxes = [np.array([[1.0, 1.0, 9.0, 9.0]]), np.array([[20.0, 2.0, 30.0, 30.0]])]
    got = bmfi.term_gradient(term, s, t, boxes, (48, 32), options, up)[0]
    want = numeric.gradient(lambda x: float((up * bmfi.term_value(term, [x], t, boxes, (48, 32), options)).sum()), s[0])
    assert_close(got, want, **TOLERANCE)
    assert np.abs(want).max() > 0


def test_resize_keeps_a_linear_map_and_its_borders():
    row = [[0.0, 1.0, 2.0, 3.0]]
    assert maps.resize(row, 1, 8) == [[0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]]
    assert maps.resize(row, 1, 2) == [[0.5, 2.5]]
