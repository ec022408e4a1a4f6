"""`map_distance`: normalises the maps of student and teacher and compares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ..library import define, keep, kept, once_differentiable
from ..pyramid import check_choice, in_graph, level_shapes, pack, unpack
from ..reference.map_distance import map_distance as reference
from ..reference.map_distance import normalize_map as normalize_reference

NORMALIZERS = ("minmax", "softmax", "zscore", "none")
DISTANCES = ("l1", "mse", "smooth_l1")
EPS_MODES = ("relative", "absolute")
AVERAGES = ("nhw", "n")


def map_distance(
    m_s: Sequence[Tensor],
    m_t: Sequence[Tensor],
    normalize: str = "minmax",
    distance: str = "l1",
    eps: float = 1e-6,
    eps_mode: str = "relative",
    temperature: float = 0.5,
    average: str = "nhw",
    spatial: Sequence[Tensor] | None = None,
) -> Tensor:
    """Distance of the normalised maps, summed over H, W and divided by N*H*W (`nhw`, GKD Eq. 4 and the batch mean) or by N (`n`).

    m_s, m_t: L maps (N, H, W) before normalisation, fp32 or fp64; the sizes of a level may differ, its teacher's map is then resized
    bilinearly after normalisation. spatial: L tensors (N, H, W) of the student's sizes that multiply both normalised maps, or None.
    Returns (L, N).
    Formulas: `kdkernels.reference.map_distance`. Raises ValueError, naming both sides' level shapes, where the maps do not fit.
    """
    check_map_options(normalize, eps, eps_mode, temperature)
    check_choice("distance", distance, DISTANCES)
    check_choice("average", average, AVERAGES)

    def sides() -> str:
        return f"m_s has {level_shapes(m_s)}, m_t has {level_shapes(m_t)}"

    if len(m_s) != len(m_t):
        raise ValueError(f"m_s and m_t have different numbers of levels: {sides()}")
    for level, (a, b) in enumerate(zip(m_s, m_t, strict=True)):
        if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]:
            raise ValueError(f"level {level}: m_s and m_t must be (N, H, W) with the same N: {sides()}")
    if spatial is not None and [tuple(x.shape) for x in spatial] != [tuple(x.shape) for x in m_s]:
        raise ValueError(f"spatial has {level_shapes(spatial)}, wanted the shapes of m_s: {level_shapes(m_s)}")
    return backend.call("map_distance", m_s, m_s, m_t, normalize, distance, eps, eps_mode, temperature, average, spatial)


def normalize_map(r: Tensor, normalize: str = "minmax", eps: float = 1e-6, eps_mode: str = "relative", temperature: float = 0.5) -> Tensor:
    """One level's maps r (N, H, W), fp32 or fp64, normalised per image as `map_distance` does it; same shape and dtype."""
    check_map_options(normalize, eps, eps_mode, temperature)
    return backend.call("normalize_map", [r], r, normalize, eps, eps_mode, temperature)


def check_map_options(normalize: str, eps: float, eps_mode: str, temperature: float) -> None:
    """Raises ValueError for options of `normalize_map` that are not defined."""
    check_choice("normalize", normalize, NORMALIZERS)
    check_choice("eps_mode", eps_mode, EPS_MODES)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")


