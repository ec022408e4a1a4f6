"""CWD (methods.md 6.7): per channel a softmax over the cells of F / tau; w tau^2 KL(T || S) / (N C), or the cross-entropy."""

from __future__ import annotations

from .layers import Level, size
from .tape import Rows, constant, dot, exp, log_softmax, total


def terms(s: list[Level], t: list[Level], weight: float, tau: float, entropy: bool) -> dict[str, Rows]:
    """entropy: whether the teacher's is subtracted (KL) or not (cross-entropy)."""
    rows = []
    for a, b in zip(s, t, strict=True):
        count, channels, _, _ = size(b)
        row = []
        for n in range(count):
            parts = []
            for c in range(channels):
                p = log_softmax([value / tau for line in a[n][c] for value in line])
                q = log_softmax([constant(value) / tau for line in b[n][c] for value in line])
                parts.append(dot([exp(x) for x in q], [(x if entropy else 0.0) - y for x, y in zip(q, p, strict=True)]))
            row.append(total(parts) * (weight * tau * tau / (count * channels)))
        rows.append(row)
    return {"channel": rows}
