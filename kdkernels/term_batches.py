"""Which terms one call of the fused operator serves, and its arguments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.map_distance import comparable
from .pyramid import constant, pack
from .reference.terms import AttentionTerm, Factor, ImitationTerm, MapTerm, Term

_NO_MAP = (False, "none", "none", "none", "l1", 0.0, True, 1.0, "n")


class Served(NamedTuple):
    """A wanted term. place: in the wanted list;   rows: of the operator's result that it is the sum of."""

    place: int
    factor: Factor
    rows: list[int]


class Batch(NamedTuple):
    """Arguments of one operator call and what its rows are.

    operands: arguments that hold tensors;   options: those that do not
    outside:  rows whose factors are not in the operator, as those that several terms with factors of their own share
    """

    operands: tuple[Any, ...]
    options: tuple[Any, ...]
    served: list[Served]
    outside: list[int]

    @property
    def one_imitation(self) -> bool:
        return self.options[-2] == 1

    def values(self, rows: Sequence[Tensor]) -> dict[int, Tensor]:
        """Place in the wanted list -> (L, N), from the rows of the result."""
        found = {}
        for place, factor, mine in self.served:
            value = _total([rows[k] for k in mine])
            found[place] = value * factor if mine[0] in self.outside else value
        return found

    def upstream(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradient (rows, L, N) of the rows from that of every wanted term."""
        arriving: list[list[Tensor]] = [[] for _ in self.options[-1]]
        for place, factor, mine in self.served:
            d = gradients[place]
            for row in mine:
                arriving[row].append(d * factor if row in self.outside else d)
        return torch.stack([_total(row) for row in arriving])


@dataclass
class _Slots:
    """The terms of a batch while it is filled: at most one map, one attention, and imitations of one target under one channel weight."""

    map: MapTerm | None = None
    attention: AttentionTerm | None = None
    imitations: list[ImitationTerm] = field(default_factory=list)
    taken: list[tuple[int, Term, Factor]] = field(default_factory=list)

    def take(self, place: int, term: Term, factor: Factor) -> bool:
        """Whether the term fits in; then it is in."""
        if isinstance(term, MapTerm):
            if self.map is not None and not _same(self.map, term):
                return False
            self.map = term
        elif isinstance(term, AttentionTerm):
            if self.attention is not None and not _same(self.attention, term):
                return False
            self.attention = term
        else:
            first = self.imitations[0] if self.imitations else term
            # Without spatial weights the sum over the pixels is one row, with them each weight has its own.
            alike = _same(first.target, term.target) and _same(first.channel, term.channel)
            if not alike or (first.spatial is None) != (term.spatial is None):
                return False
            if not any(_same(x.spatial, term.spatial) for x in self.imitations):
                self.imitations.append(term)
        self.taken.append((place, term, factor))
        return True

    def rows(self, term: Term) -> list[int]:
        """The map's row comes first, then the attention's two, then one an imitation."""
        first = int(self.map is not None)
        if isinstance(term, MapTerm):
            return [0]
        if isinstance(term, AttentionTerm):
            return [first, first + 1]
        same = [k for k, x in enumerate(self.imitations) if _same(x.spatial, term.spatial)]
        return [first + (2 if self.attention is not None else 0) + same[0]]

    def batch(self, features: Sequence[Tensor]) -> Batch:
        served = [Served(place, factor, self.rows(term)) for place, term, factor in self.taken]
        count = int(self.map is not None) + (2 if self.attention is not None else 0) + len(self.imitations)
        users = [[one for one in served if row in one.rows] for row in range(count)]
        # In a compiled graph a factor may depend on the batch, for which it would be compiled anew as a constant of the operator.
        outside = [row for row, terms in enumerate(users) if len(terms) > 1 or torch.compiler.is_compiling()]
        inside = [1.0 if row in outside else terms[0].factor for row, terms in enumerate(users)]
        options = (*self._map_options(), self.attention.temperature if self.attention else 1.0, len(self.imitations))
        operands, normalize_t = self._operands(features)
        options = (*options[:3], normalize_t, *options[4:])
        scales = [1.0 if isinstance(factor, Tensor) else factor for factor in inside]
        return Batch((*operands, _factors(inside, features)), (*options, scales), served, outside)

    def _map_options(self) -> tuple[Any, ...]:
        m = self.map
        if m is None:
            return _NO_MAP
        relative = m.eps_mode == "relative"
        return (m.activation == "abs", m.rectify, m.normalize, m.normalize, m.distance, m.eps, relative, m.temperature, m.average)

    def _operands(self, features: Sequence[Tensor]) -> tuple[tuple[Any, ...], str]:
        """The operator's tensors, but the factors, and how it is to normalise the teacher's map."""
        m, a, imitations = self.map, self.attention, self.imitations
        images = features[0].shape[0]
        pixels = [(images, x.shape[2], x.shape[3]) for x in features]
        channels = [(images, x.shape[1]) for x in features]
        packed = functools.partial(_packed, like=features[0])
        weights, target, normalize_t = None, None, "none"
        if m is not None:
            both = [(w, t) if w is not None and t is not None else (None, None) for w, t in zip(m.weights, m.target, strict=True)]
            weights = packed([w for w, _ in both], channels)
            filled = [features[0].new_zeros(s, dtype=torch.float32) if t is None else t for (_, t), s in zip(both, pixels, strict=True)]
            maps, normalize_t = comparable(filled, [s[1:] for s in pixels], m.normalize, m.eps, m.eps_mode, m.temperature)
            target = packed(maps, pixels)
        return (
            list(imitations[0].target) if imitations else [],
            weights,
            target,
            packed(m.spatial if m else None, pixels),
            packed(a.spatial if a else None, pixels),
            packed(a.channel if a else None, channels),
            packed(imitations[0].channel if imitations else None, channels),
            [packed(x.spatial, pixels) for x in imitations if x.spatial is not None],
        ), normalize_t


def batches(features: Sequence[Tensor], wanted: Sequence[tuple[Term, Factor]]) -> list[Batch]:
    """The operator calls that serve all terms."""
    slots: list[_Slots] = []
    for place, (term, factor) in enumerate(wanted):
        if not any(slot.take(place, term, factor) for slot in slots):
            slots.append(_Slots())
            slots[-1].take(place, term, factor)
    return [slot.batch(features) for slot in slots]


def _packed(levels: Sequence[Tensor | None] | None, shapes: Sequence[tuple[int, ...]], like: Tensor) -> Tensor | None:
    """Levels of these shapes in one fp32 buffer. One that is None becomes zeros, with which it contributes 0: a constant map, no weight."""
    if levels is None:
        return None
    return pack([like.new_zeros(s, dtype=torch.float32) if x is None else constant(x) for x, s in zip(levels, shapes, strict=True)])


def _factors(inside: Sequence[Factor], features: Sequence[Tensor]) -> Tensor | None:
    """(rows, L, N) of the factors that are tensors, 1 for the others; None when none is."""
    if not any(isinstance(factor, Tensor) for factor in inside):
        return None
    shape = (len(features), features[0].shape[0])
    ones = features[0].new_ones((), dtype=torch.float32)
    return torch.stack([(factor.float() if isinstance(factor, Tensor) else ones).expand(shape) for factor in inside])


def _total(values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _same(a: Any, b: Any) -> bool:
    """Whether both hold the very same tensors, and equal values beside them."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
