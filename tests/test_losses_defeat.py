"""DeFeat's part on the head, and masks that cover all of a level or nothing of it."""

from __future__ import annotations

import pytest
import torch
from levels import pyramid, relative_error
from method_support import IMAGE_SIZE, call, given, made

from kdkernels import functional
from kdkernels.losses import defeat_head

FOREGROUND = torch.tensor([True, False, False, True, False])


def _logits(seed, dtype=torch.float64):
    return pyramid([(5, 4)], dtype, seed=seed)[0].requires_grad_()


def _loops(s, t, alpha, beta):
    total = 0.0
    for chosen, factor in ((FOREGROUND, alpha), (~FOREGROUND, beta)):
        rows = [(t[r].softmax(0) * (t[r].log_softmax(0) - s[r].log_softmax(0))).sum() for r in range(5) if chosen[r]]
        total = total + factor * sum(rows) / len(rows)
    return total


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 4e-3)])
def test_head_is_the_divergence_of_both_kinds_of_rows(dtype, rtol):
    s, t = _logits(1, dtype), _logits(2, dtype)
    got = defeat_head(s, t, FOREGROUND, alpha=0.7, beta=0.3)
    wide = s.detach().double().requires_grad_()
    want = _loops(wide, t.detach().double(), 0.7, 0.3)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got.detach(), want.detach()) <= min(rtol, 2e-5)
    (gradient,) = torch.autograd.grad(got, s, retain_graph=True)
    assert relative_error(gradient, torch.autograd.grad(want, wide)[0]) <= rtol
    assert torch.autograd.grad(got, t, allow_unused=True) == (None,)


def test_head_has_the_published_factors_and_is_a_function_too():
    s, t = _logits(3), _logits(4)
    assert torch.equal(defeat_head(s, t, FOREGROUND), defeat_head(s, t, FOREGROUND, 2.0, 2.0))
    assert torch.equal(functional.defeat_head(s, t, FOREGROUND), defeat_head(s, t, FOREGROUND))


@pytest.mark.parametrize("kind", [True, False])
def test_head_without_rows_of_a_kind(kind):
    s, t = _logits(5), _logits(6)
    every = torch.full((5,), kind)
    rows = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    assert relative_error(defeat_head(s, t, every).detach(), 2 * rows.mean().detach()) < 1e-12
    assert float(defeat_head(s[:0], t[:0], every[:0])) == 0


def test_head_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(5, 4\), \(4, 4\), \(5,\)"):
        defeat_head(_logits(1), _logits(2)[:4], FOREGROUND)
    with pytest.raises(ValueError, match=r"\(5, 4\), \(5, 4\), \(4,\)"):
        defeat_head(_logits(1), _logits(2), FOREGROUND[:4])


@pytest.mark.parametrize("name", ["defeat", "defeat ld"])
def test_a_level_of_one_kind_only(name):
    height, width = IMAGE_SIZE
    case = given(7, boxes=[[[0.0, 0.0, width, height]]] * 3)
    loss = made(name, case)
    loss.reduce = lambda terms: torch.stack(list(terms.values()))
    foreground, background = call(loss, case)
    # The image itself is a box of the third level's size.
    assert float(background[2].abs().max()) == 0 and float(foreground[2].min()) > 0
    others = [0, 1, 3]
    assert float(foreground[others].abs().max()) == 0 and float(background[others].min()) > 0
