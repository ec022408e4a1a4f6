"""GKD's map and BMFI together, each alone or weighted by AID, where one launch for all of it was measured as faster than the passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backend, ops
from ..pyramid import Gradients, Pyramid, as_pyramid
from ..reference.terms import Factor
from .aid import AIDLoss
from .base import DistillationLoss, level_masks
from .bmfi import BMFILoss
from .gkd import GKDLoss


def in_one_launch(
    losses: Mapping[str, DistillationLoss],
    student_features: Pyramid,
    teacher_features: Pyramid,
    student_gradients: Gradients | None,
    given: Mapping[str, Any],
) -> dict[str, dict[str, Tensor]] | None:
    """What `term_values` gives for these losses, or None where they are others, or one launch is not what to choose.

    given: boxes, image_size, teacher_gradients and teacher_losses. The features fit each other, and nothing that is needed is missing.
    """
    plain = {name: loss.base if type(loss) is AIDLoss else loss for name, loss in losses.items()}
    gkd = next((name for name, loss in plain.items() if type(loss) is GKDLoss and _is_map(loss)), None)
    bmfi = next((name for name, loss in plain.items() if type(loss) is BMFILoss and _is_region_and_attention(loss)), None)
    if gkd is None or bmfi is None or len(losses) != 2:
        return None
    s, names = as_pyramid("student_features", student_features)
    if not s or not backend.prefers("native", "terms_persistent", s):
        return None
    t, names_t = as_pyramid("teacher_features", teacher_features)
    t = [x.detach() for x in t]
    gradients_s = _like(s, names, "student_gradients", student_gradients)
    gradients_t = _like(s, names, "teacher_gradients", given["teacher_gradients"])
    map_loss, box_loss = plain[gkd], plain[bmfi]
    assert isinstance(map_loss, GKDLoss) and isinstance(box_loss, BMFILoss)
    if gradients_s is None or gradients_t is None or names_t != names:
        return None
    options = ops.PersistentOptions(
        rectify=map_loss.rectify,
        distance=map_loss.distance,
        eps=map_loss.eps,
        eps_mode=map_loss.eps_mode,
        average=map_loss.average,
        temperature=box_loss.temperature,
    )
    operands = ops.PersistentOperands(s, t, gradients_s, gradients_t, masks=[])
    if backend.refusal("native", "terms_persistent", s, (operands,)):
        return None

    def weighted(name: str, factor: float) -> Factor:
        loss = losses[name]
        return loss.factor(t, given["teacher_losses"]) * factor if isinstance(loss, AIDLoss) else factor

    of_image = box_loss.weight / max(s[0].shape[0], 1)
    drawn = (box_loss.mask, box_loss.expand, box_loss.placement, box_loss.inner_ones, box_loss.area_norm)
    # The teacher's own losses may have a graph, which is not to be kept or run.
    with torch.no_grad():
        masks = level_masks(t, given["boxes"], given["image_size"], *drawn)
        factors = [weighted(gkd, map_loss.weight), weighted(bmfi, of_image * box_loss.gamma), weighted(bmfi, of_image * box_loss.alpha)]
    distance, attention, region = ops.terms_persistent(operands._replace(masks=masks), factors, options)
    made = {gkd: {"map": distance}, bmfi: {"region": region, "attention": attention}}
    return {name: made[name] for name in losses}


def _is_map(loss: GKDLoss) -> bool:
    usual = loss.box_weight == "none" and loss.grad_mode == "detached_weights" and loss.normalize == "minmax"
    return loss.form == "map" and usual and loss.channel_weight == "signed" and loss.activation == "raw"


def _is_region_and_attention(loss: BMFILoss) -> bool:
    return bool(loss.alpha and loss.gamma) and not (loss.lambda_ or loss.beta_bg) and loss.attention_from == "teacher"


def _like(features: list[Tensor], names: list[str], argument: str, gradients: Gradients | None) -> list[Tensor] | None:
    """The levels of these gradients, None unless each is there and of its feature's shape."""
    levels, own = as_pyramid(argument, gradients if gradients is not None else [], optional=True)
    found = [g.detach() for g in levels if g is not None]
    same = own == names and [x.shape for x in found] == [x.shape for x in features]
    return found if same else None
