"""CWDLoss: offsets of a channel do not matter, temperature and cross-entropy."""

from __future__ import annotations

import pytest
import torch
from losses_support import pyramids, value_and_gradients
from oracle.compare import RTOL64, assert_close, assert_levels_close

from kdkernels import CWDLoss


def test_an_offset_of_each_image_and_channel_does_not_matter():
    s, t = pyramids(1)
    loss = CWDLoss(preset="mmrazor", temperature=0.7, reduction="none")
    want, gradients = value_and_gradients(loss, s, t)
    generator = torch.Generator().manual_seed(1)
    s_moved, t_moved = ([x + 3 * torch.randn(*x.shape[:2], 1, 1, generator=generator, dtype=x.dtype) for x in levels] for levels in (s, t))
    got, moved = value_and_gradients(loss, [x.detach().requires_grad_() for x in s_moved], t_moved)
    assert_close(got, want, 1e-10)
    assert (got > 0).all()
    assert_levels_close(moved, [g.numpy() for g in gradients], 1e-10, what="gradient of level")


def test_the_cross_entropy_has_the_divergences_gradient():
    s, t = pyramids(2)
    divergence, want = value_and_gradients(CWDLoss(entropy=True), s, t)
    cross_entropy, got = value_and_gradients(CWDLoss(entropy=False), s, t)
    own = CWDLoss()(t, t)
    assert_close(cross_entropy - own, divergence, RTOL64)
    assert cross_entropy > divergence > 0
    assert_levels_close(got, [g.numpy() for g in want], RTOL64, what="gradient of level")


def test_equal_features_have_no_divergence():
    s, _ = pyramids(3)
    value, gradients = value_and_gradients(CWDLoss(preset="mmrazor"), s, [x.detach() for x in s])
    assert abs(value.item()) < 1e-14
    assert all(g.abs().max() < 1e-15 for g in gradients)


def test_features_and_temperature_scale_together():
    s, t = pyramids(4)
    one = CWDLoss(weight=1.0, entropy=True)(s, t)
    tripled = [3 * x for x in s], [3 * x for x in t]
    assert_close(CWDLoss(weight=1.0, temperature=3.0, entropy=True)(*tripled), 9 * one, RTOL64)
    assert not torch.allclose(CWDLoss(weight=1.0, entropy=True)(*tripled), one)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_above_0_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        CWDLoss(temperature=temperature)
