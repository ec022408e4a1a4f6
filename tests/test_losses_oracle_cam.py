"""The GKD authors' CAM variants against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import cases, fgd, gc_block, gkd, layers
from oracle.compare import RTOL_MASK, assert_close, assert_levels_close
from oracle_support import BOXES, IMAGE_SIZE, RTOLS, SHAPES, check_features, features, kinds, narrower, presets

from kdkernels.losses.catalogue import make_loss

# methods.md 2.4: cam-gmask with beta 0.05, gamma 5e-4, lambda 5e-6; the other numbers are Gmask's; cam-only with beta 0.1.
PUBLISHED = {
    "one-stage": {"alpha": 1e-3, "beta": 0.05, "gamma": 5e-4, "lambda_": 5e-6, "temperature": 0.5},
    "two-stage": {"alpha": 5e-5, "beta": 0.05, "gamma": 5e-5, "lambda_": 5e-7, "temperature": 0.5},
}
ONLY = {"weight": 0.1, "box_weight": "sqrt_mask", "average": "n"}
VARIANTS = {"cam-gmask": "both", "teacher-cam": "teacher"}
TERMS = {"foreground", "cam", "attention", "relation"}


def _gradients(dtype: torch.dtype, student=SHAPES) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The size that gradients of a detection loss have near the head: the released epsilon, 1e-7, is then felt."""
    return tuple(cases.rounded(cases.pyramid(7401 + k, shapes, 1e-3), dtype) for k, shapes in enumerate((student, SHAPES)))


def _rtol(dtype: torch.dtype) -> float:
    return max(RTOL_MASK, RTOLS[dtype])


@pytest.mark.parametrize("name", VARIANTS)
def test_published_defaults(name):
    wanted = PUBLISHED if name == "cam-gmask" else {key: {k: v for k, v in one.items() if k != "beta"} for key, one in PUBLISHED.items()}
    assert presets(name, wanted) == wanted
    assert make_loss(name).variant == VARIANTS[name]


def test_published_defaults_of_cam_only():
    loss = make_loss("cam-only")
    assert {option: getattr(loss, option) for option in ONLY} == ONLY
    assert (loss.channel_weight, loss.activation, loss.rectify, loss.eps, loss.eps_mode) == ("abs", "abs", "relu", 1e-7, "absolute")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(name, preset, dtype):
    g_s, g_t = _gradients(dtype)

    def oracle(s, t, parameters):
        blocks = [gc_block.blocks(parameters, level) for level in range(len(t))]
        return fgd.cam_terms(s, t, blocks, g_s, g_t, BOXES, IMAGE_SIZE, VARIANTS[name], **PUBLISHED[preset])

    given = {"boxes": cases.box_tensors(BOXES), "image_size": IMAGE_SIZE, "teacher_gradients": cases.tensors(g_t, dtype)}
    student_gradients = cases.tensors(g_s, dtype) if VARIANTS[name] == "both" else None
    loss = make_loss(name, {"preset": preset})
    found = check_features(loss, oracle, features(13, dtype), dtype, _rtol(dtype), student_gradients=student_gradients, **given)
    assert found == (TERMS if VARIANTS[name] == "both" else TERMS - {"cam"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_another_number_of_channels(dtype):
    student = narrower()
    g_s, g_t = _gradients(dtype, student)

    def oracle(s, t, parameters):
        blocks = [gc_block.blocks(parameters, level) for level in range(len(t))]
        compared = [layers.aligned(a, b, parameters, level, "align.") for level, (a, b) in enumerate(zip(s, t, strict=True))]
        return fgd.cam_terms(s, t, blocks, g_s, g_t, BOXES, IMAGE_SIZE, "both", **PUBLISHED["one-stage"], compared=compared)

    given = {"boxes": cases.box_tensors(BOXES), "image_size": IMAGE_SIZE, "teacher_gradients": cases.tensors(g_t, dtype)}
    levels, own = features(26, dtype, student), cases.tensors(g_s, dtype)
    assert check_features(make_loss("cam-gmask"), oracle, levels, dtype, _rtol(dtype), student_gradients=own, **given) == TERMS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cam_only(dtype):
    (s, t), (g_s, g_t) = features(14, dtype), _gradients(dtype)
    x = cases.tensors(s, dtype, requires_grad=True)
    loss = make_loss("cam-only", {"reduction": "none"})
    side = loss.teacher_side(cases.tensors(t, dtype), cases.tensors(g_t, dtype), cases.box_tensors(BOXES), IMAGE_SIZE)
    (got,) = loss.terms(x, side, cases.tensors(g_s, dtype)).values()
    assert_close(got, 0.1 * gkd.map_value(s, t, g_s, g_t, fgd.CAM, BOXES, IMAGE_SIZE), _rtol(dtype))
    up = cases.upstream(3, *got.shape)
    want = gkd.map_gradient(s, t, g_s, g_t, 0.1 * up, fgd.CAM, BOXES, IMAGE_SIZE)
    gradients = torch.autograd.grad((got * torch.tensor(up, dtype=dtype)).sum(), x)
    assert_levels_close(gradients, want, _rtol(dtype), _rtol(dtype) * max(np.abs(level).max() for level in want))
    assert len(gradients) == 3
