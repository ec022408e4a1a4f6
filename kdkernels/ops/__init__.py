"""The primitives as the losses and `kdkernels.functional` call them: arguments checked, backend chosen, autocast off."""

from .attention import attention
from .box_mask import box_mask
from .channel_mean import channel_mean
from .feature_imitation import feature_imitation
from .map_distance import map_distance, normalize_map
from .shared_read import shared_read
from .terms import terms, terms_vjp
from .terms_persistent import PersistentOperands, PersistentOptions, terms_persistent
from .weighted_channel_sum import weighted_channel_sum

__all__ = [
    "PersistentOperands",
    "PersistentOptions",
    "attention",
    "box_mask",
    "channel_mean",
    "feature_imitation",
    "map_distance",
    "normalize_map",
    "shared_read",
    "terms",
    "terms_persistent",
    "terms_vjp",
    "weighted_channel_sum",
]
