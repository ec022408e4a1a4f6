"""FBKD against its formula, with the non-local blocks in quadratic form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import fbkd
from oracle_support import check_features, features, kinds, narrower, preset_loss, presets

# methods.md 3.3, numbers as they stand there, and 6.1 (mmrazor, which does without the channels' attention).
PUBLISHED: dict[str, dict[str, Any]] = {
    preset: dict(zip(("temperature", "alpha", "beta", "gamma", "lambda_", "channel_attention"), values, strict=True))
    for preset, values in {
        "one-stage": (0.1, 7e-5 * 6, 4e-3 * 6, 4e-3 * 6, 7e-5 * 6, True),
        "one-stage-aid": (0.1, 7e-5 * 8, 4e-3 * 6, 4e-3 * 6, 7e-5 * 7, True),
        "two-stage": (0.5, 4e-5, 2e-3, 2e-3, 2e-5, True),
        "two-stage-aid": (0.5, 4e-5, 4e-3 * 2, 4e-3 * 2, 4e-5, True),
        "mmrazor": (0.5, 7e-5, 4e-3, 4e-3, 7e-5, False),
    }.items()
}
TERMS = {"feature": "alpha", "channel": "beta", "spatial": "gamma", "nonlocal": "lambda_"}


def _oracle(options):
    def oracle(s, t, parameters):
        levels = [fbkd.named(parameters, level) for level in range(len(t))]
        weights = {term: options[name] for term, name in TERMS.items()}
        return fbkd.terms(s, t, levels, weights, options["temperature"], options["channel_attention"])

    return oracle


def test_published_defaults():
    found = presets("fbkd", PUBLISHED)
    assert found.keys() == PUBLISHED.keys()
    for preset, table in found.items():
        assert table == pytest.approx(PUBLISHED[preset], rel=1e-12)


@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype):
    assert check_features(preset_loss("fbkd", preset), _oracle(PUBLISHED[preset]), features(15, dtype), dtype) == set(TERMS)


@pytest.mark.parametrize("preset", ["one-stage", "mmrazor"])
def test_another_number_of_channels(preset):
    levels = features(16, torch.float64, narrower())
    assert check_features(preset_loss("fbkd", preset), _oracle(PUBLISHED[preset]), levels, torch.float64) == set(TERMS)


def test_a_level_larger_than_its_windows():
    shapes = [(1, 8, 9, 10), (1, 8, 6, 5)]
    levels = features(17, torch.float64, shapes, shapes)
    assert check_features(preset_loss("fbkd", "two-stage"), _oracle(PUBLISHED["two-stage"]), levels, torch.float64) == set(TERMS)
