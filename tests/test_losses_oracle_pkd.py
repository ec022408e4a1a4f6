"""PKD against its formula."""

from __future__ import annotations

import pytest
import torch
from oracle import pkd
from oracle_support import SHAPES, check_features, features, kinds, preset_loss, presets

# methods.md 6.8: 10 for RetinaNet, 6 for Faster R-CNN and GFL; eps 1e-6.
PUBLISHED = {
    "one-stage": {"weight": 10.0, "eps": 1e-6},
    "two-stage": {"weight": 6.0, "eps": 1e-6},
    "gfl": {"weight": 6.0, "eps": 1e-6},
}
SMALLER = [(3, 4, 3, 4), (3, 4, 5, 3), (3, 4, 1, 1)]


def test_published_defaults():
    assert presets("pkd", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("student", [SHAPES, SMALLER], ids=["same size", "resized"])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, student):
    def oracle(s, t, parameters):
        return pkd.terms(s, t, PUBLISHED[preset]["weight"])

    assert check_features(preset_loss("pkd", preset), oracle, features(3, dtype, student), dtype) == {"correlation"}


def test_one_number_a_channel_has_no_deviation():
    shapes = [(1, 3, 1, 1), (1, 3, 2, 3)]

    def oracle(s, t, parameters):
        return pkd.terms(s, t, 10.0)

    levels = features(4, torch.float64, shapes, shapes)
    assert check_features(preset_loss("pkd", "one-stage"), oracle, levels, torch.float64) == {"correlation"}
