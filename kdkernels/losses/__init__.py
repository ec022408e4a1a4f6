"""The distillation losses as modules, one file a method."""

from .acam import ACAMLoss
from .aid import AIDLoss, teacher_shares
from .base import DistillationLoss, NonFinite, NonFiniteError
from .bmfi import BMFILoss
from .cam import CamLoss
from .crosskd import CrossKDLoss
from .cwd import CWDLoss
from .defeat import DeFeatLoss, defeat_head
from .fbkd import FBKDLoss
from .fgd import FGDLoss
from .fgfi import FGFILoss
from .fitnets import FitNetsLoss
from .frs import FRSLoss
from .fused import FusedLoss
from .gid import GIDLoss
from .gkd import GKDLoss
from .gmask import GmaskLoss
from .ld import LDLoss
from .mgd import MGDLoss
from .pad import PADLoss
from .pkd import PKDLoss

__all__ = [
    "ACAMLoss",
    "AIDLoss",
    "BMFILoss",
    "CWDLoss",
    "CamLoss",
    "CrossKDLoss",
    "DeFeatLoss",
    "DistillationLoss",
    "FBKDLoss",
    "FGDLoss",
    "FGFILoss",
    "FRSLoss",
    "FitNetsLoss",
    "FusedLoss",
    "GIDLoss",
    "GKDLoss",
    "GmaskLoss",
    "LDLoss",
    "MGDLoss",
    "NonFinite",
    "NonFiniteError",
    "PADLoss",
    "PKDLoss",
    "defeat_head",
    "teacher_shares",
]
