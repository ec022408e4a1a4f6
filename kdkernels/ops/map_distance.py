"""`map_distance`: normalises the maps of student and teacher and compares them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backend
from ..pyramid import check_choice, level_shapes
from ..reference.map_distance import map_distance as reference
from ..reference.map_distance import normalize_map as normalize_reference

NORMALIZERS = ("minmax", "softmax", "zscore", "none")
DISTANCES = ("l1", "mse", "smooth_l1")
EPS_MODES = ("relative", "absolute")
AVERAGES = ("nhw", "n")
backend.register("reference", "map_distance", reference)
backend.register("reference", "normalize_map", normalize_reference)


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
    sides = f"m_s has {level_shapes(m_s)}, m_t has {level_shapes(m_t)}"
    if len(m_s) != len(m_t):
        raise ValueError(f"m_s and m_t have different numbers of levels: {sides}")
    for level, (a, b) in enumerate(zip(m_s, m_t, strict=True)):
        if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]:
            raise ValueError(f"level {level}: m_s and m_t must be (N, H, W) with the same N: {sides}")
    if spatial is not None and [tuple(x.shape) for x in spatial] != [tuple(x.shape) for x in m_s]:
        raise ValueError(f"spatial has {level_shapes(spatial)}, wanted the shapes of m_s: {level_shapes(m_s)}")
    return backend.call("map_distance", m_s, m_s, m_t, normalize, distance, eps, eps_mode, temperature, average, spatial)


def normalize_map(
    r: Tensor, normalize: str = "minmax", eps: float = 1e-6, eps_mode: str = "relative", temperature: float = 0.5
) -> Tensor:
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
