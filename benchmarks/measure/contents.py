"""What a sample holds: listed, replaced in place without a trace, compared bit for bit, put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import Sample
from ..registry import Entry

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Words hashed at a time: their temporaries stay in a cache.
_CHUNK = 1 << 18
_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)


def tensors(sample: Sample) -> list[Tensor]:
    """Every tensor of the sample once, in a fixed order."""
    found: dict[int, Tensor] = {}
    for x in _walk((sample.inputs, sample.cotangents, sample.arriving)):
        found.setdefault(id(x), x)
    return list(found.values())


def snapshot(xs: Sequence[Tensor]) -> list[Tensor]:
    """Copies with the memory layout of `xs`."""
    return [x.detach().clone() for x in xs]


def write(xs: Sequence[Tensor], contents: Sequence[Tensor]) -> None:
    """Replaces what `xs` hold. Through `.data`: their `_version` stays, so that a cache that trusts it is found out."""
    for x, content in zip(xs, contents, strict=True):
        x.data.copy_(content)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether both hold the same bits; NaN is equal to itself."""
    return torch.equal(_bits(a), _bits(b))


def renewed(contents: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Other values of the same kind: each row times a random factor in 0.5..1.5, pyramids moved by a random shift besides.

    A row is what differs in the last index only: the four numbers of a box stay a box, weights stay positive. Integers (counts) stay.
    """
    made = []
    for x in contents:
        if x.dim() == 4:
            shifts = [int(torch.randint(max(size, 1), (), generator=generator)) for size in x.shape[2:]]
            x = torch.roll(x, shifts, (2, 3))
        made.append(x * _row_factors(x, generator) if x.is_floating_point() else x.clone())
    return made


def partly_renewed(contents: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """`contents` with other values in a random quarter of the rows of the largest tensor: a cache that looks at some elements only does
    not see it."""
    largest = max((i for i, x in enumerate(contents) if x.is_floating_point()), key=lambda i: contents[i].numel())
    made = [x.clone() for x in contents]
    x = made[largest]
    factors = _row_factors(x, generator)
    rows = factors.numel()
    if not rows:
        return made
    start, count = int(torch.randint(rows, (), generator=generator)), -(-rows // 4)
    chosen = (torch.arange(rows, device=x.device) - start) % rows < count
    x *= torch.where(chosen.view(factors.shape), factors, 1)
    return made


def settled(entry: Entry, sample: Sample) -> list[Tensor]:
    """What the sample holds, moved off the points where the entry's gradient jumps; the sample holds it too."""
    # In place, and without a trace on versions.
    entry.settle(rebuilt(sample.inputs, lambda x: x.data))
    return snapshot(tensors(sample))


def identity(sample: Sample) -> tuple[Any, ...]:
    """What may not change besides the values: which tensors there are, where they lie, their versions and flags."""
    return tuple(
        (id(x), x.data_ptr(), x.shape, x.stride(), x.dtype, x.requires_grad, x.grad is None, x._version) for x in tensors(sample)
    )


def content_hash(xs: Sequence[Tensor]) -> tuple[int, ...]:
    """A 64-bit hash of the bits of each tensor."""
    return tuple(_hash(x) for x in xs)


def fingerprint(sample: Sample) -> tuple[Any, ...]:
    """Equal before and after exactly if nothing of the sample was changed, or changed and changed back by ordinary means."""
    return identity(sample), content_hash(tensors(sample))


class Kept:
    """A sample as it is now, to be put back."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.parts = rebuilt((sample.inputs, sample.cotangents, sample.arriving))
        self.tensors = tensors(sample)
        self.contents = snapshot(self.tensors)
        self.wanted = [x.requires_grad for x in self.tensors]

    def restore(self) -> None:
        if [id(x) for x in tensors(self.sample)] != [id(x) for x in self.tensors]:
            self.sample.inputs, self.sample.cotangents, self.sample.arriving = self.parts
        for x, content, wanted in zip(self.tensors, self.contents, self.wanted, strict=True):
            if x.shape == content.shape and x.stride() == content.stride():
                x.data.copy_(content)
            else:
                x.data = content
            x.grad = None
            x.requires_grad_(wanted)


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _walk(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)


def rebuilt(value: Any, leaf: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """New containers of the same tensors, or of `leaf` of them."""
    if isinstance(value, Tensor):
        return leaf(value)
    if isinstance(value, Mapping):
        return {key: rebuilt(item, leaf) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(item, leaf) for item in value)
    return value


def _row_factors(x: Tensor, generator: torch.Generator) -> Tensor:
    shape = (*x.shape[:-1], 1) if x.dim() else ()
    return (0.5 + torch.rand(shape, generator=generator)).to(x.device, x.dtype)


def _bits(x: Tensor) -> Tensor:
    return x.detach().view(_INTEGERS[x.element_size()])


def _hash(x: Tensor) -> int:
    """Position-dependent: the sum of (word + 1) * (an odd number of its place), modulo 2^64."""
    words, total = _bits(x).reshape(-1), 0
    if x.nbytes % 8 == 0:
        words = words.view(torch.int64)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start, start + part.numel(), device=part.device).mul_(_PRIME).bitwise_or_(1)
        total += int(places.mul_(part + 1).sum())
    return total % (1 << 64)
