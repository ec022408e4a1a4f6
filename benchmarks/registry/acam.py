"""ACAMLoss: imitation under masks that both networks' features make by attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import ACAMLoss, functional

from .case import Case
from .entry import Entry, Inputs
from .features import Parts, features, total, trained
from .vectorised import channel_sum


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = features(case, generator, device)
    return {**made, "trained": trained(ACAMLoss(), made["student_features"], made["teacher_features"], generator)}


def projected(parts: Parts, s: Tensor, t: Tensor) -> list[Tensor]:
    """Query, key and value, (N, H W, channels)."""
    return [layer(x).flatten(2).transpose(1, 2) for layer, x in ((parts.query, t), (parts.key, s), (parts.value, s))]


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(N, H W, C), by one of torch's kernels without a matrix of all pairs: these want vectors of one length, each in one piece."""
    missing, scale = (0, value.shape[2] - query.shape[2]), query.shape[2] ** -0.5
    query, key, value = (x[:, None] for x in (F.pad(query, missing), F.pad(key, missing), value.contiguous()))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[:, 0]


def masks(parts: Parts, joint: Tensor) -> tuple[Tensor, Tensor]:
    """Of channels (N, M, C) and of positions (N, M, H W)."""
    of_channels, of_positions = parts.channel_units(joint.mean(1)[:, :, None]), parts.spatial_units(joint)
    return of_channels.sigmoid().transpose(1, 2), of_positions.sigmoid().transpose(1, 2)


def overlap(mask: Tensor) -> Tensor:
    """(N,)"""
    products = torch.bmm(mask, mask.transpose(1, 2))
    squares = products.diagonal(dim1=1, dim2=2)
    # An (i, i) of the sum is 1.
    return (2 * products / (squares[:, :, None] + squares[:, None])).sum((1, 2)) - mask.shape[1]


def eager(student_features: list[Tensor], teacher_features: list[Tensor], trained: Parts) -> Tensor:
    rows = []
    for student, teacher, parts in zip(student_features, teacher_features, trained.levels, strict=True):
        s, t = student.float(), teacher.float()
        channel, spatial = masks(parts, attended(*projected(parts, s, t)))
        n, c, h, w = s.shape
        shares = [(mask / mask.sum(2, keepdim=True)).mean(1) for mask in (channel, spatial)]
        error = (s - t).square()
        imitated = channel_sum(error, shares[0]).sum() / (h * w) + (error.sum(1).flatten(1) * shares[1]).sum() / c
        rows.append((imitated + (overlap(channel) + overlap(spatial)).sum()) / n)
    return total(rows)


def paper(student_features: list[Tensor], teacher_features: list[Tensor], trained: Parts) -> Tensor:
    """No public code: all pairs of positions, mask by mask and pair by pair of masks."""
    rows = []
    for student, teacher, parts in zip(student_features, teacher_features, trained.levels, strict=True):
        s, t = student.float(), teacher.float()
        query, key, value = projected(parts, s, t)
        affinity = torch.softmax(torch.matmul(query, key.transpose(1, 2)) / query.shape[2] ** 0.5, 2)
        channel, spatial = masks(parts, torch.matmul(affinity, value))
        (n, c, h, w), count = s.shape, channel.shape[1]
        for i in range(count):
            for mask, cells in ((channel[:, i, :, None, None], h * w), (spatial[:, i].view(n, 1, h, w), c)):
                imitated = (mask * (s - t) ** 2).sum((1, 2, 3)) / (cells * mask.sum((1, 2, 3)))
                rows.append(imitated.sum() / (n * count))
            for of in (channel, spatial):
                rows += [_shared(of[:, i], of[:, j]) / n for j in range(count) if j != i]
    return total(rows)


def _shared(a: Tensor, b: Tensor) -> Tensor:
    return (2 * (a * b).sum(1) / (a.square().sum(1) + b.square().sum(1))).sum()


ENTRIES = (
    Entry(
        name="acam",
        kind="method",
        inputs=inputs,
        call=functional.acam,
        eager=eager,
        paper=paper,
        # Query and key have half of the channels. forward: S and T for these, the value, and the error's sums (2), written (2) and read by
        # the attention (2), whose result is reduced at once. backward: attention reads them again (2), writes the gradients of key and
        # value (1.5), and these, S and T become the student's (4.5).
        units={"forward": 6, "backward": 14, "backward_scaled": 14},
        differentiable="student_features",
        losses=lambda: {"acam": ACAMLoss()},
    ),
)
