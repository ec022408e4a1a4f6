"""PKDLoss: invariances, the correlation that it is, sizes that differ, and how it splits over the images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from losses_support import pyramids, value_and_gradients
from oracle.compare import RTOL64, assert_close, assert_levels_close

from kdkernels import PKDLoss


def _affine(levels, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [[torch.randn(1, x.shape[1], 1, 1, generator=generator, dtype=x.dtype) for _ in range(2)] for x in levels]
    return [x * (0.5 + a.abs()) + 4 * b for x, (a, b) in zip(levels, drawn, strict=True)]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_scale_and_offset_of_a_channel_do_not_matter(side):
    s, t = pyramids(1)
    loss = PKDLoss(eps=1e-13)
    want = loss(s, t)
    moved = (_affine(s, 1), t) if side == "student" else (s, _affine(t, 2))
    assert_close(loss(*moved), want, 1e-10)
    # Features that are not normalized differ from theirs.
    before, after = (sum((a - b).square().mean() for a, b in zip(*pair, strict=True)) for pair in ((s, t), moved))
    assert not torch.allclose(before, after)


def test_it_is_one_minus_pearsons_r():
    s, t = pyramids(2, [(2, 3, 5, 6)])
    coefficients = []
    for c in range(3):
        pair = torch.stack([s[0][:, c].flatten(), t[0][:, c].flatten()]).detach()
        coefficients.append(torch.corrcoef(pair)[0, 1])
    count = s[0][:, 0].numel()
    # The unbiased deviation leaves (count - 1) / count of the mean square.
    want = (count - 1) / count * (1 - torch.stack(coefficients).mean())
    got = PKDLoss(weight=1.0, eps=1e-13)(s, t)
    assert_close(got, want, 1e-10)
    assert 0 < got < 2


def test_entries_are_shares_of_the_levels_total():
    s, t = pyramids(3)
    entries, gradients = value_and_gradients(PKDLoss(reduction="none"), s, t)
    z_s, z_t = ([(x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6) for x in levels] for levels in (s, t))
    parts = torch.stack([(a - b).square().sum((1, 2, 3)) for a, b in zip(z_s, z_t, strict=True)])
    totals = torch.stack([(a - b).square().mean() / 2 for a, b in zip(z_s, z_t, strict=True)])
    assert_close(entries, (10 * totals[:, None] * parts / parts.sum(1, keepdim=True)).detach(), RTOL64)
    assert torch.allclose(entries.sum(1), 10 * totals)
    want = torch.autograd.grad(10 * totals.sum(), s)
    assert_levels_close(gradients, [g.numpy() for g in want], RTOL64, what="gradient of level")


def test_a_student_of_another_size_is_resized():
    s, t = pyramids(4, [(2, 3, 5, 6)])
    small, _ = pyramids(4, [(2, 3, 3, 4)])
    got, gradients = value_and_gradients(PKDLoss(), small, t)
    want = PKDLoss()([F.interpolate(small[0], size=(5, 6), mode="bilinear", align_corners=False)], t)
    assert_close(got, want, RTOL64)
    assert gradients[0].shape == small[0].shape and gradients[0].abs().max() > 0
    with pytest.raises(ValueError, match=r"(?s)level 0.*student_features.*\(2, 4, 3, 4\).*teacher_features.*\(2, 3, 5, 6\)"):
        PKDLoss()([torch.zeros(2, 4, 3, 4)], [torch.zeros(2, 3, 5, 6)])
    assert s[0].shape == t[0].shape


def test_constant_channels_teach_nothing():
    s, t = pyramids(5, [(2, 2, 3, 3)])
    with torch.no_grad():
        s[0][:, 0] = 3.0
    value, gradients = value_and_gradients(PKDLoss(), s, t)
    assert torch.isfinite(value)
    assert torch.isfinite(gradients[0]).all()


def test_an_eps_that_is_not_above_0_is_refused():
    with pytest.raises(ValueError, match="eps must be above 0; got 0"):
        PKDLoss(eps=0.0)
