"""CWD against its formula."""

from __future__ import annotations

import pytest
from oracle import cwd
from oracle_support import check_features, features, kinds, preset_loss, presets

# methods.md 6.7: pppppM's cross-entropy with tau 1 and weight 5; mmrazor's divergence with weight 10.
PUBLISHED = {
    "one-stage": {"weight": 5.0, "temperature": 1.0, "entropy": False},
    "two-stage": {"weight": 5.0, "temperature": 1.0, "entropy": False},
    "mmrazor": {"weight": 10.0, "temperature": 1.0, "entropy": True},
}


def test_published_defaults():
    assert presets("cwd", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("change", [{}, {"temperature": 3.0}], ids=["published", "soft"])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, change):
    options = {**PUBLISHED[preset], **change}

    def oracle(s, t, parameters):
        return cwd.terms(s, t, options["weight"], options["temperature"], options["entropy"])

    names = {"divergence": "channel"}
    assert check_features(preset_loss("cwd", preset, **change), oracle, features(2, dtype), dtype, names=names) == {"divergence"}
