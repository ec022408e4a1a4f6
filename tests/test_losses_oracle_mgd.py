"""MGD against its formula, with masks from the oracle's own generator."""

from __future__ import annotations

import pytest
import torch
from oracle import cases, mgd
from oracle_support import SHAPES, check_features, features, kinds, narrower, preset_loss, presets

# methods.md 6.6: RetinaNet, RepPoints and SOLO; Faster and Mask R-CNN.
PUBLISHED = {"one-stage": {"alpha": 2e-5, "ratio": 0.65}, "two-stage": {"alpha": 5e-7, "ratio": 0.45}}
SEED = 2**40 + 11


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_defaults(preset):
    assert presets("mgd", PUBLISHED) == PUBLISHED
    assert preset_loss("mgd", preset).ratio == PUBLISHED[preset]["ratio"]


@pytest.mark.parametrize("channels", [4, 3], ids=["same channels", "aligned"])
@pytest.mark.parametrize("calls", [0, 2], ids=["first call", "third call"])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, calls, channels):
    levels = features(9, dtype, narrower(SHAPES, channels))
    loss = preset_loss("mgd", preset, seed=SEED)
    for _ in range(calls):
        loss(*(cases.tensors(side, torch.float32) for side in levels))

    def oracle(s, t, parameters):
        generators = [(f"generators.{level}.0", f"generators.{level}.2") for level in range(len(t))]
        return mgd.terms(s, t, parameters, (SEED, calls), **PUBLISHED[preset], align="align.", generators=generators)

    assert check_features(loss, oracle, levels, dtype) == {"generation"}