def comparable(
    m_t: Sequence[Tensor], sizes: Sequence[Sequence[int]], normalize: str, eps: float, eps_mode: str, temperature: float
) -> tuple[list[Tensor], str]:
    """The teacher's maps (N, H, W) in the student's sizes (H, W), and how they are still to be normalised.

    Where a size differs all are normalised here, for the resizing comes after it, and "none" is left to do.
    """
    if all(tuple(b.shape[1:]) == tuple(size) for b, size in zip(m_t, sizes, strict=True)):
        return list(m_t), normalize
    maps = [normalize_reference(b, normalize, eps, eps_mode, temperature) for b in m_t]
    resized = [
        b if tuple(b.shape[1:]) == tuple(size) else F.interpolate(b[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
        for b, size in zip(maps, sizes, strict=True)
    ]
    return resized, "none"


_SIZES = "SymInt images, SymInt[] pixels"
_OPTIONS = "str normalize, str normalize_t, str distance, float eps, bool relative, float temperature, str average"


def _fake(m_s: Tensor, m_t: Tensor, spatial: Tensor | None, images: int, pixels: Sequence[int], *options: Any) -> tuple[Tensor, Tensor]:
    return m_s.new_empty((len(pixels), images)), m_s.new_empty((len(pixels), images, 8))


_forward = define("map_distance", f"(Tensor m_s, Tensor m_t, Tensor? spatial, {_SIZES}, {_OPTIONS}) -> (Tensor, Tensor)", _fake)
_backward = define(
    "map_distance_backward",
    f"(Tensor m_s, Tensor m_t, Tensor? spatial, Tensor state, Tensor grad, {_SIZES}, {_OPTIONS}) -> Tensor",
    lambda m_s, *args: torch.empty_like(m_s),
)


class _MapDistance(torch.autograd.Function):
    """The distances (L, N) of the levels m_s (N, H, W) from packed maps m_t of the same sizes."""

    @staticmethod
    def forward(ctx: Any, name: str, m_t: Tensor, spatial: Tensor | None, options: tuple[Any, ...], *m_s: Tensor) -> Tensor:
        maps = pack([x.detach() for x in m_s])
        ctx.name, ctx.shapes, ctx.options = name, [x.shape for x in m_s], options
        sizes = m_s[0].shape[0], [x.shape[1] * x.shape[2] for x in m_s]
        rows, state = _forward(name, maps, m_t, spatial, *sizes, *options)
        # The backward reads the packed maps; those that they were made of tell where the gradient comes from.
        keep(ctx, maps, m_t, spatial, state, *m_s)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sizes = ctx.shapes[0][0], [shape[1] * shape[2] for shape in ctx.shapes]
        maps, m_t, spatial, state, *_ = kept(ctx)
        gradient = _backward(ctx.name, maps, m_t, spatial, state, grad.contiguous(), *sizes, *ctx.options)
        return (None, None, None, None, *unpack(gradient, ctx.shapes))


def fused(
    name: str,
    m_s: Sequence[Tensor],
    m_t: Sequence[Tensor],
    normalize: str = "minmax",
    distance: str = "l1",
    eps: float = 1e-6,
    eps_mode: str = "relative",
    temperature: float = 0.5,
    average: str = "nhw",
    spatial: Sequence[Tensor] | None = None,
) -> Tensor:
    """`map_distance` by the kernels of backend `name`, differentiable with respect to m_s only."""
    if len(m_s) == 0:
        return torch.zeros(0, 0)
    target, normalize_t = comparable([x.float() for x in m_t], [x.shape[1:] for x in m_s], normalize, eps, eps_mode, temperature)
    factors = None if spatial is None else pack([x.float() for x in spatial])
    options = (normalize, normalize_t, distance, eps, eps_mode == "relative", temperature, average)
    maps = [x.float() for x in m_s]
    if in_graph(maps):
        return _MapDistance.apply(name, pack(target), factors, options, *maps)
    sizes = maps[0].shape[0], [x.shape[1] * x.shape[2] for x in maps]
    return _forward(name, pack(maps), pack(target), factors, *sizes, *options)[0]


def _refuses(m_s: Sequence[Tensor], m_t: Sequence[Tensor], *options: Any) -> str:
    *_, spatial = options
    return backend.refuses_constants([*m_t, *(spatial or ())], m_s[0].device, "the teacher's maps or the spatial weights")


backend.register("reference", "map_distance", reference)
backend.register("reference", "normalize_map", normalize_reference)
backend.register_fused("map_distance", fused, _refuses)
backend.register("triton", "normalize_map", normalize_reference)
backend.register("native", "normalize_map", normalize_reference)
