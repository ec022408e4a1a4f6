"""ACAM-KD, as reconstructed, against its formula."""

from __future__ import annotations

import pytest
import torch
from oracle import acam
from oracle_support import SHAPES, check_features, features, kinds, narrower, preset_loss, presets

# methods.md 6.12: alpha = lambda = 1, 6 masks for detection.
PUBLISHED = {
    "one-stage": {"alpha": 1.0, "lambda_": 1.0, "masks": 6},
    "two-stage": {"alpha": 1.0, "lambda_": 1.0, "masks": 6},
}
TERMS = {"channel", "spatial", "diversity"}


def _oracle(options):
    def oracle(s, t, parameters):
        attention, selectors = acam.named(parameters, len(t))
        assert {len(of_channels) for of_channels, _ in selectors} == {options["masks"]}
        return acam.terms(s, t, attention, selectors, parameters, "align.", options["alpha"], options["lambda_"])

    return oracle


def test_published_defaults():
    assert presets("acam", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("channels", [4, 3], ids=["same channels", "aligned"])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, channels):
    levels = features(22, dtype, narrower(SHAPES, channels))
    assert check_features(preset_loss("acam", preset), _oracle(PUBLISHED[preset]), levels, dtype) == TERMS


def test_two_masks_of_another_size_of_student():
    shapes, smaller = [(1, 5, 4, 3), (1, 1, 2, 2)], [(1, 5, 2, 2), (1, 1, 1, 1)]
    options = {"alpha": 0.3, "lambda_": 0.7, "masks": 2}
    levels = features(23, torch.float64, smaller, shapes)
    assert check_features(preset_loss("acam", "one-stage", **options), _oracle(options), levels, torch.float64) == TERMS
