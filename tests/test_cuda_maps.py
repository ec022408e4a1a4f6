"""`map_distance` by the CUDA kernels, emulated: what `test_native_maps` leaves out, in every order of threads and blocks."""

from __future__ import annotations

import pytest
import torch
from cuda_support import ORDERS, with_cuda_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import relative_error
from maps_support import DISTANCES, NORMALIZERS, check, kernels, maps, value_and_gradients
from native_support import VALUE
from toolchain import needs_compiler

pytestmark = needs_compiler
STATE = ("shift", "centre", "scale", "shift_t", "centre_t", "scale_t", "a", "b")
#: More levels than one launch takes; among them maps of a pixel, of more pixels than a block has threads, and than these load at a time.
MANY = [(2, 5, 7), (2, 1, 1), (2, 19, 27), (2, 4, 4), (2, 67, 62), (2, 1, 67), (2, 3, 3), (2, 2, 2), (2, 9, 1), (2, 1, 3)]


@pytest.fixture(autouse=True)
def emulator():
    with with_cuda_kernels(ORDERS) as found:
        yield found


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_many_levels(normalize, emulator):
    rows, *gradients = check(maps(MANY, 1), maps(MANY, 2), maps(MANY, 3), normalize=normalize, distance="smooth_l1")
    assert rows.shape == (len(MANY), 2) and all(x.isfinite().all() for x in (rows, *gradients))
    emulator.reset_counts()
    value_and_gradients(kernels, maps(MANY, 1), maps(MANY, 2), torch.ones(len(MANY), 2), normalize=normalize)
    assert emulator.counts()["launches"] == 4


@settings(max_examples=8)
@given(
    images=st.integers(1, 3),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 50)), min_size=1, max_size=3),
    normalize=st.sampled_from(NORMALIZERS),
    distance=st.sampled_from(DISTANCES),
    weighted=st.booleans(),
)
def test_any_sizes(images, sizes, normalize, distance, weighted):
    shapes = [(images, *size) for size in sizes]
    rows, *_ = check(maps(shapes, 4), maps(shapes, 5), maps(shapes, 6) if weighted else None, normalize=normalize, distance=distance)
    assert rows.shape == (len(sizes), images)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_the_state_is_that_of_the_kernels_for_the_cpu(normalize):
    """Both sides' may be mixed: Python passes the state of any forward to the backward."""
    packed, other, factors = (torch.cat([x.flatten() for x in maps(MANY, seed)]) for seed in (1, 2, 3))
    arguments = (2, [h * w for _, h, w in MANY], normalize, "softmax", "mse", 0.01, False, 0.7, "nhw")
    operators = torch.ops.kdkernels_emulated, torch.ops.kdkernels_native
    (rows, state), (want_rows, want) = (o.map_distance(packed, other, factors, *arguments) for o in operators)
    assert relative_error(rows, want_rows) < VALUE and state.shape == want.shape == (len(MANY), 2, len(STATE))
    for name, got, expected in zip(STATE, state.unbind(2), want.unbind(2), strict=True):
        assert relative_error(got, expected) < VALUE, name
    gradient, want_gradient = (o.map_distance_backward(packed, other, factors, want, want_rows, *arguments) for o in operators)
    assert relative_error(gradient, want_gradient) < 1e-6


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_equal_maps_have_no_distance(normalize, distance):
    m = maps(MANY[:4], 1)
    rows, *gradients = value_and_gradients(kernels, m, m, torch.ones(4, 2), normalize=normalize, distance=distance)
    assert rows.eq(0).all() and all(x.eq(0).all() for x in gradients)


@pytest.mark.parametrize("wrong", ["m_t", "state", "grad", "type of grad"])
def test_the_backward_refuses_what_does_not_fit(wrong):
    given = {"m_s": torch.ones(4), "m_t": torch.ones(4), "spatial": None, "state": torch.ones(2, 8), "grad": torch.ones(2)}
    options = (2, [2], "minmax", "minmax", "l1", 0.0, True, 1.0, "n")
    operator = torch.ops.kdkernels_emulated.map_distance_backward
    assert operator(*given.values(), *options).shape == (4,)
    given[wrong.split()[-1]] = torch.ones(2).double() if wrong.startswith("type") else torch.ones(3)
    with pytest.raises(RuntimeError, match="expected"):
        operator(*given.values(), *options)
