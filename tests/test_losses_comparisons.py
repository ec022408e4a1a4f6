"""The losses that need nothing but two pyramids: what holds for all of them, alone, wrapped and together."""

from __future__ import annotations

import pytest
import torch
from losses_support import built, pyramids, value_and_gradients
from oracle import cases
from oracle.compare import RTOL64, assert_close, assert_levels_close

from kdkernels import ACAMLoss, AIDLoss, CWDLoss, FBKDLoss, FusedLoss, MGDLoss, NonFinite, PADLoss, PKDLoss, functional
from kdkernels.losses.trainable import Trainable

#: The class, options that are not the default, the functional form, and the axes in which student and teacher must agree.
LOSSES = {
    "acam": (ACAMLoss, {}, functional.acam, "N"),
    "cwd": (CWDLoss, {}, functional.cwd, "NCHW"),
    "cwd entropy": (CWDLoss, {"entropy": True, "temperature": 2.0}, functional.cwd, "NCHW"),
    "fbkd": (FBKDLoss, {}, functional.fbkd, "N"),
    # Its masks are not the same for an image that is another of the batch, and not the same twice: tests/test_losses_mgd.py.
    "mgd": (MGDLoss, {"ratio": 0.0}, functional.mgd, "N"),
    "pkd": (PKDLoss, {}, functional.pkd, "NC"),
}
WRAPPERS = {
    "aid": lambda loss: AIDLoss(loss),
    "pad": lambda loss: PADLoss(loss),
    "aid of pad": lambda loss: AIDLoss(PADLoss(loss)),
    "pad of aid": lambda loss: PADLoss(AIDLoss(loss)),
}
T = torch.tensor([[0.1, 2.0], [0.5, 0.0], [3.0, 1.25]])
RTOL_WEIGHT = 5e-7
TINY = [(2, 3, 1, 1), (2, 1, 3, 2), (2, 1, 1, 1)]


def _make(name, s, t, **options):
    kind, own, *_ = LOSSES[name]
    return built(kind(**own, **options), s, t)


@pytest.mark.parametrize("name", LOSSES)
def test_entries_add_up_to_the_scalar(name):
    s, t = pyramids(1)
    entries, want = value_and_gradients(_make(name, s, t, reduction="none"), s, t)
    total, got = value_and_gradients(_make(name, s, t), s, t)
    assert entries.shape == (3, 2)
    assert total.shape == ()
    assert_close(total, entries.sum(), RTOL64)
    assert_levels_close(got, want, RTOL64, what="gradient of level")


@pytest.mark.parametrize("name", LOSSES)
def test_terms_carry_weight_and_coefficient(name):
    s, t = pyramids(2)
    one, two = (_make(name, s, t, weight=weight) for weight in (1.0, 3.0))
    for term, value in two.terms(s, two.teacher_side(t)).items():
        assert_close(value, 3 * one.terms(s, one.teacher_side(t))[term], RTOL64, what=term)
        assert two.coefficient(term) == pytest.approx(3 * one.coefficient(term))
        assert one.coefficient(term) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_images_does_not_matter(name):
    s, t = pyramids(3, [(3, *shape[1:]) for shape in cases.SHAPES])
    order = torch.tensor([2, 0, 1])
    loss = _make(name, s, t, reduction="none")
    value, gradients = value_and_gradients(loss, s, t)
    moved = [x.detach()[order].requires_grad_() for x in s]
    got, moved_gradients = value_and_gradients(loss, moved, [x[order] for x in t])
    assert_close(got, value[:, order].detach(), RTOL64)
    assert not torch.equal(got, value)
    assert_levels_close(moved_gradients, [g[order].numpy() for g in gradients], RTOL64, atol=1e-14, what="gradient of level")


