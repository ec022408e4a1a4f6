"""Pieces of the losses on a head's outputs: cross-entropy of two sigmoids and divergence of two distributions."""

from __future__ import annotations

from .tape import Number, constant, dot, exp, log_softmax, sigmoid, softplus


def cross_entropy(s: Number, target: float) -> Number:
    """-target log sigma(s) - (1 - target) log(1 - sigma(s))."""
    return softplus(s) - s * target


def focal(s: Number, t: float, beta: float) -> Number:
    """|sigma(s) - sigma(t)|^beta times the cross-entropy with target sigma(t); 0 with derivative 0 where the two are equal and beta > 0."""
    target = sigmoid(t)
    if beta == 0.0:
        return cross_entropy(s, target)
    apart = abs(sigmoid(s) - target)
    if constant(apart) == 0.0:
        return 0.0
    factor = apart
    for _ in range(int(beta) - 1):
        factor = factor * apart
    return factor * cross_entropy(s, target)


def divergence(teacher: list[Number], student: list[Number], temperature: float = 1.0) -> Number:
    """KL(softmax(teacher / T) || softmax(student / T)); the teacher is a constant."""
    q = log_softmax([constant(x) / temperature for x in teacher])
    p = log_softmax([x / temperature for x in student])
    return dot([exp(x) for x in q], [a - b for a, b in zip(q, p, strict=True)])


def best_probability(logits: list[Number]) -> float:
    """max_k sigma, a constant."""
    return sigmoid(max(constant(x) for x in logits))
