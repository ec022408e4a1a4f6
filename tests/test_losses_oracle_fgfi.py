"""FGFI against its formula."""

from __future__ import annotations

import pytest
import torch
from oracle import cases, fgfi
from oracle_support import BOXES, IMAGE_SIZE, SHAPES, anchors, check_features, features, kinds, narrower, preset_loss, presets

# methods.md 6.2: 0.01 with the adapter; the LD repository's mean over the selected anchors, without, 0.1 on KITTI and 2.0 on COCO.
PUBLISHED = {
    "one-stage": {"weight": 0.01, "adapter": True, "average": "half"},
    "two-stage": {"weight": 0.01, "adapter": True, "average": "half"},
    "ld-kitti": {"weight": 0.1, "adapter": False, "average": "mean"},
    "ld-kitti-aid": {"weight": 0.12, "adapter": False, "average": "mean"},
    "ld-coco": {"weight": 2.0, "adapter": False, "average": "mean"},
}


def test_published_defaults():
    assert presets("fgfi", PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize(("preset", "dtype"), kinds(PUBLISHED))
def test_terms(preset, dtype, channels):
    options = PUBLISHED[preset]
    student = narrower(channels=channels) if options["adapter"] else SHAPES

    def oracle(s, t, parameters):
        return fgfi.terms(s, t, parameters, anchors(), BOXES, options["weight"], options["average"])

    own = cases.tensors(anchors(), torch.float32)
    given = {"boxes": cases.box_tensors(BOXES), "image_size": IMAGE_SIZE, "anchors": own}
    assert check_features(preset_loss("fgfi", preset), oracle, features(5, dtype, student), dtype, **given) == {"imitation"}


def test_the_adapter_starts_small():
    s, t = (cases.tensors(levels, torch.float32) for levels in features(6, torch.float32, [(1, 64, 3, 3)], [(1, 64, 3, 3)]))
    convolution = preset_loss("fgfi", "one-stage").build(s, t).trainable.convolutions[0]
    assert convolution.weight.shape == (64, 64, 3, 3)
    assert 0.98e-4 < convolution.weight.std() < 1.02e-4
    assert convolution.bias.abs().max() == 0
