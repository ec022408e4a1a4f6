"""Box regression by a distribution: the layer, and the detectors that have it."""

from __future__ import annotations

import pytest
import torch
from detectors import batch
from torch import nn

from kdkernels.models import DetectorSpec, build_detector
from kdkernels.models.distribution import DistributionRegression
from kdkernels.teacher import Teacher


def test_regressed_number_is_the_mean_of_the_distribution() -> None:
    layer = DistributionRegression(nn.Conv2d(5, 8, 3, padding=1), 16).double()
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    logits, mean = layer.logits(x), layer(x)
    assert layer.logits.weight.shape == (8 * 17, 5, 3, 3) and mean.shape == (2, 8, 4, 6)
    for n, channel, row, column in ((0, 0, 0, 0), (1, 7, 3, 5), (0, 3, 2, 1)):
        p = logits[n, channel * 17 : (channel + 1) * 17, row, column].softmax(0)
        torch.testing.assert_close(mean[n, channel, row, column], sum(i * p[i] for i in range(17)))
    symmetric = DistributionRegression(nn.Conv2d(5, 8, 1), 8, symmetric=True)
    assert symmetric.support.tolist() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2] and symmetric.logits.kernel_size == (1, 1)
    assert symmetric(x.float())[..., 0, 0].abs().max() < 0.5 and "support" not in symmetric.state_dict()
    half = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert layer.float()(torch.zeros(0, 5, 4, 6)).shape == (0, 8, 4, 6)


@pytest.mark.parametrize("kind", ["fcos", "fasterrcnn"])
def test_detectors_train_and_show_their_distribution(kind: str) -> None:
    spec = DetectorSpec(kind, "slim-student", min_size=64, max_size=96, neck_channels=32, reg_max=7)
    assert spec.resolved().reg_max == 7 and DetectorSpec.from_dict(spec.to_dict()) == spec
    model = build_detector(spec).train()
    sum(model(*batch()).values()).backward()
    module = model.head.regression_head.bbox_reg if kind == "fcos" else model.rpn.head.bbox_pred
    assert isinstance(module, DistributionRegression) and module.logits.weight.grad.abs().max() > 0
    images, targets = model.transform(*batch())
    outputs = Teacher(model)(images, targets, outputs=True).outputs
    assert outputs is not None and outputs.distribution is not None
    for logits, codes in zip(outputs.distribution, outputs.regression, strict=True):
        assert logits.shape == (*codes.shape, 8)
        torch.testing.assert_close((logits.softmax(3) * module.support).sum(3), codes)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="reg_max is 0, should be at least 1"):
        DistributionRegression(nn.Conv2d(4, 4, 1), 0)
    for detector, reg_max in (("retinanet", 16), ("fcos", 0)):
        with pytest.raises(ValueError, match=f"reg_max is {reg_max}, should be None or, with fcos or fasterrcnn, at least 1"):
            DetectorSpec(detector, reg_max=reg_max)
    assert DetectorSpec("fcos").resolved().reg_max is None
