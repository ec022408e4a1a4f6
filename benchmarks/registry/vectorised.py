"""What the `eager` functions are made of: plain PyTorch without loops over images or boxes, written for this folder.

torch.compile gets the same functions. The two want opposite things of a weighted sum over channels: eager is fastest with a matrix product,
which writes no weighted copy of the features (GKD at Case() on one CPU thread: 30 ms against 78 ms); the compiler fuses the multiplication
and the sum with their neighbours and can do nothing with a product that it must call from a library (GKD + BMFI: 68 ms against 105 ms).
`torch.compiler.is_compiling()` gives each its better form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Elements of one (N, boxes, H, W) intermediate of `box_masks`: 64 MB in fp32.
CHUNK = 1 << 24
#: Of the losses' defaults: GKD's relative epsilon; BMFI's temperature and its weights of region and attention.
EPS, TEMPERATURE, ALPHA, GAMMA = 1e-6, 0.5, 1e-3, 1e-3
TINY = torch.finfo(torch.float32).tiny


def channel_weights(gradient: Tensor) -> Tensor:
    """(N, C)"""
    return gradient.mean((2, 3), dtype=torch.float32)


def channel_sum(x: Tensor, weight: Tensor) -> Tensor:
    """(N, H, W): sum over channels of weight (N, C) times x (N, C, H, W)."""
    if torch.compiler.is_compiling():
        return (x.float() * weight[:, :, None, None]).sum(1)
    n, _, h, w = x.shape
    return torch.bmm(weight[:, None], x.float().flatten(2)).view(n, h, w)


def minmax(r: Tensor) -> Tensor:
    """(N, H, W) to 0 .. 1 an image."""
    y = r - r.amin((1, 2), keepdim=True)
    return y / (y.amax((1, 2), keepdim=True) * (1 + EPS) + TINY)


def gradient_map(x: Tensor, gradient: Tensor) -> Tensor:
    """(N, H, W): GKD's normalised map."""
    return minmax(channel_sum(x, channel_weights(gradient)).abs())


def attention(x: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """(N, H, W) and (N, C)"""
    n, c, h, w = x.shape
    # The type's own |x| is exact and half as large in 16 bit; the compiler keeps none of it.
    a = x.abs()
    spatial = (a.sum(1, dtype=torch.float32).flatten(1) / (c * temperature)).softmax(1)
    channel = (a.sum((2, 3), dtype=torch.float32) / (h * w * temperature)).softmax(1)
    return h * w * spatial.view(n, h, w), c * channel


def imitation(s: Tensor, t: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
    """(N,): sum of spatial (N, H, W) x channel (N, C) x (s - t)^2."""
    # The spatial weight after the sum over channels, where it meets H W values and not C H W.
    return (channel_sum((s.float() - t).square(), channel) * spatial).sum((1, 2))


def gaussian(x: Tensor, half: Tensor) -> Tensor:
    """A window's profile at its cells x, `half` of its length."""
    return (-0.5 * ((x - half) / half).square()).exp()


def exponential(x: Tensor, half: Tensor) -> Tensor:
    return (-5e-5 * (x - half).square()).exp()


def box_masks(
    boxes: tuple[Tensor, Tensor],
    image_size: tuple[int, int],
    level_sizes: Sequence[tuple[int, int]],
    chunk: int = CHUNK,
    profile: Callable[[Tensor, Tensor], Tensor] = gaussian,
) -> list[Tensor]:
    """(N, H, W) a level: BMFI's centred windows of twice the box, all boxes at once as far as `chunk` elements go."""
    padded, counts = boxes
    n, m = padded.shape[:2]
    # Tensors as divisors: CUDA multiplies by the rounded reciprocal of a Python number.
    height, width = (padded.new_full((), extent) for extent in image_size)
    x1, x2 = (torch.minimum(padded[..., i].clamp(min=0), width) for i in (0, 2))
    y1, y2 = (torch.minimum(padded[..., i].clamp(min=0), height) for i in (1, 3))
    real = (torch.arange(m, device=padded.device) < counts[:, None]) & (x2 > x1) & (y2 > y1)
    masks = []
    for rows, columns in level_sizes:
        in_x, profile_x, length_x = _axis(x1, x2, width, columns, profile)
        in_y, profile_y, length_y = _axis(y1, y2, height, rows, profile)
        weight = torch.where(real, 1 / (length_x * length_y).clamp(min=1), 0)[..., None, None]
        mask = padded.new_zeros(n, rows, columns)
        step = max(1, chunk // (n * rows * columns))
        for start in range(0, m, step):
            some = slice(start, start + step)
            inside = in_y[:, some, :, None] & in_x[:, some, None]
            window = (profile_y[:, some, :, None] * weight[:, some]) * profile_x[:, some, None]
            mask = torch.maximum(mask, torch.where(inside, weight[:, some], window).amax(1))
        masks.append(mask)
    return masks


def _axis(
    low: Tensor, high: Tensor, extent: Tensor, cells: int, profile: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of (N, M) boxes: the box's own cells (N, M, cells), the window's profile (N, M, cells), its length (N, M)."""
    first = (low * cells / extent).floor()
    # Clipped boxes end at `cells` exactly; a compiler's approximate division may say a little more.
    last = (high * cells / extent).ceil().clamp(max=cells)
    size = last - first
    length = (2 * size + 0.5).floor()
    u = torch.arange(cells, device=low.device, dtype=torch.float32)
    x = u - (first - ((length - size) / 2).floor())[..., None]
    half = length[..., None] / 2
    window = torch.where((x >= 0) & (x < length[..., None]), profile(x, half), 0)
    return (u >= first[..., None]) & (u < last[..., None]), window, length


def gkd(
    student_features: list[Tensor], teacher_features: list[Tensor], student_gradients: list[Tensor], teacher_gradients: list[Tensor]
) -> Tensor:
    """GKDLoss(): the scalar."""
    pairs = zip(student_features, teacher_features, student_gradients, teacher_gradients, strict=True)
    return torch.stack([(gradient_map(s, a) - gradient_map(t, b)).abs().mean() for s, t, a, b in pairs]).sum()


def bmfi_images(
    student_features: list[Tensor], teacher_features: list[Tensor], boxes: tuple[Tensor, Tensor], image_size: tuple[int, int]
) -> Tensor:
    """BMFILoss(): what every image adds to it, (N,)."""
    total = student_features[0].new_zeros((), dtype=torch.float32)
    masks = box_masks(boxes, image_size, [(s.shape[2], s.shape[3]) for s in student_features])
    for s, t, mask in zip(student_features, teacher_features, masks, strict=True):
        spatial_s, channel_s = attention(s)
        spatial_t, channel_t = attention(t)
        distance = (spatial_s - spatial_t).abs().sum((1, 2)) + (channel_s - channel_t).abs().sum(1)
        total = total + ALPHA * imitation(s, t, mask * spatial_t, channel_t) + GAMMA * distance
    return total / student_features[0].shape[0]
