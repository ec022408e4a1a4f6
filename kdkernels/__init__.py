"""Knowledge distillation for object detectors.

Importing this needs torch and numpy only; the parts that drive detectors load at first use.
"""

from __future__ import annotations

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

from . import functional
from .backend import backend_info, set_backend
from .losses import (
    ACAMLoss,
    AIDLoss,
    BMFILoss,
    CamLoss,
    CrossKDLoss,
    CWDLoss,
    DeFeatLoss,
    DistillationLoss,
    FBKDLoss,
    FGDLoss,
    FGFILoss,
    FitNetsLoss,
    FRSLoss,
    FusedLoss,
    GIDLoss,
    GKDLoss,
    GmaskLoss,
    LDLoss,
    MGDLoss,
    NonFinite,
    NonFiniteError,
    PADLoss,
    PKDLoss,
)

if TYPE_CHECKING:
    from .distiller import Distiller
    from .multi_teacher import MultiTeacherDistiller
    from .tap import FeatureTap
    from .teacher import Teacher

__all__ = [
    "ACAMLoss",
    "AIDLoss",
    "BMFILoss",
    "CWDLoss",
    "CamLoss",
    "CrossKDLoss",
    "DeFeatLoss",
    "DistillationLoss",
    "Distiller",
    "FBKDLoss",
    "FGDLoss",
    "FGFILoss",
    "FRSLoss",
    "FeatureTap",
    "FitNetsLoss",
    "FusedLoss",
    "GIDLoss",
    "GKDLoss",
    "GmaskLoss",
    "LDLoss",
    "MGDLoss",
    "MultiTeacherDistiller",
    "NonFinite",
    "NonFiniteError",
    "PADLoss",
    "PKDLoss",
    "Teacher",
    "backend_info",
    "functional",
    "set_backend",
]
_LAZY = {"Distiller": "distiller", "FeatureTap": "tap", "MultiTeacherDistiller": "multi_teacher", "Teacher": "teacher"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
