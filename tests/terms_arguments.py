"""Arguments of the terms operators called directly, and those of them that the operators have to refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

S = [torch.ones(2, 3, 4, 5)]
MAPS, VECTORS = torch.ones(2 * 20), torch.ones(2 * 3)


def arguments(s: list[Tensor], t: list[Tensor], imitations: int = 1, scales: Any = (1.0,), **operands: Any) -> tuple[Any, ...]:
    """Of the operators of `terms`, an imitation where nothing else is said; operands: the packed ones by name."""
    names = ("weights", "map_t", "map_spatial", "attention_spatial", "attention_channel", "channel")
    packed = [operands.get(name) for name in names]
    spatial, normalize = operands.get("spatial", []), operands.get("normalize", "none")
    options = (False, "none", normalize, "none", "l1", 0.0, True, 1.0, operands.get("average", "n"), 1.0)
    return (s, t, *packed, spatial, operands.get("factors"), *options, imitations, list(scales))


ONE_MAP = {"imitations": 0, "weights": VECTORS, "map_t": MAPS}
#: What is wrong -> the student's levels, the teacher's, and the operands and options besides.
REFUSED = {
    "levels of different N": ([torch.ones(2, 3, 4, 5), torch.ones(3, 3, 4, 5)], [], {}),
    "an empty level": ([torch.ones(2, 3, 0, 5)], [], {**ONE_MAP, "map_t": torch.ones(0), "normalize": "minmax"}),
    "three dimensions": ([torch.ones(3, 4, 5)], [], {}),
    "float64": ([x.double() for x in S], [], {**ONE_MAP}),
    "a smaller target": (S, [torch.ones(1, 1, 1, 1)], {}),
    "more targets": (S, S * 3, {}),
    "no target": (S, [], {}),
    "fewer than no imitations": (S, S, {**ONE_MAP, "imitations": -1, "scales": ()}),
    "too few scales": (S, S, {"scales": ()}),
    "too few factors": (S, S, {"factors": torch.ones(1)}),
    "too few weights": (S, [], {**ONE_MAP, "weights": torch.ones(1)}),
    "weights of another type": (S, [], {**ONE_MAP, "weights": VECTORS.double()}),
    "weights with gaps": (S, [], {**ONE_MAP, "weights": torch.ones(12)[::2]}),
    "a map without a target": (S, [], {"imitations": 0, "weights": VECTORS}),
    "an attention without channels": (S, [], {"imitations": 0, "scales": (1.0, 1.0), "attention_spatial": MAPS}),
    "one weight for two imitations": (S, S, {"imitations": 2, "scales": (1.0, 1.0), "spatial": [MAPS]}),
    "an unknown normaliser": (S, [], {**ONE_MAP, "normalize": "median"}),
    "an unknown average": (S, [], {**ONE_MAP, "average": "chw"}),
}
