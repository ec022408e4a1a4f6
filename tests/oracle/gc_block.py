"""GcBlock (FGD, methods.md 6.5): x + W2 ReLU(LN(W1 sum_hw softmax_hw(conv1(x)) x))."""

from __future__ import annotations

from dataclasses import dataclass

from .layers import Level, layer_norm, linear, size
from .tape import Number, dot, relu, softmax


@dataclass(frozen=True)
class Parameters:
    """mask: (C,) and a bias; first: (C/2, C); norm: (C/2,); second: (C, C/2)."""

    mask_weight: list[Number]
    mask_bias: Number
    first_weight: list[list[Number]]
    first_bias: list[Number]
    norm_weight: list[Number]
    norm_bias: list[Number]
    second_weight: list[list[Number]]
    second_bias: list[Number]


def block(x: Level, p: Parameters) -> Level:
    count, channels, height, width = size(x)
    cells = [(h, w) for h in range(height) for w in range(width)]
    out = []
    for n in range(count):
        logits = [dot([x[n][c][h][w] for c in range(channels)], p.mask_weight) + p.mask_bias for h, w in cells]
        shares = softmax(logits)
        context = [dot([x[n][c][h][w] for h, w in cells], shares) for c in range(channels)]
        hidden = layer_norm(linear([context], p.first_weight, p.first_bias)[0], p.norm_weight, p.norm_bias)
        added = linear([[relu(value) for value in hidden]], p.second_weight, p.second_bias)[0]
        out.append([[[value + added[c] for value in row] for row in x[n][c]] for c in range(channels)])
    return out


def blocks(parameters: dict, level: int) -> tuple[Parameters, Parameters]:
    """The student's and the teacher's block of a level, from parameters by the names student.0.logits.weight, ..."""
    return _named(parameters, f"student.{level}"), _named(parameters, f"teacher.{level}")


def _named(parameters: dict, name: str) -> Parameters:
    def matrix(part: str) -> list[list[Number]]:
        return [[value[0][0] for value in row] for row in parameters[f"{name}.{part}.weight"]]

    return Parameters(
        mask_weight=matrix("logits")[0],
        mask_bias=parameters[f"{name}.logits.bias"][0],
        first_weight=matrix("transform.0"),
        first_bias=parameters[f"{name}.transform.0.bias"],
        norm_weight=[value[0][0] for value in parameters[f"{name}.transform.1.weight"]],
        norm_bias=[value[0][0] for value in parameters[f"{name}.transform.1.bias"]],
        second_weight=matrix("transform.3"),
        second_bias=parameters[f"{name}.transform.3.bias"],
    )
