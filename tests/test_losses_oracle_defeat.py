"""DeFeat against its formula, the part on the head's logits too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import cases, defeat
from oracle.compare import RTOL64, assert_close
from oracle.tape import Evaluation
from oracle_support import BOXES, SHAPES, check_features, features, kinds, narrower, preset_loss, presets

from kdkernels import functional

# methods.md 6.3: 3/L and 12/L with the adapter; the LD repository's MSE(foreground) + 2 MSE(background) times 0.1 on KITTI, 2.0 on COCO.
PUBLISHED = {
    "one-stage": {"alpha": 3.0, "beta": 12.0, "adapter": True, "average": "half"},
    "two-stage": {"alpha": 3.0, "beta": 12.0, "adapter": True, "average": "half"},
    "ld-kitti": {"alpha": 0.1, "beta": 0.2, "adapter": False, "average": "mean"},
    "ld-coco": {"alpha": 2.0, "beta": 4.0, "adapter": False, "average": "mean"},
}
# Of a frame four times as large, so that the boxes belong to different levels.
IMAGE_SIZE = (256, 384)


def test_published_defaults():
    assert presets("defeat", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, channels):
    options = dict(PUBLISHED[preset])
    student = narrower(channels=channels) if options.pop("adapter") else SHAPES
    boxes = [4 * own for own in BOXES]

    def oracle(s, t, parameters):
        return defeat.terms(s, t, parameters, boxes, IMAGE_SIZE, **options)

    given = {"boxes": cases.box_tensors(boxes), "image_size": IMAGE_SIZE}
    found = check_features(preset_loss("defeat", preset), oracle, features(7, dtype, student), dtype, **given)
    assert found == {"foreground", "background"}


@pytest.mark.parametrize("foreground", [[True, False, False, True, False], [False] * 5, [True] * 5], ids=["both", "none", "all"])
def test_head(foreground):
    rng = np.random.RandomState(7100)
    s, t = rng.randn(5, 4), rng.randn(5, 4)
    want = Evaluation(lambda x: {"head": [[defeat.head(x, t.tolist(), foreground)]]}, s)
    x = torch.tensor(s, requires_grad=True)
    got = functional.defeat_head(x, torch.tensor(t), torch.tensor(foreground))
    assert_close(got, want.value()[0, 0])
    assert_close(torch.autograd.grad(got, x)[0], want.gradient(np.ones((1, 1)))[0], RTOL64)
    # methods.md 6.3: weight 2 and 2.
    assert torch.equal(functional.defeat_head(x, torch.tensor(t), torch.tensor(foreground), alpha=2.0, beta=2.0), got)
