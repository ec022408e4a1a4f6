"""How several teachers share one student, against loops over teachers, levels and images."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import AIDLoss, BMFILoss
from kdkernels.functional import teacher_shares


def losses(teachers: int = 3, shape: tuple[int, ...] = (2, 4)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [3 * torch.rand(shape, generator=generator) for _ in range(teachers)]


def test_softmax_weighs_by_the_total_over_levels_image_by_image():
    given = losses()
    got = teacher_shares(given)
    assert [tuple(w.shape) for w in got] == [(1, 4)] * 3
    for n in range(4):
        totals = [math.exp(-sum(t[level, n].item() for level in range(2))) for t in given]
        assert [w[0, n].item() for w in got] == pytest.approx([x / sum(totals) for x in totals], rel=1e-5)


def test_argmin_takes_the_best_teacher_at_each_level_and_image():
    given = losses()
    got = teacher_shares(given, "argmin")
    for level in range(2):
        for n in range(4):
            values = [t[level, n].item() for t in given]
            assert [w[level, n].item() for w in got] == [float(k == values.index(min(values))) for k in range(3)]


def test_scalars_and_ties():
    assert [w.item() for w in teacher_shares([torch.tensor(1.0), torch.tensor(1.0)])] == [0.5, 0.5]
    assert [w.item() for w in teacher_shares([torch.tensor(1.0), torch.tensor(1.0)], "argmin")] == [1.0, 0.0]
    assert [w.item() for w in teacher_shares([torch.tensor(7.0)])] == [1.0]


@pytest.mark.parametrize("mode", ["softmax", "argmin"])
def test_a_teacher_whose_loss_is_nan_spoils_the_shares_of_its_image_only(mode):
    given = losses()
    want = teacher_shares(given, mode)
    given[1][0, 2] = float("nan")
    bad = torch.zeros_like(want[0], dtype=torch.bool)
    bad[0, 2] = True
    for share, other in zip(teacher_shares(given, mode), want, strict=True):
        assert torch.equal(share.isnan(), bad) and torch.equal(share[~bad], other[~bad])
    scalars = [torch.tensor(x) for x in (2.0, float("nan"), 1.0)]
    assert all(share.isnan() for share in teacher_shares(scalars, mode))


def test_shares_multiply_the_matrix_of_a_loss():
    generator = torch.Generator().manual_seed(6)
    student, first, second = ([torch.randn(4, 3, 4, 5, generator=generator) for _ in range(2)] for _ in range(3))
    student = [x.requires_grad_() for x in student]
    t = losses(2)
    aid = AIDLoss(BMFILoss(alpha=0.0, reduction="none"), granularity="image")
    total = sum((w * aid(student, f, teacher_losses=x)).sum() for w, f, x in zip(teacher_shares(t), (first, second), t, strict=True))
    (gradient, _) = torch.autograd.grad(total, student)
    want = 0.0
    for features, own, other in ((first, t[0], t[1]), (second, t[1], t[0])):
        entries = BMFILoss(alpha=0.0, reduction="none")(student, features)
        for n in range(4):
            share = 1 / (1 + math.exp((own[:, n].sum() - other[:, n].sum()).item()))
            want += share * math.exp(-0.1 * own[:, n].sum().item()) * entries[:, n].sum().item()
    assert total.item() == pytest.approx(want, rel=1e-5)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("given", "mode", "message"),
    [
        (losses(), "mean", "softmax, argmin"),
        ([], "softmax", "got shapes \\[\\]"),
        ([torch.ones(2, 4), torch.ones(2, 3)], "softmax", "\\(2, 4\\), \\(2, 3\\)"),
        ([torch.ones(4), torch.ones(4)], "argmin", "\\(4,\\)"),
    ],
)
def test_what_cannot_be_shared_is_refused(given, mode, message):
    with pytest.raises(ValueError, match=message):
        teacher_shares(given, mode)
