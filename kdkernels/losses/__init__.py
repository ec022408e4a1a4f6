"""The distillation losses as modules, one file a method."""

from .aid import AIDLoss, teacher_shares
from .base import DistillationLoss, NonFinite, NonFiniteError
from .bmfi import BMFILoss
from .fused import FusedLoss
from .gkd import GKDLoss

__all__ = ["AIDLoss", "BMFILoss", "DistillationLoss", "FusedLoss", "GKDLoss", "NonFinite", "NonFiniteError", "teacher_shares"]
