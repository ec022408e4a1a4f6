"""Feature pyramids: one form inside the library, and error messages that show both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor

Pyramid = Sequence[Tensor] | Mapping[Any, Tensor]
#: Gradients of a pyramid: None for a level that got none.
Gradients = Sequence[Tensor | None] | Mapping[Any, Tensor | None]


@overload
def as_pyramid(name: str, x: Pyramid, optional: Literal[False] = False) -> tuple[list[Tensor], list[str]]: ...


@overload
def as_pyramid(name: str, x: Gradients, optional: Literal[True]) -> tuple[list[Tensor | None], list[str]]: ...


def as_pyramid(name: str, x: Any, optional: bool = False) -> tuple[list[Any], list[str]]:
    """Levels of a list, tuple or dict of (N, C_l, H_l, W_l) floating-point tensors, and the levels' names ("0", "1", ... for a list).

    `name` is the argument's name for the errors. With `optional` a level may be None (a level that got no gradient).
    Raises TypeError for anything that is not a pyramid, ValueError for a wrong number of dimensions, an empty level or batches that differ.
    """
    # Lists first: whether something is a Mapping takes Python long to say.
    if isinstance(x, (list, tuple)) or (isinstance(x, Sequence) and not isinstance(x, Mapping)):
        names, levels = [str(i) for i in range(len(x))], list(x)
    elif isinstance(x, Mapping):
        names, levels = [str(key) for key in x], list(x.values())
    else:
        raise TypeError(f"{name} must be a list, tuple or dict of (N, C, H, W) tensors, one a level; got {type(x).__name__}")
    images: int | None = None
    for level, key in zip(levels, names, strict=True):
        if optional and level is None:
            continue
        if not isinstance(level, Tensor) or not level.is_floating_point():
            got = level.dtype if isinstance(level, Tensor) else type(level).__name__
            raise TypeError(f"{name}, level {key}: expected a floating-point tensor, got {got}")
        shape = level.shape
        if len(shape) != 4 or 0 in shape[1:]:
            raise ValueError(f"{name}, level {key}: expected shape (N, C, H, W) with C, H and W at least 1, got {tuple(shape)}")
        if images is None:
            images = shape[0]
        if shape[0] != images:
            raise ValueError(f"{name}: levels have different batch sizes: {level_shapes(levels, names)}")
    return levels, names


def level_shapes(levels: Sequence[Any], names: Sequence[str] | None = None) -> str:
    """Readable list of level shapes; `levels` holds tensors, shapes or None."""
    keys = [str(i) for i in range(len(levels))] if names is None else names
    shapes = ["None" if x is None else str(tuple(x.shape if isinstance(x, Tensor) else x)) for x in levels]
    return "[" + ", ".join(f"{key}: {shape}" for key, shape in zip(keys, shapes, strict=True)) + "]"


def check_match(
    name_a: str, a: Sequence[Any], names_a: Sequence[str], name_b: str, b: Sequence[Any], names_b: Sequence[str], axes: str = "NCHW"
) -> None:
    """Raises ValueError, with the level shapes of both sides, unless both have the same levels and agree in the axes named.

    `a` and `b` hold tensors, shapes or None (which matches anything). Names are compared only when neither side has a list's names.
    """

    def sides() -> str:
        return f"{name_a} has {level_shapes(a, names_a)}, {name_b} has {level_shapes(b, names_b)}"

    if len(a) != len(b):
        raise ValueError(f"{name_a} and {name_b} have different numbers of levels ({len(a)} and {len(b)}): {sides()}")
    if list(names_a) != list(names_b):
        listed = [str(i) for i in range(len(a))]
        if listed not in (list(names_a), list(names_b)):
            raise ValueError(f"{name_a} and {name_b} must have the same levels in the same order: {sides()}")
    wanted = ["NCHW".index(axis) for axis in axes]
    for x, y, key in zip(a, b, names_a, strict=True):
        if x is None or y is None:
            continue
        shape_x, shape_y = x.shape if isinstance(x, Tensor) else x, y.shape if isinstance(y, Tensor) else y
        if shape_x != shape_y and any([shape_x[i] != shape_y[i] for i in wanted]):
            hint = ""
            if set(axes) == set("NCHW") and shape_x[0] == shape_y[0] and name_b == "teacher_features":
                hint = "; features are compared element by element: bring the student to the teacher's shape with an adapter"
            got = f"{name_a} has shape {tuple(shape_x)}, {name_b} has shape {tuple(shape_y)}"
            raise ValueError(f"level {key}: {got}{hint} ({sides()})")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def accumulate(x: Tensor) -> Tensor:
    """x in the type the maths is done in: fp32 for 16-bit tensors, unchanged for fp32 and fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def stack_levels(rows: Sequence[Tensor]) -> Tensor:
    """(L, N) from L tensors (N,); (0, 0) for an empty pyramid."""
    return torch.stack(list(rows)) if len(rows) else torch.zeros(0, 0)


