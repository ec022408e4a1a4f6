"""GKDLoss, map form: every option and preset, each level and image on its own, value and gradient against the loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, gkd, numeric
from oracle.compare import RTOL32, RTOL64, RTOL_MASK, assert_close, assert_levels_close

from kdkernels import GKDLoss, functional

PRESETS = {"paper": gkd.PAPER, "release": gkd.RELEASE}
CHANGES = [
    {"channel_weight": "signed"},
    {"channel_weight": "abs"},
    {"channel_weight": "elementwise"},
    {"activation": "raw"},
    {"activation": "abs"},
    {"rectify": "abs"},
    {"rectify": "relu"},
    {"rectify": "none"},
    {"normalize": "softmax"},
    {"normalize": "softmax", "temperature": 2.0},
    {"normalize": "zscore"},
    {"normalize": "none"},
    {"distance": "mse"},
    {"distance": "smooth_l1"},
    {"distance": "smooth_l1", "normalize": "none", "weight": 0.25},
    {"eps": 0.25},
    {"eps": 0.25, "eps_mode": "absolute"},
    {"eps": 1e-3, "eps_mode": "relative"},
    {"average": "n"},
    {"weight": 3.5},
]


def _loss(options: gkd.GKD, **more) -> GKDLoss:
    return GKDLoss(**dataclasses.asdict(options), **more)


def _check(inputs, options, loss=None, rtol=RTOL64, boxes=None, image_size=None):
    """(L, N) and the gradient of a weighted sum of its entries."""
    s, t, g_s, g_t = inputs
    x = cases.tensors(s, requires_grad=True)
    loss = _loss(options, reduction="none") if loss is None else loss
    extra = {} if boxes is None else {"boxes": cases.box_tensors(boxes), "image_size": image_size}
    got = loss(x, cases.tensors(t), cases.tensors(g_s), cases.tensors(g_t), **extra)
    up = cases.upstream(0, *got.shape)
    assert_close(got, gkd.map_value(s, t, g_s, g_t, options, boxes, image_size), rtol, what="(level, image)")
    gradients = torch.autograd.grad((got * torch.tensor(up)).sum(), x, allow_unused=True)
    want = gkd.map_gradient(s, t, g_s, g_t, up, options, boxes, image_size)
    # At a map's minimum and maximum the gradient is a difference of sums as large as the largest gradient of the whole pyramid.
    assert_levels_close(gradients, want, rtol, atol=rtol * max(np.abs(level).max() for level in want), what="gradient of level")
    return got


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    got = _check(cases.four(1), PRESETS[preset], GKDLoss(preset=preset, reduction="none"))
    assert got.shape == (3, 2)
    assert got[:2].min() > 0


def test_paper_is_the_default_preset_and_given_options_win_over_a_preset():
    inputs = cases.four(2)
    _check(inputs, gkd.PAPER, GKDLoss(reduction="none"))
    mixed = dataclasses.replace(gkd.RELEASE, channel_weight="signed", eps=1e-3)
    _check(inputs, mixed, GKDLoss(preset="release", channel_weight="signed", eps=1e-3, reduction="none"))


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_each_option(preset, change):
    _check(cases.four(3), dataclasses.replace(PRESETS[preset], **change))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_level_and_image_on_its_own(preset):
    s, t, g_s, g_t = cases.four(4)
    x = cases.tensors(s, requires_grad=True)
    got = GKDLoss(preset=preset, reduction="none")(x, cases.tensors(t), cases.tensors(g_s), cases.tensors(g_t))
    for level in range(3):
        for image in range(2):
            one = np.zeros((3, 2))
            one[level, image] = 1.0
            gradients = torch.autograd.grad(got[level, image], x, retain_graph=True, allow_unused=True)
            want = gkd.map_gradient(s, t, g_s, g_t, one, PRESETS[preset])
            assert_levels_close(gradients, want, atol=1e-12, what=f"entry {level}, {image}: gradient of level")
            assert gradients[level][1 - image].abs().max() == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_sum_is_the_sum_of_the_entries(preset):
    args = [cases.tensors(levels) for levels in cases.four(5)]
    want = gkd.map_value(*cases.four(5), dataclasses.replace(PRESETS[preset], weight=0.7)).sum()
    scalar = GKDLoss(weight=0.7, preset=preset)(*args)
    assert scalar.shape == ()
    assert_close(scalar, want)
    assert_close(GKDLoss(weight=0.7, preset=preset, reduction="none")(*args).sum(), want)


@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    images=st.integers(1, 3),
    channel_weight=st.sampled_from(["signed", "abs", "elementwise"]),
    activation=st.sampled_from(["raw", "abs"]),
    rectify=st.sampled_from(["abs", "relu", "none"]),
    normalize=st.sampled_from(["minmax", "softmax", "zscore", "none"]),
    distance=st.sampled_from(["l1", "mse", "smooth_l1"]),
    eps_mode=st.sampled_from(["relative", "absolute"]),
    average=st.sampled_from(["nhw", "n"]),
)
def test_any_shape_and_combination(seed, sizes, images, **options):
    _check(cases.four(seed, [(images, *size) for size in sizes]), gkd.GKD(eps=1e-2, **options))


@pytest.mark.parametrize("average", ["nhw", "n"])
@pytest.mark.parametrize("normalize", ["minmax", "softmax"])
def test_maps_weighted_by_the_root_of_the_box_mask(normalize, average):
    options = gkd.GKD(box_weight="sqrt_mask", average=average, normalize=normalize)
    _check(cases.four(6), options, rtol=RTOL_MASK, boxes=cases.BOXES, image_size=cases.IMAGE_SIZE)


def test_boxes_change_nothing_without_box_weight():
    _check(cases.four(6), gkd.PAPER, boxes=None)
    args = [cases.tensors(levels) for levels in cases.four(6)]
    assert torch.equal(GKDLoss()(*args, boxes=cases.box_tensors(), image_size=cases.IMAGE_SIZE), GKDLoss()(*args))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_teacher_may_have_other_channels_and_sizes(preset):
    s, _, g_s, _ = cases.four(7)
    other = [(2, 5, 10, 12), (2, 1, 2, 4), (2, 3, 1, 1)]
    _, t, _, g_t = cases.four(8, other)
    _check((s, t, g_s, g_t), PRESETS[preset])


def _second_order(options, s, factor):
    """Student gradients of the made-up detection loss sum(factor * F^3), kept in the graph."""
    x = cases.tensors(s, requires_grad=True)
    task = sum((torch.tensor(k) * level**3).sum() for k, level in zip(factor, x, strict=True))
    return x, torch.autograd.grad(task, x, create_graph=True)


@pytest.mark.parametrize("change", [{}, {"channel_weight": "abs"}, {"channel_weight": "elementwise"}, {"distance": "mse"}], ids=str)
def test_second_order_goes_through_the_students_weights(change):
    options = gkd.GKD(**change)
    s, t, factor, g_t = cases.four(10, [(2, 3, 3, 2), (2, 2, 2, 2)])
    x, g_s = _second_order(options, s, factor)
    loss = _loss(options, grad_mode="second_order")(x, cases.tensors(t), g_s, cases.tensors(g_t))
    gradients = torch.autograd.grad(loss, x)
    for level in range(2):

        def value(features, level=level):
            one = [features], [t[level]], [3 * factor[level] * features**2], [g_t[level]]
            return float(gkd.map_value(*one, options).sum())

        assert_close(gradients[level], numeric.gradient(value, s[level]), rtol=1e-8, atol=1e-11, what=f"level {level}")
    detached = _loss(options)(x, cases.tensors(t), g_s, cases.tensors(g_t))
    assert torch.equal(loss, detached)
    first = torch.autograd.grad(detached, x)
    assert max((a - b).abs().max() for a, b in zip(first, gradients, strict=True)) > 1e-4
    want = gkd.map_gradient(s, t, [3 * k * f**2 for k, f in zip(factor, s, strict=True)], g_t, np.ones((2, 2)), options)
    assert_levels_close(first, want, atol=1e-12, what="detached weights, level")


@pytest.mark.parametrize("preset", PRESETS)
def test_grad_mode_none_has_the_value_and_no_gradient(preset):
    s, t, g_s, g_t = cases.four(10)
    loss = GKDLoss(preset=preset, grad_mode="none")(cases.tensors(s, requires_grad=True), *map(cases.tensors, (t, g_s, g_t)))
    assert not loss.requires_grad
    assert_close(loss, gkd.map_value(s, t, g_s, g_t, PRESETS[preset]).sum())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", ["map", "imitation"])
def test_only_the_students_features_receive_a_gradient(form, preset):
    x, t, g_s, g_t = (cases.tensors(levels, requires_grad=True) for levels in cases.four(11))
    GKDLoss(preset=preset, form=form)(x, t, g_s, g_t).backward()
    assert all(level.grad.abs().max() > 0 for level in x)
    assert all(level.grad is None or level.grad.abs().max() == 0 for level in (*t, *g_s, *g_t))


def test_exact_ties_share_the_gradient():
    # Equal weights and small integers: r = |sum| has two minima and two maxima exactly.
    s = [np.array([[[[1.0, 3.0, 1.0, 2.0, 3.0]], [[1.0, 1.0, 1.0, 1.0, 1.0]]]])]
    t = [np.array([[[[1.0, 2.0, 5.0, 4.0, 1.0]], [[2.0, 1.0, 1.0, 3.0, 2.0]]]])]
    g = [np.ones((1, 2, 1, 5))]
    _check((s, t, g, g), gkd.PAPER)
    _check((s, t, g, g), gkd.RELEASE)


@pytest.mark.parametrize("exponent", [16, -20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_paper_preset_does_not_see_the_scale_of_the_gradients(dtype, exponent):
    s, t, g_s, g_t = cases.four(12)

    def run(scale, loss):
        x = cases.tensors(s, dtype, requires_grad=True)
        value = loss(x, cases.tensors(t, dtype), *([1e-3 * scale * g for g in cases.tensors(levels, dtype)] for levels in (g_s, g_t)))
        return value, *torch.autograd.grad(value, x)

    # Scaling by a power of two commutes with every rounding, so that even the last bit stays.
    for a, b in zip(run(1.0, GKDLoss()), run(2.0**exponent, GKDLoss()), strict=True):
        assert torch.equal(a, b)
    rtol = RTOL32 if dtype == torch.float32 else RTOL64
    for a, b in zip(run(1.0, GKDLoss()), run(997.0, GKDLoss()), strict=True):
        assert_close(b, a, rtol, atol=rtol)
    if exponent < 0:
        plain, tiny = (run(scale, GKDLoss(preset="release"))[0].item() for scale in (1.0, 2.0**exponent))
        assert tiny < 0.5 * plain, "the released absolute epsilon removes small maps"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", PRESETS)
def test_16_bit_inputs_are_computed_in_fp32(preset, dtype):
    inputs = [cases.rounded(levels, dtype) for levels in cases.four(13)]
    x = cases.tensors(inputs[0], dtype, requires_grad=True)
    got = GKDLoss(preset=preset, reduction="none")(x, *(cases.tensors(levels, dtype) for levels in inputs[1:]))
    assert got.dtype == torch.float32
    assert_close(got, gkd.map_value(*inputs, PRESETS[preset]), rtol=RTOL32)
    gradients = torch.autograd.grad(got.sum(), x)
    assert {g.dtype for g in gradients} == {dtype}
    want = gkd.map_gradient(*inputs, np.ones((3, 2)), PRESETS[preset])
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[dtype]
    largest = max(np.abs(level).max() for level in want)
    assert_levels_close(gradients, want, rtol=max(unit, RTOL32), atol=RTOL32 * largest, what="gradient of level")


def test_mixed_dtypes_layouts_and_dicts():
    s, t, g_s, g_t = cases.four(14)
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float16]
    held = [cases.rounded(levels, dtype) for levels, dtype in zip((s, t, g_s, g_t), dtypes, strict=True)]
    args = [
        {f"p{i}": level.contiguous(memory_format=torch.channels_last) for i, level in enumerate(cases.tensors(levels, dtype))}
        for levels, dtype in zip(held, dtypes, strict=True)
    ]
    got = GKDLoss(reduction="none")(*args)
    assert got.dtype == torch.float32
    assert_close(got, gkd.map_value(*held), rtol=RTOL32)


def test_autocast_does_not_lower_the_precision():
    inputs = [cases.rounded(levels, torch.float32) for levels in cases.four(15)]
    with torch.autocast("cpu", torch.bfloat16):
        got = GKDLoss(reduction="none")(*(cases.tensors(levels, torch.float32) for levels in inputs))
    assert got.dtype == torch.float32
    assert_close(got, gkd.map_value(*inputs), rtol=RTOL32)


@pytest.mark.parametrize("preset", PRESETS)
def test_repeats_are_equal_bit_for_bit(preset):
    def run():
        x, *others = (cases.tensors(levels, torch.float32) for levels in cases.four(16, [(2, 8, 17, 19), (2, 8, 5, 3)]))
        x = [level.requires_grad_() for level in x]
        value = GKDLoss(preset=preset)(x, *others)
        return [value, *torch.autograd.grad(value, x)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("change", [{"distance": "mse"}, {"distance": "mse", "normalize": "zscore", "activation": "abs"}], ids=str)
def test_gradcheck(change):
    s, t, g_s, g_t = (cases.tensors(levels) for levels in cases.four(17, [(2, 3, 2, 3), (2, 2, 3, 1)]))
    x = [level.requires_grad_() for level in s]

    def function(*levels):
        return GKDLoss(eps=0.1, reduction="none", **change)(levels, t, g_s, g_t)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_gradcheck_second_order():
    s, t, factor, g_t = (cases.tensors(levels) for levels in cases.four(18, [(2, 2, 2, 3)]))

    def function(features):
        gradient = 3 * factor[0] * features**2
        return GKDLoss(grad_mode="second_order", distance="mse", eps=0.1)([features], t, [gradient], g_t)

    assert torch.autograd.gradcheck(function, [s[0].requires_grad_()])
    assert torch.autograd.gradgradcheck(function, [s[0]])


@pytest.mark.parametrize("preset", PRESETS)
def test_functional(preset):
    args = [cases.tensors(levels) for levels in cases.four(19)]
    assert_close(functional.gkd(*args, preset=preset, weight=2.0), 2 * gkd.map_value(*cases.four(19), PRESETS[preset]).sum())
    assert_close(functional.gkd(*args, preset=preset, reduction="none"), gkd.map_value(*cases.four(19), PRESETS[preset]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"channel_weight": "abs", "activation": "abs", "rectify": "relu", "distance": "mse", "average": "n"}, None),
        ({"preset": "release", "eps_mode": "relative"}, None),
        ({"preset": "release"}, "absolute"),
        ({"normalize": "softmax"}, "softmax"),
        ({"normalize": "zscore"}, "zscore"),
        ({"normalize": "none"}, "none"),
        ({"grad_mode": "second_order"}, "second_order"),
        ({"form": "imitation", "preset": "release"}, None),
    ],
    ids=str,
)
def test_what_depends_on_the_scale_of_the_students_gradients_is_refused_inline(options, reason):
    refusal = GKDLoss(**options).inline_refusal()
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in refusal


def test_needs():
    assert GKDLoss().needs == {"student_gradients", "teacher_gradients"}
    assert GKDLoss(box_weight="sqrt_mask").needs == {"student_gradients", "teacher_gradients", "boxes"}
    assert GKDLoss(form="imitation").needs == {"teacher_gradients"}
    assert [GKDLoss(form=form).compares_features for form in ("map", "imitation")] == [False, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", "official"),
        ("form", "maps"),
        ("channel_weight", "mean"),
        ("activation", "relu"),
        ("rectify", "clip"),
        ("normalize", "l2"),
        ("distance", "l2"),
        ("eps_mode", "auto"),
        ("average", "hw"),
        ("box_weight", "mask"),
        ("grad_mode", "first"),
        ("reduction", "mean"),
        ("on_nonfinite", "ignore"),
    ],
)
def test_unknown_options_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"(?s){name}.*{value}|{value}.*{name}"):
        GKDLoss(**{name: value})
