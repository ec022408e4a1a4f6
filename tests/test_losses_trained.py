"""The parts that losses train, of those that compare two pyramids: when they are made, from which seed, and that all of them learn."""

from __future__ import annotations

import pytest
import torch
from losses_support import built, pyramids
from oracle.compare import assert_close

from kdkernels import ACAMLoss, AIDLoss, FBKDLoss, FusedLoss, MGDLoss, PADLoss

LOSSES = {"acam": ACAMLoss, "fbkd": FBKDLoss, "mgd": MGDLoss}
#: Options that make a loss the same function at every call.
STILL = {"mgd": {"ratio": 0.0}}
SHAPES = [(2, 4, 6, 7), (2, 4, 3, 3)]


@pytest.mark.parametrize("name", LOSSES)
def test_building_leaves_the_random_stream_as_it_was(name):
    s, t = pyramids(1, SHAPES, torch.float32)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    loss = LOSSES[name]()
    loss(s, t)
    assert torch.equal(torch.rand(3), want)
    assert list(loss.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_the_seed_decides(name):
    s, t = pyramids(2, SHAPES, torch.float32)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(int(torch.randint(1000, (1,))))
        values.append(LOSSES[name](seed=seed)(s, t))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", [None, AIDLoss, PADLoss])
def test_every_parameter_gets_a_gradient(name, wrapper):
    s, t = pyramids(3, SHAPES)
    loss = built(LOSSES[name](), s, t)
    kd = FusedLoss({"kd": loss if wrapper is None else wrapper(loss)})
    kd(s, t, teacher_losses=0.5)["kd"].backward()
    missing = {key for key, p in kd.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert all(p.grad is not None for p in kd.parameters())
    # A softmax and a BatchNorm take an offset away.
    assert all(key.endswith(("key.bias", "out.bias")) for key in missing)
    assert {id(p) for p in kd.parameters()} == {id(p) for p in loss.trainable.parameters()}


@pytest.mark.parametrize("name", LOSSES)
def test_building_first_is_as_building_at_the_first_call(name):
    s, t = pyramids(4, SHAPES, torch.float32)
    early, late = LOSSES[name](), LOSSES[name]()
    assert early.trainable is None and late.trainable is None
    early.build(s, t)
    parameters = {key: p.clone() for key, p in early.named_parameters()}
    assert torch.equal(early(s, t), late(s, t))
    assert parameters.keys() == dict(late.named_parameters()).keys()
    assert all(torch.equal(p, parameters[key]) for key, p in late.named_parameters())
    assert {p.dtype for p in late.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", LOSSES)
def test_other_levels_than_it_was_built_for_are_refused(name):
    s, t = pyramids(5, SHAPES, torch.float32)
    loss = LOSSES[name]().build(s, t)
    with pytest.raises(ValueError, match="1 levels, the loss was built for 2"):
        loss(s[:1], t[:1])
    wide = [x.repeat(1, 2, 1, 1) for x in s]
    with pytest.raises(ValueError, match=r"level 0.*built for 4 channels, got 8"):
        loss(wide, t)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_descent_lowers_the_loss(name):
    s, t = pyramids(6, SHAPES)
    loss = built(LOSSES[name](**STILL.get(name, {})), s, t)
    before = loss(s, t)
    before.backward()
    slope = sum(p.grad.square().sum() for p in loss.parameters())
    with torch.no_grad():
        for p in loss.parameters():
            p -= 1e-4 * before.item() / slope * p.grad
    after = loss(s, t)
    assert after < before
    assert_close(after, before * (1 - 1e-4), 1e-6)


def test_a_built_loss_refuses_a_teacher_of_other_channels():
    def levels(channels):
        return [torch.randn(2, channels, 4, 5)]

    loss = FBKDLoss().build(levels(4), levels(6))
    with pytest.raises(ValueError, match="level 0: the loss was built for 6 teacher channels, got 5"):
        loss(levels(4), levels(5))
    loss = ACAMLoss().build(levels(6), levels(6))
    with pytest.raises(ValueError, match="built for 6 channels of the student and 6 of the teacher, got 5 and 5"):
        loss(levels(5), levels(5))


def test_every_parameter_has_a_gradient_where_a_level_is_a_single_value():
    loss = FBKDLoss()
    loss([torch.randn(1, 4, 1, 1)], [torch.randn(1, 4, 1, 1)]).backward()
    assert all(p.grad is not None for p in loss.parameters())
