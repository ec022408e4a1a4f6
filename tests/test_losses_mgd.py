"""MGDLoss: masks that change from call to call and repeat after a load, and are the same in the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from losses_support import built, pyramids, value_and_gradients
from oracle.compare import RTOL64, assert_close, assert_levels_close

from kdkernels import MGDLoss, functional

SHAPES = [(2, 3, 7, 9), (2, 2, 4, 4)]


def _masks(seed: int, call: int, ratio: float, like: list[torch.Tensor]) -> list[torch.Tensor]:
    state = torch.tensor([seed, call])
    return functional.random_mask([torch.ones_like(x) for x in like], state, ratio)


def test_masks_change_from_call_to_call():
    s, t = pyramids(1, SHAPES)
    loss = built(MGDLoss(seed=3, reduction="none"), s, t)
    one, two = loss(s, t), loss(s, t)
    assert not torch.equal(one, two)
    assert loss.trainable.state.tolist() == [3, 2]
    loss.trainable.state[1] = 0
    assert torch.equal(loss(s, t), one)


def test_masks_repeat_after_a_state_dict():
    s, t = pyramids(2, SHAPES)
    loss = built(MGDLoss(), s, t)
    loss(s, t)
    other = built(MGDLoss(seed=9), s, t)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert [other(s, t).item() for _ in range(3)] == [loss(s, t).item() for _ in range(3)]


def test_masks_of_another_seed_are_others():
    s, t = pyramids(3, SHAPES)
    parts = built(MGDLoss(), s, t).trainable
    one, two = (functional.mgd(s, t, trained=copy.deepcopy(parts)) for _ in range(2))
    parts.state[0] = 1
    assert torch.equal(one, two)
    assert not torch.equal(functional.mgd(s, t, trained=parts), one)


def test_evaluation_mode_does_not_count():
    s, t = pyramids(4, SHAPES)
    loss = built(MGDLoss(), s, t).eval()
    assert torch.equal(loss(s, t), loss(s, t))
    assert loss.trainable.state.tolist() == [0, 0]


def test_the_mask_of_the_backward_pass_is_that_of_the_forward_pass():
    s, t = pyramids(5, SHAPES)
    loss = built(MGDLoss(alpha=1.0, seed=5, reduction="none"), s, t)
    first, second = loss(s, t), loss(s, t)
    assert not torch.equal(first, second)
    for call, entries in enumerate((first, second)):
        x = [(level * mask).detach().requires_grad_() for level, mask in zip(s, _masks(5, call, 0.65, s), strict=True)]
        parts = list(zip(loss.trainable.generators, x, t, strict=True))
        want = torch.stack([(generator(level) - target).square().sum((1, 2, 3)) / 2 for generator, level, target in parts])
        assert_close(entries, want, RTOL64)
        gradients = torch.autograd.grad(want.sum(), x)
        masked = [g * mask for g, mask in zip(gradients, _masks(5, call, 0.65, s), strict=True)]
        got = torch.autograd.grad(entries.sum(), s)
        assert_levels_close(got, [g.numpy() for g in masked], RTOL64, what="gradient of level")


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_no_mask_and_nothing_left(ratio):
    s, t = pyramids(6, SHAPES)
    loss = built(MGDLoss(ratio=ratio), s, t)
    value, gradients = value_and_gradients(loss, s, t)
    assert torch.isfinite(value)
    assert all((g.abs().max() == 0) == (ratio == 1.0) for g in gradients)
    loss.reduction = "none"
    assert torch.equal(loss(s, t), loss(s, t)), "such masks are all alike"


def test_masked_cells_may_hold_anything():
    s, t = pyramids(7, SHAPES)
    loss = built(MGDLoss(), s, t)
    want = loss(s, t)
    spoiled = [torch.where(mask == 0, torch.nan, x) for x, mask in zip(s, _masks(0, 0, 0.65, s), strict=True)]
    loss.trainable.state.zero_()
    assert torch.equal(loss(spoiled, t), want)


def test_other_channels_and_sizes_are_aligned():
    _, t = pyramids(8, [(2, 5, 6, 8), (2, 2, 4, 4)])
    s, _ = pyramids(8, [(2, 3, 3, 4), (2, 2, 4, 4)])
    loss = built(MGDLoss(), s, t)
    assert [type(x).__name__ for x in loss.trainable.align.convolutions] == ["Conv2d", "Identity"]
    value, gradients = value_and_gradients(loss, s, t)
    assert torch.isfinite(value) and all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_ratio_that_is_no_probability_is_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\]"):
        MGDLoss(ratio=ratio)
