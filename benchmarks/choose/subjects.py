"""What each primitive is timed in: a call of the registry in which, besides it, nothing depends on the backend in question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..registry import DTYPES, LAYOUTS, Case
from ..tables import CASES

if TYPE_CHECKING:
    from kdkernels.tables import Key

#: The tensors that decide about a call, without contents.
Tensors = Callable[[Case], Sequence[Tensor]]


class Subject(NamedTuple):
    """entry, mode: of the registry, with a backward where training has one;   tensors: that decide about the primitive's call in it"""

    entry: str
    mode: str
    tensors: Tensors


def _pyramid(case: Case) -> list[Tensor]:
    shapes = [(case.batch, case.channels, *level) for level in case.level_sizes]
    return [_empty(*shape, dtype=DTYPES[case.dtype]).contiguous(memory_format=LAYOUTS[case.layout]) for shape in shapes]


def _pyramid_and_weights(case: Case) -> list[Tensor]:
    return [*_pyramid(case), *(_empty(case.batch, case.channels) for _ in case.level_sizes)]


def _maps(case: Case) -> list[Tensor]:
    return [_empty(case.batch, *level) for level in case.level_sizes]


def _boxes(case: Case) -> list[Tensor]:
    return [_empty(case.batch, case.boxes, 4)]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


#: The one launch, where it is the fastest; elsewhere other primitives do its work.
MADE_OF_OTHERS = "terms_persistent"
#: Numbers of images that primitives are measured on whose size counts them (`kdkernels.tables.BY_IMAGE`).
IMAGES = (2, 8)
#: Those that only methods call are timed in the whole of GKD + BMFI, where the other primitives' backends are always the same.
SUBJECTS: Mapping[str, Subject] = {
    "attention": Subject("attention", "backward", _pyramid),
    "box_mask": Subject("box_mask", "forward", _boxes),
    "channel_kl": Subject("channel_kl", "backward", lambda case: 2 * _pyramid(case)),
    "channel_mean": Subject("channel_mean", "forward", _pyramid),
    "correlation": Subject("correlation", "backward", lambda case: 2 * _pyramid(case)),
    "feature_imitation": Subject("feature_imitation", "backward", lambda case: 2 * _pyramid(case)),
    "logit_bce": Subject("logit_bce", "backward", lambda case: 2 * _pyramid(case)),
    "logit_kl": Subject("logit_kl", "backward", lambda case: 2 * _pyramid(case)),
    "map_distance": Subject("map_distance", "backward", _maps),
    "random_mask": Subject("random_mask", "forward", _pyramid),
    "shared_read": Subject("gkd_bmfi", "forward", _pyramid_and_weights),
    "spatial_pool": Subject("spatial_pool", "backward", lambda case: [*_pyramid(case), *_maps(case)]),
    "terms": Subject("gkd_bmfi", "backward", _pyramid),
    MADE_OF_OTHERS: Subject("gkd_bmfi", "backward", _pyramid),
    "terms_vjp": Subject("gkd_bmfi", "inline", _pyramid),
    "weighted_channel_sum": Subject("weighted_channel_sum", "backward", _pyramid),
}


def key(primitive: str, case: Case) -> Key:
    """What the entry is about that decides about the primitive's call in this case."""
    from kdkernels.choice import key_of

    return key_of(primitive, SUBJECTS[primitive].tensors(case))


def grid(primitives: Sequence[str], dtypes: Sequence[str], layouts: Sequence[str], cases: Sequence[str]) -> list[tuple[Key, Case]]:
    """The entries, each with the case that it is measured on: where several cases are of one key, as maps are, with the last of them.

    The one launch comes last: it is measured against the best that the others' entries make of its work.
    """
    from kdkernels.tables import BY_IMAGE

    found = {}
    for primitive, name, dtype, layout in product(sorted(primitives, key=MADE_OF_OTHERS.__eq__), cases, dtypes, layouts):
        # One launch does not take it: both would be the same passes.
        if primitive == MADE_OF_OTHERS and dtype == "fp16":
            continue
        for images in IMAGES if primitive in BY_IMAGE else (CASES[name].batch,):
            case = replace(CASES[name], batch=images, dtype=dtype, layout=layout)
            found[key(primitive, case)] = case
    return list(found.items())
