"""FGD and its Gmask and Emask variants against their formulas."""

from __future__ import annotations

import pytest
import torch
from oracle import cases, fgd, gc_block
from oracle.compare import RTOL_MASK
from oracle_support import BOXES, IMAGE_SIZE, check_features, features, kinds, preset_loss, presets

# methods.md 6.5: GFL and RetinaNet, Faster and Mask R-CNN, FCOS.
FGD = {
    "one-stage": {"alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4, "lambda_": 5e-6, "temperature": 0.5},
    "two-stage": {"alpha": 5e-5, "beta": 2.5e-5, "gamma": 5e-5, "lambda_": 5e-7, "temperature": 0.5},
    "fcos": {"alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_": 8e-6, "temperature": 0.8},
}
# methods.md 2.4: FGD with the gaussian (exponential) mask, and no background.
GMASK = {
    "one-stage": {"alpha": 1e-3, "beta": 0.0, "gamma": 5e-4, "lambda_": 5e-6, "temperature": 0.5},
    "two-stage": {"alpha": 5e-5, "beta": 0.0, "gamma": 5e-5, "lambda_": 5e-7, "temperature": 0.5},
}
PUBLISHED = {"fgd": FGD, "gmask": GMASK, "emask": GMASK}
MASKS = {"fgd": "area", "gmask": "gaussian", "emask": "exponential"}
GIVEN = {"boxes": cases.box_tensors(BOXES), "image_size": IMAGE_SIZE}
TERMS = {"foreground", "background", "attention", "relation"}


def _rtol(name: str, dtype: torch.dtype) -> float | None:
    """Gaussian and exponential masks are fp32; FGD's areas are, too, but the oracle rounds them alike."""
    return RTOL_MASK if dtype == torch.float64 and name != "fgd" else None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_defaults(name):
    assert presets(name, PUBLISHED[name]) == PUBLISHED[name]
    assert {preset_loss(name, preset).mask for preset in PUBLISHED[name]} == {MASKS[name]}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("preset", "dtype"), kinds(FGD))
def test_terms(name, preset, dtype):
    options = PUBLISHED[name].get(preset, FGD["fcos"])
    loss = preset_loss(name, preset if preset in PUBLISHED[name] else "one-stage", **options)

    def oracle(s, t, parameters):
        blocks = [gc_block.blocks(parameters, level) for level in range(len(t))]
        return fgd.terms(s, t, blocks, BOXES, IMAGE_SIZE, **options, mask=MASKS[name])

    wanted = TERMS if options["beta"] else TERMS - {"background"}
    assert check_features(loss, oracle, features(10, dtype), dtype, _rtol(name, dtype), **GIVEN) == wanted


def test_one_channel_and_no_relation():
    shapes = [(2, 1, 3, 5), (2, 1, 1, 1)]
    options = {"alpha": 0.4, "beta": 0.3, "gamma": 0.2, "lambda_": 0.0}

    def oracle(s, t, parameters):
        assert not parameters
        return fgd.terms(s, t, None, BOXES[:2], IMAGE_SIZE, **options)

    given = {**GIVEN, "boxes": GIVEN["boxes"][:2]}
    found = check_features(
        preset_loss("fgd", "one-stage", **options), oracle, features(11, torch.float64, shapes, shapes), torch.float64, **given
    )
    assert found == TERMS - {"relation"}


def test_the_relation_starts_as_plain_imitation():
    s, t = (cases.tensors(side) for side in features(12, torch.float32))
    loss = preset_loss("fgd", "one-stage", lambda_=1.0).build(s, t).double()
    relation = loss.terms(s, loss.teacher_side(t, **GIVEN))["relation"]
    want = torch.stack([(a - b).square().sum((1, 2, 3)) / len(a) for a, b in zip(s, t, strict=True)])
    assert torch.allclose(relation, want, rtol=1e-12, atol=0)
