"""`map_distance`: every normalisation, distance, epsilon and average, value and gradient to the student's map against the loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, maps
from oracle.compare import RTOL32, RTOL64, assert_close

from kdkernels import functional

NORMALIZE, DISTANCE = ["minmax", "softmax", "zscore", "none"], ["l1", "mse", "smooth_l1"]
SIZES = [(2, 5, 6), (2, 3, 3), (2, 1, 2)]


def _maps(seed: int, sizes=SIZES, scale: float = 1.0) -> list[np.ndarray]:
    return [scale * np.abs(level[:, 0]) for level in cases.pyramid(seed, [(n, 1, h, w) for n, h, w in sizes])]


def _check(m_s, m_t, options=maps.PAPER, spatial=None, rtol=RTOL64, dtype=torch.float64):
    student, teacher = cases.tensors(m_s, dtype, requires_grad=True), cases.tensors(m_t, dtype)
    factors = None if spatial is None else cases.tensors(spatial, dtype)
    keywords = {name: getattr(options, name) for name in ("normalize", "distance", "eps", "eps_mode", "temperature", "average")}
    got = functional.map_distance(student, teacher, spatial=factors, **keywords)
    up = cases.upstream(1, *got.shape)
    factors = [None] * len(m_s) if spatial is None else spatial
    assert_close(
        got,
        np.stack([maps.map_distance(*level, options, f) for *level, f in zip(m_s, m_t, factors, strict=True)]),
        rtol,
        what="(level, image)",
    )
    gradients = torch.autograd.grad((got * torch.tensor(up)).sum(), student)
    for level, gradient in enumerate(gradients):
        want = maps.map_distance_gradient(m_s[level], m_t[level], up[level], options, factors[level])
        assert_close(gradient, want, rtol, atol=rtol / 20 * _cancelling(m_s[level], options), what=f"gradient of level {level}")
    return got, gradients


def _cancelling(m_s: np.ndarray, options: maps.Options) -> float:
    """Magnitude of the sums that cancel in the gradient at a map's minimum and maximum: N * H * W terms of 1 / (divisor * span)."""
    span = np.ptp(m_s, axis=(1, 2)).max(initial=0.0)
    return (1.0 if options.average == "nhw" else m_s[0].size) / len(m_s) / span if span > 0 else 0.0


@pytest.mark.parametrize("average", ["nhw", "n"])
@pytest.mark.parametrize("distance", DISTANCE)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_every_normalisation_and_distance(normalize, distance, average):
    _check(_maps(1, scale=1.5), _maps(2), maps.Options(normalize, distance, average=average))


@pytest.mark.parametrize("eps_mode", ["relative", "absolute"])
@pytest.mark.parametrize("eps", [1e-7, 1e-2, 0.5])
@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
def test_epsilons(normalize, eps, eps_mode):
    _check(_maps(3), _maps(4), maps.Options(normalize, "l1", eps, eps_mode))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_softmax_temperature(temperature):
    _check(_maps(5), _maps(6), maps.Options("softmax", "mse", temperature=temperature))


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_spatial_multiplies_both_normalised_maps(normalize):
    _check(_maps(7), _maps(8), maps.Options(normalize, "mse"), spatial=_maps(9))
    _check(_maps(7), _maps(8), maps.Options(normalize, "l1", average="n"), spatial=_maps(9))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize(
    "teacher_sizes", [[(2, 10, 12), (2, 2, 2), (2, 1, 1)], [(2, 3, 4), (2, 5, 7), (2, 2, 5)]], ids=["multiples", "odd"]
)
def test_the_teachers_map_is_resized_after_its_normalisation(teacher_sizes, normalize):
    m_t = _maps(11, teacher_sizes)
    _check(_maps(10), m_t, maps.Options(normalize, "smooth_l1"))
    _check(_maps(10), m_t, maps.Options(normalize, "l1"), spatial=_maps(12))


def test_exact_ties_of_minimum_and_maximum_share_the_gradient():
    m_s = np.array([[[1.0, 1.0, 3.0, 5.0, 5.0, 5.0]]])
    m_t = np.array([[[0.0, 2.0, 1.0, 3.0, 1.0, 4.0]]])
    _, (gradient,) = _check([m_s], [m_t])
    # M_S - M_T is 0 at the first minimum and negative at the second: beyond their equal shares they differ by that one 1/D.
    up = cases.upstream(1, 1, 1).item() / 6
    assert_close((gradient[0, 0, 0] - gradient[0, 0, 1]) / up, 1 / (4 * (1 + 1e-6)))


def test_minimum_and_maximum_by_hand():
    got, (gradient,) = _check([np.array([[[0.0, 1.0, 2.0, 4.0]]])], [np.array([[[0.0, 2.0, 2.0, 4.0]]])], maps.Options(eps=0.0))
    assert got.item() == 0.25 / 4
    up = cases.upstream(1, 1, 1).item() / 4
    # Only the second cell differs, M_S - M_T = -1/4: dr there -1/4; y/D^2 = 1/16 goes from the minimum to the maximum's side.
    assert_close(gradient / up, np.array([[[1 / 4 - 1 / 16, -1 / 4, 0.0, 1 / 16]]]))


@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
@pytest.mark.parametrize("eps_mode", ["relative", "absolute"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-30, 7e8])
def test_a_constant_map_is_zero_and_teaches_nothing(constant, eps_mode, normalize):
    # 0.1 in 7 cells: the mean of equal numbers is not always that number after rounding.
    m_s, m_t = np.full((1, 1, 7), constant), np.arange(7.0).reshape(1, 1, 7)
    _, (gradient,) = _check([m_s], [m_t], maps.Options(normalize, "mse", eps_mode=eps_mode))
    assert gradient.abs().max() == 0
    _check([m_t], [m_s], maps.Options(normalize, "mse", eps_mode=eps_mode))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("distance", DISTANCE)