@pytest.mark.parametrize("name", LOSSES)
def test_no_images_and_no_levels(name):
    s, t = pyramids(4, [(0, 3, 4, 5), (0, 2, 2, 2)])
    value, gradients = value_and_gradients(_make(name, s, t, reduction="none"), s, t)
    assert value.shape == (2, 0)
    assert all(g.shape == x.shape for g, x in zip(gradients, s, strict=True))
    assert _make(name, s, t)(s, t).item() == 0
    assert _make(name, [], [])([], []).item() == 0
    for wrapper in WRAPPERS.values():
        assert FusedLoss({"kd": wrapper(_make(name, s, t))})(s, t, teacher_losses=T[:2, :0])["kd"].item() == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shapes", [TINY, [(1, *shape[1:]) for shape in TINY]], ids=["two images", "one image"])
def test_single_cells_and_single_channels(name, shapes):
    s, t = pyramids(5, shapes)
    for loss in (_make(name, s, t), PADLoss(_make(name, s, t))):
        value, gradients = value_and_gradients(loss, s, t)
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("axis", "shape"), [("N", (3, 3, 5, 6)), ("C", (2, 4, 5, 6)), ("H", (2, 3, 4, 6))])
def test_shapes_that_do_not_fit_are_named(name, axis, shape):
    _, t = pyramids(6, cases.SHAPES[:1])
    s, _ = pyramids(6, [shape])
    loss = _make(name, s, t)
    if axis not in LOSSES[name][3]:
        value, gradients = value_and_gradients(loss, s, t)
        assert torch.isfinite(value) and gradients[0].abs().max() > 0
        return
    for wrapped in (loss, PADLoss(loss)):
        with pytest.raises(ValueError, match=r"(?s)level 0.*student_features.*teacher_features") as error:
            wrapped(s, t)
        assert str(shape) in str(error.value) and str(cases.SHAPES[0]) in str(error.value)


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_of_levels_that_differ_are_named(name):
    s, t = pyramids(6)
    with pytest.raises(ValueError, match=r"(?s)student_features.*teacher_features.*levels.*3.*2"):
        _make(name, s, t)(s, t[:2])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped(name, wrapper):
    s, t = pyramids(7)
    base = _make(name, s, t, reduction="none")
    entries, _ = value_and_gradients(base, s, t)
    weight = torch.exp(-0.1 * T.double())
    wide, narrow = (torch.stack([x.var(correction=0) for x in s]).detach()[:, None] for _ in range(2))
    aid = wrapper != "pad"
    terms = base.terms(s, base.teacher_side(t))
    own = sum(base.coefficient(term) for term in terms) * wide.log() / 2
    inner, outer = (weight if wrapper in ("aid", "pad of aid") else 1), (weight if wrapper == "aid of pad" else 1)
    want = entries * inner if wrapper == "aid" else outer * (entries * inner / (1e-6 + narrow) + own)
    got, gradients = value_and_gradients(WRAPPERS[wrapper](base), s, t, **({"teacher_losses": T} if aid else {}))
    assert_close(got, want, RTOL_WEIGHT)
    assert all(g.abs().max() > 0 for g in gradients[:2])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_features(name, dtype):
    s, t = pyramids(8, [(2, 3, 5, 6), (2, 4, 3, 3)])
    low = [[x.detach().to(dtype) for x in levels] for levels in (s, t)]
    exact = [[x.double().requires_grad_() for x in levels] for levels in low]
    want, gradients = value_and_gradients(_make(name, *exact, reduction="none"), *exact)
    x = [level.requires_grad_() for level in low[0]]
    got, own = value_and_gradients(_make(name, *low, reduction="none"), x, low[1])
    assert got.dtype == torch.float32
    assert {g.dtype for g in own} == {dtype}
    assert_close(got, want, 2e-5)
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert_levels_close(own, [g.numpy() for g in gradients], tolerance, what="gradient of level")


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_types_layouts_and_autocast(name):
    s, t = pyramids(9, [(2, 3, 5, 6), (2, 4, 3, 3)], torch.float32)
    s, t = [x.detach().bfloat16() for x in s], [x.half() for x in t]
    want = _make(name, s, t)(s, t)
    last = [[x.contiguous(memory_format=torch.channels_last) for x in levels] for levels in (s, t)]
    assert_close(_make(name, s, t)(*last), want, 2e-5)
    named = [{f"p{i}": x for i, x in enumerate(levels)} for levels in (s, t)]
    assert_close(_make(name, s, t)(*named), want, 2e-5)
    loss = _make(name, s, t)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss([x.float() for x in s], [x.float() for x in t])
    assert got.dtype == torch.float32
    # Convolutions of a loss's own are what autocast is for.
    assert_close(got, want, 5e-2 if isinstance(loss, Trainable) else 2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_features_equal_bits(name):
    def run():
        s, t = pyramids(10, [(2, 8, 17, 19), (2, 8, 5, 3)], torch.float32)
        value, gradients = value_and_gradients(_make(name, s, t), s, t)
        return [value, *gradients]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_student_receives_a_gradient(name):
    s, t = pyramids(11)
    t = [x.requires_grad_() for x in t]
    _make(name, s, t)(s, t).backward()
    assert all(x.grad.abs().max() > 0 for x in s)
    assert all(x.grad is None for x in t)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_stay_visible(name, bad):
    s, t = pyramids(12)
    with torch.no_grad():
        s[1][1, 2, 1, 1] = bad
    loss = _make(name, s, t)
    assert not torch.isfinite(loss(s, t))
    found = loss.check()
    assert found and {f.level for f in found} == {1}
    assert all(isinstance(f, NonFinite) for f in found)


@pytest.mark.parametrize("name", LOSSES)
def test_functional(name):
    s, t = pyramids(13)
    kind, own, function, _ = LOSSES[name]
    loss = _make(name, s, t, preset="two-stage", reduction="none")
    trained = {"trained": loss.trainable} if isinstance(loss, Trainable) else {}
    assert torch.equal(function(s, t, preset="two-stage", reduction="none", **own, **trained), loss(s, t))
    assert torch.equal(function(s, t, **own), kind(**own)(s, t))
    assert torch.equal(functional.pad(kind(**own), s, t, eps=0.1), PADLoss(kind(**own), eps=0.1)(s, t))


def test_fused_gives_what_each_gives_alone():
    s, t = pyramids(14)
    losses = {name.replace(" ", "_"): _make(name, s, t) for name in LOSSES}
    losses["wrapped"] = PADLoss(AIDLoss(PKDLoss()))
    together = FusedLoss(losses)(s, t, teacher_losses=T)
    got = torch.autograd.grad(sum(together.values()), s)
    alone = {name: loss(s, t, **({"teacher_losses": T} if name == "wrapped" else {})) for name, loss in losses.items()}
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    want = torch.autograd.grad(sum(alone.values()), s)
    assert_levels_close(got, [g.numpy() for g in want], RTOL64, what="gradient of level")


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_presets_are_refused(name):
    with pytest.raises(ValueError, match=r"(?s)preset.*one-stage.*three-stage"):
        LOSSES[name][0](preset="three-stage")


def test_they_compile_as_one_graph():
    s, t = pyramids(15, [(2, 4, 5, 6)], torch.float32)
    losses = {name.replace(" ", "_"): _make(name, s, t) for name in LOSSES}
    losses["wrapped"] = AIDLoss(PADLoss(CWDLoss()))
    fused = FusedLoss(losses)
    weights = torch.tensor(0.5)

    def total(student):
        return sum(fused(student, t, teacher_losses=weights).values())

    results = []
    # The gradient at once: a compiled call writes BatchNorm's running statistics over those that an earlier graph would look at.
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        value = function(s)
        results.append((value.detach(), torch.autograd.grad(value, s)))
    (want, gradients), (got, own) = results
    assert_close(got, want, 1e-6)
    assert_levels_close(own, [g.numpy() for g in gradients], 1e-5, what="gradient of level")
    assert set(fused.losses) == set(losses) and all(g.any() for g in own)
