"""What the `paper` functions are made of: the way the published codes do it, written anew from the formulas.

Images one by one, boxes one by one with slices of the map (FGD and its descendants), grad-cam's map of one image after the other, and
features multiplied by the roots of all weights before a squared error. Other than in the released code the maps have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, TEMPERATURE, ALPHA, GAMMA = 1e-6, 0.5, 1e-3, 1e-3
TINY = torch.finfo(torch.float32).tiny
Profile = Callable[[Tensor, int], Tensor]


def normalised(cam: Tensor) -> Tensor:
    """(H, W) to 0 .. 1."""
    cam = cam - cam.min()
    return cam / (cam.max() * (1 + EPS) + TINY)


def cam(feature: Tensor, gradient: Tensor) -> Tensor:
    """(H, W): grad-cam's map of one image (C, H, W)."""
    weights = gradient.float().mean((1, 2))
    return normalised((weights[:, None, None] * feature.float()).sum(0).abs())


def gkd(
    student_features: list[Tensor], teacher_features: list[Tensor], student_gradients: list[Tensor], teacher_gradients: list[Tensor]
) -> Tensor:
    """GKDLoss(): the scalar."""
    loss = torch.zeros((), device=student_features[0].device)
    for s, t, a, b in zip(student_features, teacher_features, student_gradients, teacher_gradients, strict=True):
        cams_s = torch.stack([cam(*pair) for pair in zip(s, a, strict=True)])
        cams_t = torch.stack([cam(*pair) for pair in zip(t, b, strict=True)])
        loss = loss + (cams_t - cams_s).abs().sum() / cams_s.numel()
    return loss


def attention(x: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """(N, H, W) and (N, C)"""
    n, c, h, w = x.shape
    value = x.float().abs()
    spatial = h * w * F.softmax((value.mean(1, keepdim=True) / temperature).view(n, -1), dim=1)
    channel = c * F.softmax(value.mean(2).mean(2) / temperature, dim=1)
    return spatial.view(n, h, w), channel


def weighted_error(s: Tensor, t: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Squared error of both features multiplied by the root of every weight, summed."""
    s, t = s.float(), t.float()
    for weight in weights:
        s, t = s * weight.sqrt(), t * weight.sqrt()
    return F.mse_loss(s, t, reduction="sum")


def gaussian(x: Tensor, half: int) -> Tensor:
    """A window's profile at its cells x, `half` of its length."""
    return torch.exp(-0.5 * ((x - half) / half) ** 2)


def exponential(x: Tensor, half: int) -> Tensor:
    return torch.exp(-5e-5 * (x - half) ** 2)


def box_masks(
    boxes: tuple[Tensor, Tensor], image_size: tuple[int, int], level_sizes: Sequence[tuple[int, int]], profile: Profile = gaussian
) -> list[Tensor]:
    """(N, H, W) a level: every box's window, put on the map by a slice."""
    padded, counts = boxes
    height, width = image_size
    extent = torch.tensor([width, height, width, height], dtype=torch.float32, device=padded.device)
    masks = []
    for rows, columns in level_sizes:
        cells = torch.tensor([columns, rows, columns, rows], dtype=torch.float32, device=padded.device)
        mask = torch.zeros(padded.shape[0], rows, columns, device=padded.device)
        for n in range(padded.shape[0]):
            clipped = torch.minimum(padded[n, : int(counts[n])].clamp(min=0), extent)
            scaled = clipped * cells / extent
            low, high = scaled[:, :2].floor(), scaled[:, 2:].ceil()
            for k in range(len(clipped)):
                if (clipped[k, 2:] > clipped[k, :2]).all():
                    _draw(mask[n], int(low[k, 0]), int(low[k, 1]), int(high[k, 0]), int(high[k, 1]), profile)
        masks.append(mask)
    return masks


def _draw(mask: Tensor, x1: int, y1: int, x2: int, y2: int, profile: Profile) -> None:
    """The window of one box of cells x1 .. x2 - 1, y1 .. y2 - 1, twice its size and centred, into mask (H, W)."""
    w, h = x2 - x1, y2 - y1
    # The gap on each side: floor((2 w - w) / 2).
    gap_x, gap_y = w // 2, h // 2
    x, y = torch.arange(2 * w, device=mask.device), torch.arange(2 * h, device=mask.device)
    window = profile(y, h)[:, None] * profile(x, w)[None]
    window[gap_y : gap_y + h, gap_x : gap_x + w] = 1
    window = window / (4 * w * h)
    left, top = x1 - gap_x, y1 - gap_y
    rows = slice(max(top, 0), min(top + 2 * h, mask.shape[0]))
    columns = slice(max(left, 0), min(left + 2 * w, mask.shape[1]))
    part = window[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    mask[rows, columns] = torch.maximum(mask[rows, columns], part)


def bmfi(
    student_features: list[Tensor], teacher_features: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    """BMFILoss(): the scalar."""
    loss = torch.zeros((), device=student_features[0].device)
    masks = box_masks(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
    for s, t, mask in zip(student_features, teacher_features, masks, strict=True):
        spatial_s, channel_s = attention(s)
        spatial_t, channel_t = attention(t)
        region = weighted_error(s, t, [spatial_t[:, None], channel_t[:, :, None, None], mask[:, None]])
        distance = F.l1_loss(channel_s, channel_t, reduction="sum") + F.l1_loss(spatial_s, spatial_t, reduction="sum")
        loss = loss + (ALPHA * region + GAMMA * distance) / len(s)
    return loss
