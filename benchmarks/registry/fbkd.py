"""FBKDLoss: attention-guided imitation, means over positions and channels, and the relation by non-local blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import FBKDLoss, functional

from . import published, vectorised
from .case import Case
from .entry import Entry, Inputs
from .features import Parts, features, total, trained

ALPHA, BETA, GAMMA, LAMBDA, TEMPERATURE = 4.2e-4, 2.4e-2, 2.4e-2, 4.2e-4, 0.1


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    made = features(case, generator, device)
    return {**made, "trained": trained(FBKDLoss(), made["student_features"], made["teacher_features"], generator)}


def block(parts: Parts, x: Tensor, pairs: bool) -> Tensor:
    """A non-local block; pairs: by the matrix of all pairs of positions, as published, else by the other order of its products."""
    n, _, h, w = x.shape
    window = (min(parts.pool, h), min(parts.pool, w))
    theta = parts.theta(x).flatten(2)
    phi, g = (F.max_pool2d(convolution(x), window).flatten(2) for convolution in (parts.phi, parts.g))
    if pairs:
        affinity = torch.matmul(theta.transpose(1, 2), phi) / phi.shape[2]
        y = torch.matmul(affinity, g.transpose(1, 2)).transpose(1, 2)
    else:
        y = torch.bmm(torch.bmm(g, phi.transpose(1, 2)) / phi.shape[2], theta)
    return x + parts.norm(parts.out(y.reshape(n, -1, h, w)))


def eager(student_features: list[Tensor], teacher_features: list[Tensor], trained: Parts) -> Tensor:
    rows = []
    for level, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
        s, t = student.float(), teacher.float()
        both = zip(vectorised.attention(s.detach(), TEMPERATURE), vectorised.attention(t, TEMPERATURE), strict=True)
        spatial, channel = ((a + b) / 2 for a, b in both)
        error = vectorised.imitation(trained.feature.convolutions[level](s), t, spatial, channel).sum()
        rows += [ALPHA * error.sqrt(), *others(trained, level, s, t, pairs=False)]
    return total(rows)


def others(trained: Parts, level: int, s: Tensor, t: Tensor, pairs: bool) -> list[Tensor]:
    means = trained.channel[level](s.mean((2, 3))) - t.mean((2, 3))
    maps = trained.spatial[level](s.mean(1, keepdim=True)) - t.mean(1, keepdim=True)
    own = trained.relation[level](block(trained.student_blocks[level], s, pairs))
    relation = own - block(trained.teacher_blocks[level], t, pairs)
    return [factor * torch.norm(x) for factor, x in ((BETA, means), (GAMMA, maps), (LAMBDA, relation))]


def paper(student_features: list[Tensor], teacher_features: list[Tensor], trained: Parts) -> Tensor:
    """As the released code: the squared error times copies of the attention, all pairs of positions in the blocks."""
    rows = []
    for level, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
        s, t = student.float(), teacher.float()
        (spatial_s, channel_s), (spatial_t, channel_t) = (published.attention(x.detach().contiguous(), TEMPERATURE) for x in (s, t))
        spatial, channel = (spatial_s + spatial_t)[:, None] / 2, (channel_s + channel_t)[:, :, None, None] / 2
        error = (t - trained.feature.convolutions[level](s)) ** 2 * spatial * channel
        rows += [ALPHA * torch.sum(error) ** 0.5, *others(trained, level, s, t, pairs=True)]
    return total(rows)


ENTRIES = (
    Entry(
        name="fbkd",
        kind="method",
        inputs=inputs,
        call=functional.fbkd,
        eager=eager,
        paper=paper,
        # The convolutions are of single pixels, but for that of a map, and a block applies one matrix an image to every pixel: nothing of
        # the features' size must be written. forward: S and T for attention, means and the blocks' matrices, the weighted error by its
        # sums a channel (2); again for the blocks' difference (2). backward: the roots are of sums over the batch, and so are what the
        # blocks' matrices get; then S, T and the gradient (3).
        units={"forward": 4, "backward": 7, "backward_scaled": 7},
        differentiable="student_features",
        losses=lambda: {"fbkd": FBKDLoss()},
    ),
)
