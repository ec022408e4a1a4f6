"""The primitives as the losses and `kdkernels.functional` call them: arguments checked, backend chosen, autocast off."""

from .attention import attention
from .box_mask import box_mask
from .channel_kl import channel_kl
from .channel_mean import channel_mean
from .correlation import correlation
from .feature_imitation import feature_imitation
from .logit_bce import logit_bce
from .logit_kl import logit_kl
from .map_distance import map_distance, normalize_map
from .random_mask import random_mask
from .shared_read import shared_read
from .spatial_pool import spatial_pool
from .terms import terms, terms_vjp
from .terms_persistent import PersistentOperands, PersistentOptions, terms_persistent
from .weighted_channel_sum import weighted_channel_sum

__all__ = [
    "PersistentOperands",
    "PersistentOptions",
    "attention",
    "box_mask",
    "channel_kl",
    "channel_mean",
    "correlation",
    "feature_imitation",
    "logit_bce",
    "logit_kl",
    "map_distance",
    "normalize_map",
    "random_mask",
    "shared_read",
    "spatial_pool",
    "terms",
    "terms_persistent",
    "terms_vjp",
    "weighted_channel_sum",
]
