"""FBKDLoss: how its roots split over the images, equal networks, other channels and sizes, and the teacher's block that trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from losses_support import built, pyramids, value_and_gradients
from oracle.compare import RTOL64, assert_close, assert_levels_close

from kdkernels import FBKDLoss, ops
from kdkernels.losses.trainable import facing

SHAPES = [(2, 4, 9, 10), (2, 4, 5, 3), (2, 4, 1, 2)]
ONLY = {"feature": "alpha", "channel": "beta", "spatial": "gamma", "nonlocal": "lambda_"}


def _only(term, **options):
    return FBKDLoss(**{**dict.fromkeys(ONLY.values(), 0.0), ONLY[term]: 1.0}, **options)


@pytest.mark.parametrize("term", ONLY)
def test_a_levels_root_is_split_by_the_images_parts_of_the_sum(term):
    s, t = pyramids(1, SHAPES)
    # BatchNorm sees the batch in training mode only: in the other an image alone tells its part.
    loss = built(_only(term), s, t).eval()

    def evaluate(images):
        student, teacher = ([x[images] for x in levels] for levels in (s, t))
        return loss.terms(student, loss.teacher_side(teacher))[term]

    entries = evaluate(slice(0, 2))
    alone = torch.cat([evaluate(slice(n, n + 1)) for n in (0, 1)], 1)
    want = alone.square() / alone.square().sum(1, keepdim=True).sqrt()
    assert_close(entries, want.detach(), RTOL64)
    # The root of a sum is less than the sum of the roots.
    assert (entries.sum(1) < alone.sum(1)).all()
    got = torch.autograd.grad(entries.sum(), s)
    expected = torch.autograd.grad(alone.square().sum(1).sqrt().sum(), s)
    assert_levels_close(got, [g.numpy() for g in expected], 1e-10, what="gradient of level")


def test_terms_add_up_by_their_coefficients():
    s, t = pyramids(2, SHAPES)
    loss = built(FBKDLoss(weight=2.0, preset="two-stage"), s, t)
    terms = loss.terms(s, loss.teacher_side(t))
    assert list(terms) == list(ONLY)
    for term, value in terms.items():
        plain = _only(term, preset="two-stage")
        plain.trainable = copy.deepcopy(loss.trainable)
        assert_close(value.sum(), loss.coefficient(term) * plain(s, t), RTOL64, what=term)


def test_a_root_of_0_has_no_gradient():
    s, _ = pyramids(3, SHAPES)
    t = [x.detach().clone() for x in s]
    loss = FBKDLoss().build(s, t)
    loss.trainable.double()
    with torch.no_grad():
        # Every adapting layer the identity, and both blocks, which start so.
        for name, p in loss.trainable.named_parameters():
            if name.startswith(("feature", "channel", "spatial", "relation")):
                p.zero_()
                if p.dim() > 1:
                    centre = p if p.dim() == 2 else p[:, :, p.shape[2] // 2, p.shape[3] // 2]
                    centre.copy_(torch.eye(len(p)))
    value, gradients = value_and_gradients(loss, s, t)
    assert value.item() == 0
    assert all((g == 0).all() for g in gradients)


def test_a_student_of_another_size_is_resized_before_all_else():
    _, t = pyramids(4, SHAPES)
    s, _ = pyramids(4, [(2, 4, 4, 5), (2, 4, 7, 6), (2, 4, 1, 1)])
    loss = built(FBKDLoss(), s, t)
    got, gradients = value_and_gradients(loss, s, t)
    same = [F.interpolate(x, size=y.shape[2:], mode="bilinear", align_corners=False) for x, y in zip(s, t, strict=True)]
    assert_close(got, loss(same, t), RTOL64)
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("channel_attention", [True, False])
def test_other_channels(channel_attention):
    _, t = pyramids(5, SHAPES)
    s, _ = pyramids(5, [(2, 3, *shape[2:]) for shape in SHAPES])
    loss = built(FBKDLoss(channel_attention=channel_attention), s, t)
    value, gradients = value_and_gradients(loss, s, t)
    assert torch.isfinite(value) and all(g.abs().max() > 0 for g in gradients)
    # The positions' attention is the student's own; the channels' is that of what conv1x1 makes of it. Both are constants.
    side, aligned = loss.teacher_side(t), loss.trainable.feature(s, t)
    spatial = [(a + b) / 2 for a, b in zip(ops.attention(s, 0.1)[0], side.spatial, strict=True)]
    channel = [(a + b) / 2 for a, b in zip(ops.attention(aligned, 0.1)[1], side.channel, strict=True)]
    factor = [w[:, None] * (c[:, :, None, None] if channel_attention else 1) for w, c in zip(spatial, channel, strict=True)]
    parts = [(w * (a - b).square()).sum() for w, a, b in zip(factor, aligned, t, strict=True)]
    assert_close(loss.terms(s, side)["feature"].sum(1), 4.2e-4 * torch.stack(parts).sqrt().detach(), RTOL64)


def test_the_blocks_sizes_follow_the_level():
    s, t = pyramids(6, [(1, 8, 16, 16)] * 6)
    blocks = FBKDLoss().build(s, t).trainable.teacher_blocks
    assert [block.theta.out_channels for block in blocks] == [2, 2, 4, 4, 4, 4]
    assert [block.pool for block in blocks] == [8, 4, 2, 2, 2, 2]


def test_facing_gives_both_sides_their_gradient():
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    want = torch.autograd.grad((a - b).square().sum(), (a, b))
    got = torch.autograd.grad((facing(a, b) - b.detach()).square().sum(), (a, b))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    low = b.detach().half().requires_grad_()
    (facing(a, low) - low.detach()).square().sum().backward()
    assert low.grad.dtype == torch.float16 and low.grad.abs().max() > 0


def test_a_temperature_that_is_not_above_0_is_refused():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        FBKDLoss(temperature=0.0)
