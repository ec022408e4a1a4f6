"""`random_mask`: Philox against its published answers, masks against integers of Python, gradients, dtypes and layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases, pixels

from kdkernels import functional
from kdkernels.reference.random_mask import philox

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
#: Counter, key and result of philox4x32-10, from tests/kat_vectors of Random123 1.14.
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text):
    return tuple(int(word, 16) for word in text.split())


def _state(seed, call=0):
    return torch.tensor([seed, call], dtype=torch.int64)


def _kept(seed, call, ratio, levels):
    return [pixels.kept_pixels(seed, call, ratio, index, x.shape)[:, None] for index, x in enumerate(levels)]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_philox_gives_its_published_answers(counter, key, answer):
    assert pixels.philox(_words(counter), _words(key)) == _words(answer)
    found = philox(*([torch.tensor(word) for word in _words(text)] for text in (counter, key)))
    assert tuple(map(int, found)) == _words(answer)


def test_the_first_pixel_of_seed_0_has_the_first_published_word():
    x, bar = torch.ones(1, 1, 1, 1), 0x6627E8D5 / 2**32
    assert functional.random_mask([x], _state(0), bar)[0].item() == 1
    assert functional.random_mask([x], _state(0), bar + 2**-32)[0].item() == 0


@pytest.mark.parametrize("call", [0, 1, 2**32 - 1, 2**40 + 3])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, -1, -(2**63)])
def test_pixels_and_gradient(seed, call):
    levels = cases.pyramid(1)
    x = cases.tensors(levels, requires_grad=True)
    kept = _kept(seed, call, 0.65, levels)
    got = functional.random_mask(x, _state(seed, call), 0.65)
    assert all(np.array_equal(g.detach().numpy(), level * m) for g, level, m in zip(got, levels, kept, strict=True))
    up = cases.tensors(cases.pyramid(2))
    gradients = torch.autograd.grad(got, x, up)
    assert all(np.array_equal(g.numpy(), u.numpy() * m) for g, u, m in zip(gradients, up, kept, strict=True))


def test_the_share_of_masked_pixels_is_the_ratio():
    (got,) = functional.random_mask([torch.ones(4, 2, 128, 128)], _state(7), 0.65)
    # 65536 pixels: five standard deviations are 0.0093.
    assert abs(1 - float(got.mean()) - 0.65) < 0.0093
    assert torch.equal(got[:, 0], got[:, 1])


def test_images_levels_and_calls_have_masks_of_their_own():
    x = [torch.ones(2, 1, 16, 16)] * 2
    first, second = functional.random_mask(x, _state(3), 0.5)
    (later, _), (other, _) = functional.random_mask(x, _state(3, 1), 0.5), functional.random_mask(x, _state(4), 0.5)
    masks = [first[0], first[1], second[0], later[0], other[0]]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(functional.random_mask(x, _state(3), 0.5)[0], first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratios_of_0_and_1_and_types(dtype):
    x = [torch.randn(2, 3, 4, 5).to(dtype)]
    assert torch.equal(functional.random_mask(x, _state(5), 0.0)[0], x[0])
    assert not functional.random_mask(x, _state(5), 1.0)[0].any()
    (got,) = functional.random_mask(x, _state(5), 0.5)
    assert got.dtype == dtype
    assert np.array_equal(got.double().numpy(), x[0].double().numpy() * _kept(5, 0, 0.5, x)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_masked_pixels_are_0_whatever_they_were_and_others_stay_non_finite(bad):
    x = torch.full((2, 3, 5, 7), bad)
    (got,) = functional.random_mask([x], _state(5), 0.5)
    kept = torch.tensor(_kept(5, 0, 0.5, [x])[0], dtype=torch.bool).expand_as(x)
    assert torch.equal(got.isfinite(), ~kept)
    assert not got[~kept].any()


def test_layouts():
    plain = cases.tensors(cases.pyramid(4, [(2, 3, 4, 5)]))[0]
    want = plain.numpy() * _kept(5, 0, 0.5, [plain])[0]
    last = plain.contiguous(memory_format=torch.channels_last)
    turned, gaps = plain.transpose(2, 3).contiguous().transpose(2, 3), plain.repeat_interleave(2, 3)[..., ::2]
    for x in (plain, last, turned, gaps):
        (got,) = functional.random_mask([x], _state(5), 0.5)
        assert np.array_equal(got.numpy(), want)
        assert got.stride() == torch.empty_like(x).stride()


def test_the_state_may_be_counted_up_before_the_backward():
    x, state = torch.randn(1, 2, 6, 7, requires_grad=True), _state(5)
    (got,) = functional.random_mask([x], state, 0.5)
    state[1] += 1
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert torch.equal(gradient != 0, got != 0)


def test_gradcheck():
    inputs = cases.tensors(cases.pyramid(6, [(2, 3, 2, 2), (2, 2, 1, 3)]), requires_grad=True)

    def function(*x):
        return tuple(functional.random_mask([level**2 for level in x], _state(1), 0.5))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@given(
    shape=st.tuples(*[st.integers(1, high) for high in (3, 3, 9, 9)]),
    seed=st.integers(-(2**63), 2**63 - 1),
    call=st.integers(0, 2**63 - 1),
    ratio=st.floats(0, 1),
)
def test_any_shape(shape, seed, call, ratio):
    x = [torch.ones(shape[0], 1, 1, 1), torch.ones(shape)]
    got = functional.random_mask(x, _state(seed, call), ratio)
    assert all(np.array_equal(g.numpy(), x.numpy() * m) for g, x, m in zip(got, x, _kept(seed, call, ratio, x), strict=True))


def test_empty():
    assert functional.random_mask([], _state(0), 0.5) == []
    (got,) = functional.random_mask([torch.zeros(0, 3, 2, 2)], _state(0), 0.5)
    assert got.shape == (0, 3, 2, 2)


def test_what_is_not_defined_is_refused():
    x = [torch.zeros(1, 1, 2, 2)]
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="ratio must be between 0 and 1"):
            functional.random_mask(x, _state(0), ratio)
    for state in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"state must be int64 of shape \(2,\)"):
            functional.random_mask(x, state, 0.5)
    with pytest.raises(ValueError, match="state is on meta, x on cpu"):
        functional.random_mask(x, _state(0).to("meta"), 0.5)