def test_equal_maps_have_no_distance_and_no_gradient(normalize, distance):
    m = _maps(13)
    got, gradients = _check(m, m, maps.Options(normalize, distance))
    assert got.abs().max() == 0
    assert max(g.abs().max() for g in gradients) == 0


def test_single_cells():
    m_s, m_t = [np.array([[[3.0]]])], [np.array([[[5.0]]])]
    for normalize, want in (("minmax", 0.0), ("zscore", 0.0), ("softmax", 0.0), ("none", 2.0)):
        got, (gradient,) = _check(m_s, m_t, maps.Options(normalize))
        assert got.item() == want
        assert (gradient.item() != 0) == (normalize == "none")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_nan_and_infinity_stay_non_finite_for_their_image_only(normalize, bad):
    for side in (0, 1):
        both = [cases.tensors(_maps(14)), cases.tensors(_maps(15))]
        both[side][0][1, 2, 3] = bad
        got = functional.map_distance(*both, normalize=normalize)
        finite = torch.isfinite(got)
        assert not finite[0, 1], f"side {side}: {bad} came out as {got[0, 1].item()}"
        assert finite.sum() == got.numel() - 1


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("distance", DISTANCE)
def test_fp32(normalize, distance):
    m_s, m_t = cases.rounded(_maps(16), torch.float32), cases.rounded(_maps(17), torch.float32)
    got, _ = _check(m_s, m_t, maps.Options(normalize, distance), rtol=RTOL32, dtype=torch.float32)
    assert got.dtype == torch.float32


def test_the_relative_epsilon_keeps_tiny_maps_and_the_absolute_one_removes_them():
    m_s, m_t = cases.rounded(_maps(18, scale=1e-12), torch.float32), cases.rounded(_maps(19, scale=1e-12), torch.float32)
    relative, _ = _check(m_s, m_t, rtol=RTOL32, dtype=torch.float32)
    absolute, _ = _check(m_s, m_t, maps.Options(eps=1e-7, eps_mode="absolute"), rtol=RTOL32, dtype=torch.float32)
    assert relative.min() > 1e-2
    assert absolute.max() < 1e-4


@pytest.mark.parametrize("normalize", ["minmax", "zscore"])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_maps_of_any_scale_that_fp32_holds(scale, normalize):
    # Gradients times a loss scale or an underflowing one: a variance of 1e-44 or 1e60 is not an fp32 number.
    m_s, m_t = cases.rounded(_maps(22, scale=scale), torch.float32), cases.rounded(_maps(23), torch.float32)
    got = functional.map_distance(cases.tensors(m_s, torch.float32), cases.tensors(m_t, torch.float32), normalize=normalize)
    want = [maps.map_distance(*level, maps.Options(normalize)) for level in zip(m_s, m_t, strict=True)]
    assert_close(got, np.stack(want), rtol=RTOL32)


def test_tiny_is_the_smallest_normal_number_of_the_accumulation_type():
    m_s, m_t = [np.array([[[0.0, 2.0**-126]]])], [np.array([[[0.0, 0.0]]])]
    got = functional.map_distance(cases.tensors(m_s, torch.float32), cases.tensors(m_t, torch.float32))
    want = maps.map_distance(m_s[0], m_t[0], maps.Options(tiny=2.0**-126))
    assert_close(got[0], want, rtol=1e-6)
    assert 0.2 < want.item() < 0.3  # half of a map's maximum over two cells, because the span is tiny itself


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_gradcheck(normalize, distance):
    m_s, m_t = _maps(20, [(2, 3, 2)]), _maps(21, [(2, 3, 2)])
    inputs = cases.tensors(m_s + m_t, requires_grad=True)

    def function(a, b):
        return functional.map_distance([a], [b], normalize=normalize, distance=distance, eps=0.1)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@given(
    size=st.tuples(*[st.integers(1, high) for high in (3, 6, 6)]),
    seed=st.integers(0, 99),
    normalize=st.sampled_from(NORMALIZE),
    distance=st.sampled_from(DISTANCE),
)
def test_any_shape(size, seed, normalize, distance):
    _check(_maps(seed, [size]), _maps(seed + 100, [size]), maps.Options(normalize, distance))


def test_empty():
    assert functional.map_distance([], []).shape[0] == 0
    assert functional.map_distance([torch.zeros(0, 2, 2)], [torch.zeros(0, 2, 2)]).shape == (1, 0)


def test_shapes_that_do_not_fit_are_refused_with_both_sides():
    with pytest.raises(ValueError, match=r"(?s)(2, 4, 4).*(3, 4, 4)"):
        functional.map_distance([torch.zeros(2, 4, 4)], [torch.zeros(3, 4, 4)])
    with pytest.raises(ValueError, match=r"(?s)5, 4.*4, 4"):
        functional.map_distance([torch.zeros(2, 4, 4)], [torch.zeros(2, 4, 4)], spatial=[torch.zeros(2, 5, 4)])


@pytest.mark.parametrize(("name", "value"), [("normalize", "max"), ("distance", "l3"), ("eps_mode", "auto"), ("average", "c")])
def test_unknown_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}|{value}.*{name}"):
        functional.map_distance([torch.zeros(1, 2, 2)], [torch.zeros(1, 2, 2)], **{name: value})