def quotient(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, 0 without a gradient where b is exactly 0; NaN is kept."""
    nothing = b == 0
    return torch.where(nothing, 0, a / torch.where(nothing, 1, b))


def split_over_images(totals: Tensor, numerators: Tensor) -> Tensor:
    """(L, N) with the sums `totals` (L,) over the images: of a level's total each image gets its share of the numerators (L, N).

    The shares are constants, so that the sum has the value and the gradient of the totals; equal ones where the numerators are all 0.
    Where some numerators are not finite, the total stands at their images and 0 at the others.
    """
    own = numerators.detach()
    sums = own.sum(1, keepdim=True)
    entries = totals[:, None] * torch.where(sums == 0, 1 / max(own.shape[1], 1), own / sums)
    bad = ~own.isfinite()
    return torch.where(bad.any(1, keepdim=True), torch.where(bad, totals[:, None], 0), entries)


def in_graph(tensors: Iterable[Tensor]) -> bool:
    """Whether what is computed from these needs a backward pass. Without one a torch.autograd.Function is not worth its time, and
    torch.compile cannot trace it."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def memory_format(levels: Sequence[Tensor]) -> torch.memory_format:
    """In which all levels are read: channels_last if the largest lies so and not also contiguous, else contiguous."""
    sizes = [x.shape[1] * x.shape[2] * x.shape[3] for x in levels]
    largest = levels[sizes.index(max(sizes))]
    last = not largest.is_contiguous() and largest.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def pack(levels: Sequence[Tensor]) -> Tensor:
    """All elements of the levels behind each other, 1-D; without a copy where they already lie so in one buffer and need no gradient.

    levels: at least one, all of one dtype.
    """
    # While tensors only stand for others (fake, meta) there is no memory to look at.
    if len(levels) == 1 and levels[0].is_contiguous():
        return levels[0].reshape(-1)
    real = not torch.compiler.is_compiling() and type(levels[0]) is Tensor and not levels[0].is_meta
    if real and _adjacent(levels):
        return levels[0].as_strided((sum([x.numel() for x in levels]),), (1,))
    return torch.cat([x.reshape(-1) for x in levels])


def _adjacent(levels: Sequence[Tensor]) -> bool:
    """Whether the levels lie behind each other in one buffer, and need no gradient."""
    itemsize = levels[0].element_size()
    first = end = levels[0].data_ptr()
    begin = first - levels[0].storage_offset() * itemsize
    for x in levels:
        at = x.data_ptr()
        # Storages that begin at the same address are the same.
        if at != end or x.requires_grad or not x.is_contiguous() or at - x.storage_offset() * itemsize != begin:
            return False
        end += x.numel() * itemsize
    return True


def constant(x: Tensor) -> Tensor:
    """x in fp32 and outside of any graph."""
    # What there is nothing to do for is not worth a call.
    own = x.detach() if x.requires_grad else x
    return own if own.dtype == torch.float32 else own.float()


def products(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """a * b of every level: one multiplication for all, of the levels behind each other."""
    return unpack(pack(a) * pack(b), [tuple(x.shape) for x in a]) if a else []


def unpack(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The levels of these shapes in a 1-D buffer, as views."""
    parts = packed.split_with_sizes([prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
