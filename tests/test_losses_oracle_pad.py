"""PAD around other losses against its formula."""

from __future__ import annotations

import pytest
from oracle import cwd, fitnets, pad
from oracle_support import check_features, features, kinds, presets

from kdkernels.losses.catalogue import make_loss

# methods.md 3.4.
PUBLISHED = {"one-stage": {"eps": 1e-6}, "two-stage": {"eps": 1e-8}}


def test_published_defaults():
    assert presets("pad", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("name", ["fitnets", "cwd"])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, name):
    base = make_loss(name, {"weight": 0.7})

    def oracle(s, t, parameters):
        inner = fitnets.terms(s, t, 0.7) if name == "fitnets" else cwd.terms(s, t, 0.7, 1.0, False)
        return pad.terms(s, inner, dict.fromkeys(inner, 0.7), PUBLISHED[preset]["eps"])

    names = {"divergence": "channel"}
    terms = check_features(make_loss("pad", {"preset": preset, "base": base}), oracle, features(8, dtype), dtype, names=names)
    assert len(terms) == 1
