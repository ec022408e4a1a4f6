"""Plain imitation against its formula."""

from __future__ import annotations

import pytest
from oracle import fitnets
from oracle_support import check_features, features, kinds, preset_loss, presets

# methods.md 6: a plain mean of squares with weight 1.
PUBLISHED = {"one-stage": {"weight": 1.0}, "two-stage": {"weight": 1.0}}


def test_published_defaults():
    assert presets("fitnets", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype):
    def oracle(s, t, parameters):
        return fitnets.terms(s, t, **PUBLISHED[preset])

    assert check_features(preset_loss("fitnets", preset), oracle, features(1, dtype), dtype) == {"imitation"}
