"""Gmask and Emask: FGD under the masks of the GKD authors (lanqz7766/AID)."""

from __future__ import annotations

from .base import Method
from .fgd import FGDLoss

_FORMULA = (
    "1/N * (alpha sum M S Ch (F_S - F_T)^2 + gamma (|Ch_S - Ch_T|_1 + |S_S - S_T|_1) + lambda |GcB_S(F_S) - GcB_T(F_T)|^2),  M = {} windows"
)


class GmaskLoss(FGDLoss):
    """FGD with windows around the boxes in place of their area, and without a background (lanqz7766/AID, Gmask_ and Emask_FeatureLoss).

    Formulas, arguments and errors are FGDLoss's; the mask is gaussian (Gmask) or, by mask="exponential", exponential (Emask), centred on
    the box: see `kdkernels.reference.box_mask`. preset: one-stage | two-stage.
    """

    methods = (
        Method("gmask", "FGD with gaussian masks", "lanqz7766/AID, Gmask_FeatureLoss", _FORMULA.format("gaussian"), "separable"),
        Method(
            "emask",
            "FGD with exponential masks",
            "lanqz7766/AID, Emask_FeatureLoss",
            _FORMULA.format("exponential"),
            "separable",
            {"mask": "exponential"},
        ),
    )
    PRESETS = {
        "one-stage": {"alpha": 1e-3, "beta": 0.0, "gamma": 5e-4, "lambda_": 5e-6, "temperature": 0.5, "mask": "gaussian"},
        "two-stage": {"alpha": 5e-5, "beta": 0.0, "gamma": 5e-5, "lambda_": 5e-7, "temperature": 0.5, "mask": "gaussian"},
    }
