"""Gradients of loops: a number that remembers how it came about, and the chain rule backwards through it.

A formula written with `Real` in place of float is its own gradient, exact to rounding however long it is. Each operation below states its
derivative; `test_tape` holds them against five-point differences. A function of floats alone stays a float, so that what is constant on
paper is constant here too, and `constant` is the paper's "detached".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rows = list[list["Number"]]
_orders = itertools.count()


class Real:
    """A number with the numbers that it was made of and its derivatives by them."""

    __slots__ = ("order", "parents", "slopes", "value")

    def __init__(self, value: float, parents: Sequence[Real] = (), slopes: Sequence[float] = ()):
        self.value, self.parents, self.slopes = value, parents, slopes
        self.order = next(_orders)

    def __add__(self, other: Number) -> Real:
        if isinstance(other, Real):
            return Real(self.value + other.value, (self, other), (1.0, 1.0))
        return Real(self.value + other, (self,), (1.0,))

    __radd__ = __add__

    def __neg__(self) -> Real:
        return Real(-self.value, (self,), (-1.0,))

    def __sub__(self, other: Number) -> Real:
        return self + (-other)

    def __rsub__(self, other: Number) -> Real:
        return (-self) + other

    def __mul__(self, other: Number) -> Real:
        if isinstance(other, Real):
            return Real(self.value * other.value, (self, other), (other.value, self.value))
        return Real(self.value * other, (self,), (other,))

    __rmul__ = __mul__

    def __truediv__(self, other: Number) -> Real:
        if isinstance(other, Real):
            quotient = self.value / other.value
            return Real(quotient, (self, other), (1.0 / other.value, -quotient / other.value))
        return Real(self.value / other, (self,), (1.0 / other,))

    def __rtruediv__(self, other: Number) -> Real:
        quotient = other / self.value
        return Real(quotient, (self,), (-quotient / self.value,))

    def __abs__(self) -> Real:
        return Real(abs(self.value), (self,), (float((self.value > 0) - (self.value < 0)),))


Number = Real | float


def constant(x: Number) -> float:
    """Its value, to be held constant."""
    return x.value if isinstance(x, Real) else float(x)


def _unary(x: Number, value: float, slope: float) -> Number:
    return Real(value, (x,), (slope,)) if isinstance(x, Real) else value


def square(x: Number) -> Number:
    return _unary(x, constant(x) ** 2, 2.0 * constant(x))


def exp(x: Number) -> Number:
    value = math.exp(constant(x))
    return _unary(x, value, value)


def log(x: Number) -> Number:
    return _unary(x, math.log(constant(x)), 1.0 / constant(x))


def root(x: Number) -> Number:
    """Square root; its derivative at 0 is taken as 0."""
    value = math.sqrt(constant(x))
    return _unary(x, value, 0.5 / value if value else 0.0)


def relu(x: Number) -> Number:
    return _unary(x, max(constant(x), 0.0), float(constant(x) > 0))


def sigmoid(x: Number) -> Number:
    v = constant(x)
    value = 1.0 / (1.0 + math.exp(-v)) if v >= 0 else math.exp(v) / (1.0 + math.exp(v))
    return _unary(x, value, value * (1.0 - value))


def softplus(x: Number) -> Number:
    """log(1 + exp(x))."""
    v = constant(x)
    return _unary(x, max(v, 0.0) + math.log1p(math.exp(-abs(v))), sigmoid(v))


def largest(xs: Sequence[Number]) -> Number:
    """The first of the largest."""
    return max(xs, key=constant)


def smallest(xs: Sequence[Number]) -> Number:
    """The first of the smallest."""
    return min(xs, key=constant)


def total(xs: Sequence[Number]) -> Number:
    xs = list(xs)
    parents = [x for x in xs if isinstance(x, Real)]
    value = math.fsum(constant(x) for x in xs)
    return Real(value, parents, [1.0] * len(parents)) if parents else value


def mean(xs: Sequence[Number]) -> Number:
    xs = list(xs)
    return total(xs) / len(xs)


def dot(xs: Sequence[Number], ys: Sequence[Number]) -> Number:
    """sum x y."""
    parents: list[Real] = []
    slopes: list[float] = []
    for x, y in zip(xs, ys, strict=True):
        if isinstance(x, Real):
            parents.append(x)
            slopes.append(constant(y))
        if isinstance(y, Real):
            parents.append(y)
            slopes.append(constant(x))
    value = math.fsum(constant(x) * constant(y) for x, y in zip(xs, ys, strict=True))
    return Real(value, parents, slopes) if parents else value


def log_softmax(xs: Sequence[Number]) -> list[Number]:
    xs = list(xs)
    top = max(constant(x) for x in xs)
    norm = log(total([exp(x - top) for x in xs]))
    return [x - top - norm for x in xs]


def softmax(xs: Sequence[Number]) -> list[Number]:
    xs = list(xs)
    top = max(constant(x) for x in xs)
    powers = [exp(x - top) for x in xs]
    norm = total(powers)
    return [power / norm for power in powers]


def variables(x: Any) -> Any:
    """Arrays as nested lists of numbers to differentiate by; lists and dicts of them stay lists and dicts."""
    if isinstance(x, dict):
        return {key: variables(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [variables(value) for value in x]
    if x is None:
        return None
    return Real(float(x)) if np.ndim(x) == 0 else [variables(value) for value in np.asarray(x, dtype=np.float64)]


def constants(x: Any) -> Any:
    """The same structure with the values alone."""
    if isinstance(x, dict):
        return {key: constants(value) for key, value in x.items()}
    return [constants(value) for value in x] if isinstance(x, list) else constant(x)


class Evaluation:
    """`function` of `inputs` (arrays, or lists and dicts of arrays): named (L, N) rows, and gradients of their weighted sums."""

    def __init__(self, function: Callable[..., dict[str, Rows]], *inputs: Any):
        self.inputs = inputs
        self._variables = [variables(x) for x in inputs]
        self.rows = function(*self._variables)

    def value(self, term: str | None = None) -> np.ndarray:
        """(L, N) of one term, or of their sum."""
        rows = list(self.rows.values()) if term is None else [self.rows[term]]
        return np.sum([[[constant(x) for x in row] for row in one] for one in rows], axis=0)

    def gradient(self, upstream: np.ndarray, term: str | None = None) -> list[Any]:
        """Of sum upstream * value(term): for each input a structure like it."""
        rows = list(self.rows.values()) if term is None else [self.rows[term]]
        slopes: dict[int, float] = {}
        nodes: dict[int, Real] = {}
        waiting: list[Real] = []
        for one in rows:
            for level, row in enumerate(one):
                for image, x in enumerate(row):
                    if isinstance(x, Real):
                        slopes[x.order] = slopes.get(x.order, 0.0) + float(upstream[level][image])
                        waiting.append(x)
        while waiting:
            node = waiting.pop()
            if node.order not in nodes:
                nodes[node.order] = node
                waiting.extend(node.parents)
        for order in sorted(nodes, reverse=True):
            slope = slopes.get(order, 0.0)
            for parent, own in zip(nodes[order].parents, nodes[order].slopes, strict=True):
                slopes[parent.order] = slopes.get(parent.order, 0.0) + slope * own
        return [_collect(x, given, slopes) for x, given in zip(self._variables, self.inputs, strict=True)]


def _collect(x: Any, given: Any, slopes: dict[int, float]) -> Any:
    if given is None:
        return None
    if isinstance(given, dict):
        return {key: _collect(x[key], given[key], slopes) for key in given}
    if isinstance(given, (list, tuple)):
        return [_collect(a, b, slopes) for a, b in zip(x, given, strict=True)]
    flat = [slopes.get(leaf.order, 0.0) for leaf in _leaves(x)]
    return np.asarray(flat, dtype=np.float64).reshape(np.shape(given))


def _leaves(x: Any) -> list[Real]:
    return [leaf for one in x for leaf in _leaves(one)] if isinstance(x, list) else [x]


def scaled(rows: Rows, factor: float) -> Rows:
    return [[x * factor for x in row] for row in rows]


def split(totals: Sequence[Number], numerators: Sequence[Sequence[Number]]) -> Rows:
    """Each level's total by its images' shares of the numerators (constants); equal shares where these are all 0."""
    rows = []
    for whole, own in zip(totals, numerators, strict=True):
        shares = [constant(x) for x in own]
        norm = math.fsum(shares)
        rows.append([whole * (share / norm if norm else 1.0 / len(shares)) for share in shares])
    return rows
