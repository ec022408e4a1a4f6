"""What is compiled: every operator of the Triton backend, and every method as its users call it, for all types and layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kdkernels import backend
from kdkernels.losses.composed import ComposedLoss
from kdkernels.triton.attention import attention, attention_backward
from kdkernels.triton.box_mask import box_mask
from kdkernels.triton.channel_kl import channel_kl, channel_kl_backward
from kdkernels.triton.channel_mean import channel_mean, channel_mean_backward
from kdkernels.triton.correlation import correlation, correlation_backward
from kdkernels.triton.logit_bce import logit_bce, logit_bce_backward
from kdkernels.triton.logit_kl import logit_kl, logit_kl_backward
from kdkernels.triton.map_distance import map_distance, map_distance_backward
from kdkernels.triton.random_mask import random_mask
from kdkernels.triton.shared_read import shared_read
from kdkernels.triton.spatial_pool import pool_weights, pool_weights_backward, spatial_pool
from kdkernels.triton.weighted_channel_sum import weighted_channel_sum, weighted_channel_sum_backward

from ..call import Sample, bind
from ..registry import DTYPES, ENTRIES, LAYOUTS, Case, Entry

#: What kernels are compiled for. SIZES: other batches and pyramids of five levels, for which no further version may be compiled.
USUAL = Case(batch=2)
SIZES = (USUAL, Case("fcos", 1), Case("kitti", 2), Case("frcnn", 3))


@dataclass
class Inputs:
    """Tensors of one case, on the CPU and never filled: no kernel reads them."""

    case: Case

    def pyramid(self) -> list[Tensor]:
        dtype, layout = DTYPES[self.case.dtype], LAYOUTS[self.case.layout]
        shapes = [(self.case.batch, self.case.channels, *size) for size in self.case.level_sizes]
        return [torch.empty(shape, dtype=dtype, memory_format=layout) for shape in shapes]

    def vectors(self) -> Tensor:
        """Packed, of every level (N, C)."""
        return torch.empty(self.case.batch * self.case.channels * len(self.case.level_sizes))

    def maps(self) -> Tensor:
        """Packed, of every level (N, H, W)."""
        return torch.empty(self.case.batch * self.case.pixels)

    def boxes(self) -> tuple[Tensor, Tensor]:
        """Padded (N, M, 4), and counts (N,)."""
        return torch.empty(self.case.batch, self.case.boxes, 4), torch.zeros(self.case.batch, dtype=torch.int64)


@dataclass(frozen=True)
class Call:
    """One way to call an operator or a method. on_features: it reads a pyramid, so that type and layout matter."""

    operator: str
    options: str
    run: Callable[[Inputs], Any]
    on_features: bool = True


def calls() -> Iterator[Call]:
    """Every operator, and every method that is a sum of terms, forward and backward."""
    for absolute in (False, True):
        yield Call("channel_mean", _words(absolute=absolute), partial(_channel_mean, absolute=absolute))
        yield Call("weighted_channel_sum", _words(absolute=absolute), partial(_weighted_channel_sum, absolute=absolute))
        yield Call("shared_read", _words(absolute=absolute), partial(_shared_read, absolute=absolute))
    yield Call("attention", "", _attention)
    for beta in (0.0, 1.0, 2.0, 1.5):
        yield Call("logit_bce", f"beta {beta}", partial(_logit_bce, beta=beta))
    yield Call("logit_bce", "beta 0.0 weighted", partial(_logit_bce, beta=0.0, weighted=True))
    for groups in (1, 4):
        yield Call("logit_kl", f"groups {groups} weighted", partial(_logit_kl, groups=groups))
    yield Call("random_mask", "", _random_mask)
    for normalize in ("mean", "softmax"):
        yield Call("spatial_pool", normalize, partial(_spatial_pool, softmax=normalize == "softmax"))
    for entropy in (True, False):
        yield Call("channel_kl", _words(entropy=entropy), partial(_channel_kl, entropy=entropy))
    yield Call("correlation", "", _correlation)
    for options in _MAP_DISTANCES:
        yield Call("map_distance", _words(**options), partial(_map_distance, **options), on_features=False)
    for kind in _MASKS:
        yield Call("box_mask", kind, partial(_box_mask, kind=kind), on_features=False)
    yield Call("box_mask", "released", partial(_box_mask, kind="gaussian", released=True), on_features=False)
    for entry in ENTRIES.values():
        for mode in ("backward", "inline"):
            if mode in entry.modes and _composed(entry):
                yield Call(entry.name, mode, partial(_method, entry=entry, mode=mode))


def cases(call: Call, base: Case = USUAL) -> Iterator[Case]:
    """`base` in all types and layouts that matter for the call."""
    if not call.on_features:
        yield base
        return
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield replace(base, dtype=dtype, layout=layout)


def _words(**options: Any) -> str:
    """The options that are not False or None, as text."""
    return " ".join(name if value is True else str(value) for name, value in options.items() if value not in (False, None))


def _channel_mean(i: Inputs, absolute: bool) -> None:
    x = i.pyramid()
    channel_mean(x, absolute)
    channel_mean_backward(x, i.vectors(), absolute)


def _weighted_channel_sum(i: Inputs, absolute: bool) -> None:
    x, w = i.pyramid(), i.vectors()
    weighted_channel_sum(x, w, absolute)
    weighted_channel_sum_backward(x, w, i.maps(), absolute)


def _shared_read(i: Inputs, absolute: bool) -> None:
    shared_read(i.pyramid(), i.vectors(), absolute, 0.5)


def _attention(i: Inputs) -> None:
    x = i.pyramid()
    spatial, channel = attention(x, 0.5)
    attention_backward(x, spatial, channel, i.maps(), i.vectors(), 0.5)


def _logit_bce(i: Inputs, beta: float, weighted: bool = False) -> None:
    s, t, weight = i.pyramid(), i.pyramid(), i.maps() if weighted else None
    logit_bce_backward(logit_bce(s, t, weight, beta), s, t, weight, beta)


def _logit_kl(i: Inputs, groups: int) -> None:
    s, t, weight = i.pyramid(), i.pyramid(), i.maps()
    logit_kl_backward(logit_kl(s, t, weight, 2.0, groups), s, t, weight, 2.0, groups)


def _random_mask(i: Inputs) -> None:
    random_mask(i.pyramid(), torch.zeros(2, dtype=torch.int64), 1 << 31)


def _spatial_pool(i: Inputs, softmax: bool) -> None:
    x, maps = i.pyramid(), (i.case.batch, [h * w for h, w in i.case.level_sizes], softmax)
    weights = pool_weights(i.maps(), *maps)
    spatial_pool(x, weights)
    # The other gradients are those of a weighted channel sum.
    pool_weights_backward(weights, i.maps(), i.maps(), *maps)


def _channel_kl(i: Inputs, entropy: bool) -> None:
    s, t = i.pyramid(), i.pyramid()
    rows, planes = channel_kl(s, t, 1.0, entropy)
    channel_kl_backward(s, t, planes, rows, 1.0)


def _correlation(i: Inputs) -> None:
    s, t = i.pyramid(), i.pyramid()
    rows, planes = correlation(s, t, 1e-6)
    correlation_backward(s, t, planes, rows, rows)


#: Every normaliser and distance, and maps that were normalised before they were resized or are weighted.
_MAP_DISTANCES: tuple[dict[str, Any], ...] = (
    {"normalize": "minmax", "distance": "l1"},
    {"normalize": "minmax", "distance": "mse"},
    {"normalize": "minmax", "distance": "smooth_l1"},
    {"normalize": "softmax", "distance": "l1"},
    {"normalize": "zscore", "distance": "mse"},
    {"normalize": "none", "distance": "mse"},
    {"normalize": "minmax", "distance": "l1", "resized": True},
    {"normalize": "minmax", "distance": "l1", "spatial": True},
)


def _map_distance(i: Inputs, normalize: str, distance: str, resized: bool = False, spatial: bool = False) -> None:
    pixels = [h * w for h, w in i.case.level_sizes]
    m_s, m_t, weight = i.maps(), i.maps(), i.maps() if spatial else None
    options: Any = (i.case.batch, pixels, normalize, "none" if resized else normalize, distance, 1e-6, True, 0.5, "nhw")
    rows, state = map_distance(m_s, m_t, weight, *options)
    map_distance_backward(m_s, m_t, weight, state, rows, *options)


_MASKS = ("gaussian", "exponential", "area", "binary", "assigned", "background")


def _box_mask(i: Inputs, kind: str, released: bool = False) -> None:
    height, width = i.case.image_size
    sizes = [edge for size in i.case.level_sizes for edge in size]
    box_mask(*i.boxes(), [float(height), float(width)], sizes, kind, 2.0, released, True, True)


def _composed(entry: Entry) -> bool:
    """Whether it is a method that is a sum of the library's terms: the others call the operators above one by one."""
    losses = entry.losses().values() if entry.losses is not None else ()
    return bool(losses) and all(isinstance(loss, ComposedLoss) for loss in losses)


def _method(i: Inputs, entry: Entry, mode: str) -> None:
    """The method as its users call it, on features that the backend is made to believe it can take."""
    assert entry.losses is not None
    needs = frozenset().union(*(loss.needs for loss in entry.losses().values()))
    given: dict[str, Any] = {"student_features": [x.requires_grad_() for x in i.pyramid()], "teacher_features": i.pyramid()}
    given |= {name: i.pyramid() for name in ("student_gradients", "teacher_gradients") if name in needs}
    if "boxes" in needs:
        given |= {"boxes": i.boxes(), "image_size": i.case.image_size}
    if "teacher_losses" in needs:
        given["teacher_losses"] = torch.ones(1, i.case.batch)
    arriving = i.pyramid() if mode == "inline" else []
    with mock.patch.object(backend, "_choice", "triton"), mock.patch.object(backend, "refusal", lambda *_: ""):
        bind(entry, entry.call, mode, own=True)(Sample(given, [torch.ones(())], arriving))
