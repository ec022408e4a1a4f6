"""Which terms one call of the fused operator serves, and its arguments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.map_distance import comparable
from .pyramid import constant, memory_format, pack
from .reference.terms import AttentionTerm, Factor, ImitationTerm, MapTerm, Term, at_levels, levels_of


class Options(NamedTuple):
    """The operator's arguments that are no tensors. normalize_t: of the teacher's map;   scales: factors of the rows that are numbers."""

    absolute: bool = False
    rectify: str = "none"
    normalize: str = "none"
    normalize_t: str = "none"
    distance: str = "l1"
    eps: float = 0.0
    relative: bool = True
    map_temperature: float = 1.0
    average: str = "n"
    temperature: float = 1.0
    imitations: int = 0
    scales: Sequence[float] = ()


class Served(NamedTuple):
    """A wanted term. place: in the wanted list;   rows: of the operator's result that it is the sum of."""

    place: int
    factor: Factor
    rows: list[int]


class Batch(NamedTuple):
    """Arguments of one operator call and what its rows are.

    levels:   which of the features it is called with;   operands: arguments that hold tensors;   options: those that do not
    outside:  rows whose factors are not in the operator, as those that several terms with factors of their own share
    """

    levels: list[int]
    operands: tuple[Any, ...]
    options: Options
    served: list[Served]
    outside: list[int]

    def of(self, features: Sequence[Any]) -> list[Any]:
        """What belongs to its levels."""
        return [features[i] for i in self.levels]

    @property
    def one_imitation(self) -> bool:
        return self.options.imitations == 1

    def values(self, rows: Sequence[Tensor], features: Sequence[Tensor]) -> dict[int, Tensor]:
        """Place in the wanted list -> (L, N), from the rows of the result; features: all levels."""
        found = {}
        for place, factor, mine in self.served:
            value = at_levels(_total([rows[k] for k in mine]), self.levels, features)
            found[place] = value * factor if mine[0] in self.outside else value
        return found

    def upstream(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradient (rows, L, N) of the rows from that of every wanted term."""
        arriving: list[list[Tensor]] = [[] for _ in self.options.scales]
        for place, factor, mine in self.served:
            d = gradients[place]
            for row in mine:
                arriving[row].append(_at(self.levels, d * factor if row in self.outside else d))
        return torch.stack([_total(row) for row in arriving])


@dataclass
class _Slots:
    """The terms of a batch while it is filled: at most one map, one attention, and imitations of one target under one channel weight.

    All have all that they need at the same levels. At the others nothing is read: what is not finite there is nobody's.
    """

    levels: list[int]
    map: MapTerm | None = None
    attention: AttentionTerm | None = None
    imitations: list[ImitationTerm] = field(default_factory=list)
    taken: list[tuple[int, Term, Factor]] = field(default_factory=list)

    def take(self, place: int, term: Term, factor: Factor) -> bool:
        """Whether the term fits in; then it is in."""
        if levels_of(term) != self.levels:
            return False
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
        operands, normalize_t = self._operands(features)
        options = self._map_options(normalize_t)._replace(
            temperature=self.attention.temperature if self.attention else 1.0,
            imitations=len(self.imitations),
            scales=[1.0 if isinstance(factor, Tensor) else factor for factor in inside],
        )
        return Batch(self.levels, (*operands, _factors(inside, features, self.levels)), options, served, outside)

    def _map_options(self, normalize_t: str) -> Options:
        m = self.map
        if m is None:
            return Options()
        relative = m.eps_mode == "relative"
        return Options(
            m.activation == "abs", m.rectify, m.normalize, normalize_t, m.distance, m.eps, relative, m.temperature, m.average
        )

    def _operands(self, features: Sequence[Tensor]) -> tuple[tuple[Any, ...], str]:
        """The operator's tensors, but the factors, and how it is to normalise the teacher's map."""
        m, a, imitations = self.map, self.attention, self.imitations
        layout = memory_format([features[i] for i in self.levels])
        weights, target, normalize_t = None, None, "none"
        if m is not None:
            weights = self._packed(m.weights)
            maps = self._of(m.target)
            sizes = [features[i].shape[2:] for i in self.levels]
            maps, normalize_t = comparable(maps, sizes, m.normalize, m.eps, m.eps_mode, m.temperature)
            target = pack([constant(x) for x in maps])
        return (
            # Copied once, if at all, and not in every pass.
            [x.contiguous(memory_format=layout) for x in self._of(imitations[0].target)] if imitations else [],
            weights,
            target,
            self._packed(m.spatial if m else None),
            self._packed(a.spatial if a else None),
            self._packed(a.channel if a else None),
            self._packed(imitations[0].channel if imitations else None),
            [self._packed(x.spatial) for x in imitations if x.spatial is not None],
        ), normalize_t

    def _packed(self, levels: Sequence[Tensor | None] | None) -> Tensor | None:
        """Those of its levels in one fp32 buffer."""
        return None if levels is None else pack([constant(x) for x in self._of(levels)])

    def _of(self, levels: Sequence[Tensor | None]) -> list[Tensor]:
        return [x for x in (levels[i] for i in self.levels) if x is not None]


def batches(features: Sequence[Tensor], wanted: Sequence[tuple[Term, Factor]]) -> list[Batch]:
    """The operator calls that serve all terms, but those that are 0 at every level."""
    slots: list[_Slots] = []
    for place, (term, factor) in enumerate(wanted):
        levels = levels_of(term)
        if levels and not any(slot.take(place, term, factor) for slot in slots):
            slots.append(_Slots(levels))
            slots[-1].take(place, term, factor)
    return [slot.batch(features) for slot in slots]


def _factors(inside: Sequence[Factor], features: Sequence[Tensor], levels: list[int]) -> Tensor | None:
    """(rows, L, N) of the factors that are tensors, 1 for the others, at these levels; None when none is a tensor."""
    if not any(isinstance(factor, Tensor) for factor in inside):
        return None
    shape = (len(features), features[0].shape[0])
    ones = features[0].new_ones((), dtype=torch.float32)
    return torch.stack([_at(levels, (factor.float() if isinstance(factor, Tensor) else ones).expand(shape)) for factor in inside])


def _at(levels: list[int], rows: Tensor) -> Tensor:
    """Those of the rows (L, N)."""
    return rows if len(levels) == rows.shape[0] else torch.stack([rows[i] for i in levels])


def _total(values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _same(a: Any, b: Any) -> bool:
    """Whether both hold the very same tensors, and equal values beside them."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
