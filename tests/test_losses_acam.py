"""ACAMLoss: the attention against its definition, masks that vanish or are alike, and the masks' gradient."""

from __future__ import annotations

import pytest
import torch
from losses_support import built, pyramids, value_and_gradients
from oracle.compare import RTOL64, assert_close, assert_levels_close
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdkernels import ACAMLoss

SHAPES = [(2, 4, 3, 5), (2, 3, 2, 2)]


def _plain(loss, s, t):
    """The three terms in torch's own operations, with the matrix of all pairs."""
    rows = {"channel": [], "spatial": [], "diversity": []}
    for level, x, y, aligned in zip(loss.trainable.levels, s, t, loss.trainable.align(s, t), strict=True):
        q, k, v = level.query(y).flatten(2), level.key(x).flatten(2), level.value(x).flatten(2)
        affinity = torch.einsum("nci,ncj->nij", q, k) / q.shape[1] ** 0.5
        joint = torch.einsum("nij,ncj->nci", affinity.softmax(2), v)
        channel = torch.sigmoid(torch.einsum("m,nc->nmc", level.channel_units.weight[:, 0], joint.mean(2)))
        spatial = torch.sigmoid(torch.einsum("mc,nci->nmi", level.spatial_units.weight, joint))
        error = (aligned - y).square().flatten(2)
        images, count = len(x), channel.shape[1]
        by_channel = torch.einsum("nmc,nci->nm", channel, error) / (error.shape[2] * channel.sum(2))
        by_position = torch.einsum("nmi,nci->nm", spatial, error) / (error.shape[1] * spatial.sum(2))
        rows["channel"].append(by_channel.sum(1) / (images * count))
        rows["spatial"].append(by_position.sum(1) / (images * count))
        apart = torch.zeros(images, dtype=x.dtype)
        for masks in (channel, spatial):
            for i in range(count):
                for j in range(count):
                    if i != j:
                        a, b = masks[:, i], masks[:, j]
                        apart = apart + 2 * (a * b).sum(1) / (a.square().sum(1) + b.square().sum(1))
        rows["diversity"].append(apart / images)
    return {term: torch.stack(values) for term, values in rows.items()}


@pytest.mark.parametrize("term", ["channel", "spatial", "diversity"])
@pytest.mark.parametrize("shapes", [SHAPES, [(2, 6, 6, 7), (2, 2, 2, 3)]], ids=["equal", "other channels and sizes"])
def test_each_term_and_the_gradients_of_features_and_masks(term, shapes):
    s, _ = pyramids(1, SHAPES)
    _, t = pyramids(1, shapes)
    loss = built(ACAMLoss(), s, t)
    got, want = loss.terms(s, loss.teacher_side(t))[term], _plain(loss, s, t)[term]
    assert_close(got, want, RTOL64)
    sources = [*s, *loss.parameters()]
    gradients = [torch.autograd.grad(value.sum(), sources, allow_unused=True) for value in (got, want)]
    scale = max(g.abs().max().item() for g in gradients[1] if g is not None)
    assert scale > 0
    for a, b, source in zip(*gradients, sources, strict=True):
        a, b = (torch.zeros_like(source) if g is None else g for g in (a, b))
        assert_close(a, b, RTOL64, atol=RTOL64 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_matrix_of_all_pairs_is_made_in_either_layout(layout, dtype):
    s, t = ([x.detach().to(dtype).contiguous(memory_format=layout).requires_grad_() for x in side] for side in pyramids(8, SHAPES))
    loss = built(ACAMLoss(), s, t)
    # Refuses to fall back to the path that makes it.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        gradients = torch.autograd.grad(loss(s, t), s)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_an_entry_depends_on_its_own_image_alone():
    s, t = pyramids(2, SHAPES)
    loss = built(ACAMLoss(reduction="none"), s, t)
    gradients = torch.autograd.grad(loss(s, t)[0, 0], s, allow_unused=True)
    assert gradients[0][0].abs().max() > 0 and gradients[0][1].abs().max() == 0
    assert gradients[1] is None or gradients[1].abs().max() == 0


def test_masks_that_are_all_alike_overlap_wholly():
    s, t = pyramids(3, SHAPES)
    loss = built(ACAMLoss(masks=4), s, t)
    apart = loss.terms(s, loss.teacher_side(t))["diversity"]
    with torch.no_grad():
        for level in loss.trainable.levels:
            for units in (level.channel_units, level.spatial_units):
                units.weight.copy_(units.weight[:1].expand_as(units.weight))
    terms = loss.terms(s, loss.teacher_side(t))
    # 4 * 3 ordered pairs of each kind, halved by N = 2.
    assert_close(terms["diversity"], torch.full((2, 2), 12.0), RTOL64)
    assert (apart < terms["diversity"]).all()


def test_a_single_mask_has_nothing_to_overlap_with():
    s, t = pyramids(4, SHAPES)
    loss = built(ACAMLoss(masks=1), s, t)
    terms = loss.terms(s, loss.teacher_side(t))
    assert terms["diversity"].abs().max() == 0
    assert terms["channel"].min() > 0


def test_masks_that_vanish_weigh_nothing():
    s, t = pyramids(5, SHAPES)
    loss = built(ACAMLoss(), s, t)
    with torch.no_grad():
        for level in loss.trainable.levels:
            level.value.weight.zero_()
            level.value.bias.fill_(1.0)
            level.channel_units.weight.fill_(-1e6)
            level.spatial_units.weight.fill_(-1e6)
    value, gradients = value_and_gradients(loss, s, t)
    assert value.item() == 0
    assert all((g == 0).all() for g in gradients)


def test_masks_are_means_whatever_their_size():
    # Constant masks of any height weigh all positions alike: the loss is the plain mean square, once by channels and once by positions.
    s, t = pyramids(6, SHAPES)
    loss = built(ACAMLoss(lambda_=0.0, reduction="none"), s, t)
    values = []
    for unit in (-3.0, 0.5):
        with torch.no_grad():
            for level in loss.trainable.levels:
                level.value.weight.zero_()
                level.value.bias.fill_(1.0)
                level.channel_units.weight.fill_(unit)
                level.spatial_units.weight.fill_(unit)
        values.append(loss(s, t))
    want = torch.stack([(x - y).square().mean((1, 2, 3)) for x, y in zip(s, t, strict=True)])
    assert_close(values[0], want.detach(), RTOL64)
    assert_close(values[1], want.detach(), RTOL64)
    assert torch.allclose(*values, rtol=RTOL64, atol=0.0)


def test_no_graph_no_gradients():
    s, t = pyramids(7, SHAPES)
    loss = built(ACAMLoss(), s, t)
    want, gradients = value_and_gradients(loss, s, t)
    with torch.no_grad():
        got = loss(s, t)
    assert_close(got, want, RTOL64)
    assert not got.requires_grad
    again = torch.autograd.grad(loss(s, t), s)
    assert_levels_close(again, [g.numpy() for g in gradients], RTOL64)


def test_masks_are_counted():
    with pytest.raises(ValueError, match="masks must be at least 1; got 0"):
        ACAMLoss(masks=0)
