"""BMFILoss: each term on its own and all together, every option, value and gradient against the loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import bmfi, cases
from oracle.compare import RTOL32, RTOL64, RTOL_MASK, assert_close, assert_levels_close

from kdkernels import BMFILoss, functional

COEFFICIENTS = {"region": "alpha", "attention": "gamma", "whole": "lambda_", "background": "beta_bg"}
OFF = bmfi.BMFI(alpha=0.0, gamma=0.0, lambda_=0.0, beta_bg=0.0)
ALL = bmfi.BMFI(weight=0.5, alpha=0.4, gamma=0.3, lambda_=0.2, beta_bg=0.1)
# Terms whose spatial factor holds a gaussian or exponential mask are as exact as that fp32 mask; all others are fp64.
USES_MASK = {"region"}


def _only(term: str, coefficient: float = 0.7) -> bmfi.BMFI:
    return dataclasses.replace(OFF, **{COEFFICIENTS[term]: coefficient})


def _check(inputs, options, rtol=RTOL64, boxes=cases.BOXES, image_size=cases.IMAGE_SIZE, loss=None):
    s, t = inputs
    x = cases.tensors(s, requires_grad=True)
    loss = BMFILoss(**dataclasses.asdict(options), reduction="none") if loss is None else loss
    got = loss(x, cases.tensors(t), cases.box_tensors(boxes), image_size)
    assert_close(got, bmfi.value(s, t, boxes, image_size, options), rtol, what="(level, image)")
    up = cases.upstream(0, *got.shape)
    gradients = torch.autograd.grad((got * torch.tensor(up)).sum(), x, allow_unused=True)
    want = bmfi.gradient(s, t, boxes, image_size, options, up)
    # The attention term's gradient is a difference of sums, which cancels altogether in a level of one cell.
    atol = RTOL64 * max(np.abs(level).max() for level in want)
    assert_levels_close(gradients, want, rtol, atol=atol, what="gradient of level")
    return got


def _two(seed, shapes=cases.SHAPES):
    return cases.four(seed, shapes)[:2]


@pytest.mark.parametrize("attention_from", ["teacher", "mean"])
@pytest.mark.parametrize("temperature", [0.5, 0.1, 2.0])
@pytest.mark.parametrize("term", bmfi.TERMS)
def test_each_term(term, temperature, attention_from):
    options = dataclasses.replace(_only(term), temperature=temperature, attention_from=attention_from)
    _check(_two(1), options, RTOL_MASK if term in USES_MASK else RTOL64)


@pytest.mark.parametrize("term", bmfi.TERMS)
def test_each_term_level_and_image_on_its_own(term):
    s, t = _two(2)
    x = cases.tensors(s, requires_grad=True)
    boxes = cases.box_tensors()
    got = BMFILoss(**dataclasses.asdict(_only(term)), reduction="none")(x, cases.tensors(t), boxes, cases.IMAGE_SIZE)
    for level in range(3):
        for image in range(2):
            one = np.zeros((3, 2))
            one[level, image] = 1.0
            gradients = torch.autograd.grad(got[level, image], x, retain_graph=True, allow_unused=True)
            want = bmfi.term_gradient(term, s, t, cases.BOXES, cases.IMAGE_SIZE, _only(term), one)
            assert_levels_close(gradients, want, RTOL_MASK, atol=1e-12, what=f"{term}, entry {level}, {image}: gradient of level")
            assert gradients[level][1 - image].abs().max() == 0


@pytest.mark.parametrize("attention_from", ["teacher", "mean"])
def test_terms_add_up(attention_from):
    options = dataclasses.replace(ALL, attention_from=attention_from)
    got = _check(_two(3), options, RTOL_MASK)
    total = 0.0
    for one in ({"alpha": 0.4}, {"gamma": 0.3}, {"lambda_": 0.2}, {"beta_bg": 0.1}):
        total = total + _check(_two(3), dataclasses.replace(OFF, weight=0.5, attention_from=attention_from, **one), RTOL_MASK)
    assert_close(got, total, rtol=1e-12)


def test_terms_are_named_and_only_those_with_a_coefficient_are_computed():
    s, t = (cases.tensors(levels) for levels in _two(4))
    boxes = cases.box_tensors()
    for options in (ALL, bmfi.BMFI(), _only("whole")):
        loss = BMFILoss(**dataclasses.asdict(options))
        terms = loss.terms(s, loss.teacher_side(t, boxes=boxes, image_size=cases.IMAGE_SIZE))
        assert set(terms) == {term for term in bmfi.TERMS if options.coefficient(term) != 0}
        for term, value in terms.items():
            want = bmfi.term_value(term, *_two(4), cases.BOXES, cases.IMAGE_SIZE, options)
            assert_close(value, want, RTOL_MASK if term in USES_MASK else RTOL64, what=term)


def test_defaults():
    got = _check(_two(5), bmfi.BMFI(), RTOL_MASK, loss=BMFILoss(reduction="none"))
    assert_close(BMFILoss()(*map(cases.tensors, _two(5)), cases.box_tensors(), cases.IMAGE_SIZE), got.sum(), rtol=1e-14)


@pytest.mark.parametrize("term", ["region", "background"])
@pytest.mark.parametrize(
    ("change", "exact"),
    [
        ({"mask": "gaussian"}, False),
        ({"mask": "exponential"}, False),
        ({"mask": "area"}, True),
        ({"mask": "binary"}, True),
        ({"expand": 1.5}, False),
        ({"expand": 1.0}, True),
        ({"inner_ones": False}, False),
        ({"area_norm": False}, False),
        ({"placement": "released"}, False),
    ],
    ids=str,
)
def test_masks(change, exact, term):
    boxes = [np.array([[40.0, 24.0, 56.0, 40.0], [30.0, 10.0, 60.0, 50.0]]), np.array([[36.0, 20.0, 50.0, 40.0]])]
    _check(_two(6), dataclasses.replace(_only(term), **change), RTOL64 if exact or term == "background" else RTOL_MASK, boxes)


@pytest.mark.parametrize("term", bmfi.TERMS)
def test_the_mean_attention_is_a_constant(term):
    # FBKD detaches it: the gradient of the imitation is 2 * factor * (F_S - F_T), however the factor depends on F_S.
    s, t = _two(7, [(1, 2, 2, 3)])
    options = dataclasses.replace(_only(term), attention_from="mean")
    boxes = [cases.BOXES[1]]
    x = cases.tensors(s, requires_grad=True)
    loss = BMFILoss(**dataclasses.asdict(options))
    (gradient,) = torch.autograd.grad(loss(x, cases.tensors(t), cases.box_tensors(boxes), cases.IMAGE_SIZE), x)
    want = bmfi.term_gradient(term, s, t, boxes, cases.IMAGE_SIZE, options, np.ones((1, 1)))
    assert_close(gradient, want[0], RTOL_MASK)


@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    images=st.integers(1, 3),
    temperature=st.sampled_from([0.2, 0.5, 1.0]),
    attention_from=st.sampled_from(["teacher", "mean"]),
    mask=st.sampled_from(["gaussian", "exponential", "area", "binary"]),
    expand=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)
def test_any_shape_and_boxes(seed, sizes, images, **options):
    rng = np.random.RandomState(seed)
    boxes = []
    for _ in range(images):
        corner = rng.uniform(-10, 80, (rng.randint(0, 4), 2))
        boxes.append(np.concatenate([corner, corner + rng.uniform(1, 60, corner.shape)], axis=1).astype(np.float32))
    _check(_two(seed, [(images, *size) for size in sizes]), dataclasses.replace(ALL, **options), RTOL_MASK, boxes)


def test_the_order_of_the_boxes_does_not_matter():
    s, t = (cases.tensors(levels) for levels in _two(8))
    boxes = cases.box_tensors()
    loss = BMFILoss(beta_bg=0.1)
    want = loss(s, t, boxes, cases.IMAGE_SIZE)
    assert torch.equal(loss(s, t, [boxes[0][[2, 0, 1]], boxes[1]], cases.IMAGE_SIZE), want)
    padded = torch.zeros(2, 5, 4)
    padded[0, :3], padded[1, :1] = boxes[0], boxes[1]
    assert torch.equal(loss(s, t, (padded, torch.tensor([3, 1])), cases.IMAGE_SIZE), want)


def test_equal_features_have_no_loss_and_no_gradient():
    t = cases.tensors(_two(9)[1])
    x = [level.clone().requires_grad_() for level in t]
    loss = BMFILoss(**dataclasses.asdict(ALL))(x, t, cases.box_tensors(), cases.IMAGE_SIZE)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, x))


def test_only_the_student_receives_a_gradient():
    s, t = (cases.tensors(levels, requires_grad=True) for levels in _two(10))
    options = dataclasses.replace(ALL, attention_from="mean")
    BMFILoss(**dataclasses.asdict(options))(s, t, cases.box_tensors(), cases.IMAGE_SIZE).backward()
    assert all(level.grad.abs().max() > 0 for level in s)
    assert all(level.grad is None or level.grad.abs().max() == 0 for level in t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_inputs_are_computed_in_fp32(dtype):
    s, t = (cases.rounded(levels, dtype) for levels in _two(11))
    x = cases.tensors(s, dtype, requires_grad=True)
    got = BMFILoss(**dataclasses.asdict(ALL), reduction="none")(x, cases.tensors(t, dtype), cases.box_tensors(), cases.IMAGE_SIZE)
    assert got.dtype == torch.float32
    assert_close(got, bmfi.value(s, t, cases.BOXES, cases.IMAGE_SIZE, ALL), rtol=RTOL32)
    gradients = torch.autograd.grad(got.sum(), x)
    assert {g.dtype for g in gradients} == {dtype}
    want = bmfi.gradient(s, t, cases.BOXES, cases.IMAGE_SIZE, ALL, np.ones((3, 2)))
    # Half a unit of the gradient's own type, for each of the four terms that autograd may add in it.
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[dtype]
    assert_levels_close(gradients, want, rtol=max(4 * unit, RTOL32), what="gradient of level")


def test_mixed_dtypes_layouts_dicts_and_autocast():
    s, t = cases.rounded(_two(12)[0], torch.bfloat16), cases.rounded(_two(12)[1], torch.float16)
    args = [
        {f"p{i}": level.contiguous(memory_format=torch.channels_last) for i, level in enumerate(cases.tensors(levels, dtype))}
        for levels, dtype in ((s, torch.bfloat16), (t, torch.float16))
    ]
    loss = BMFILoss(**dataclasses.asdict(ALL), reduction="none")
    want = bmfi.value(s, t, cases.BOXES, cases.IMAGE_SIZE, ALL)
    got = loss(*args, cases.box_tensors(), cases.IMAGE_SIZE)
    assert got.dtype == torch.float32
    assert_close(got, want, rtol=RTOL32)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(cases.tensors(s, torch.float32), cases.tensors(t, torch.float32), cases.box_tensors(), cases.IMAGE_SIZE)
    assert got.dtype == torch.float32
    assert_close(got, want, rtol=RTOL32)


def test_repeats_are_equal_bit_for_bit():
    def run():
        s, t = (cases.tensors(levels, torch.float32) for levels in _two(13, [(2, 8, 17, 19), (2, 8, 5, 3)]))
        x = [level.requires_grad_() for level in s]
        value = BMFILoss(**dataclasses.asdict(ALL))(x, t, cases.box_tensors(), cases.IMAGE_SIZE)
        return [value, *torch.autograd.grad(value, x)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("term", bmfi.TERMS)
def test_gradcheck(term):
    s, t = (cases.tensors(levels) for levels in _two(14, [(2, 2, 2, 2), (2, 3, 1, 2)]))
    x = [level.requires_grad_() for level in s]
    loss = BMFILoss(**dataclasses.asdict(_only(term)), reduction="none")

    def function(*levels):
        return loss(levels, t, cases.box_tensors(), cases.IMAGE_SIZE)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_functional():
    args = [*map(cases.tensors, _two(15)), cases.box_tensors(), cases.IMAGE_SIZE]
    want = bmfi.value(*_two(15), cases.BOXES, cases.IMAGE_SIZE, bmfi.BMFI(lambda_=0.3))
    assert_close(functional.bmfi(*args, lambda_=0.3), want.sum(), RTOL_MASK)
    assert_close(functional.bmfi(*args, lambda_=0.3, reduction="none"), want, RTOL_MASK)


def test_boxes_may_be_left_out_when_no_term_needs_them():
    s, t = _two(16)
    options = dataclasses.replace(OFF, gamma=0.3, lambda_=0.2)
    got = BMFILoss(**dataclasses.asdict(options), reduction="none")(cases.tensors(s), cases.tensors(t))
    assert_close(got, bmfi.value(s, t, cases.BOXES, cases.IMAGE_SIZE, options))


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask", "round"), ("placement", "left"), ("attention_from", "student"), ("reduction", "mean"), ("on_nonfinite", "warn")],
)
def test_unknown_options_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"(?s){name}.*{value}|{value}.*{name}"):
        BMFILoss(**{name: value})
