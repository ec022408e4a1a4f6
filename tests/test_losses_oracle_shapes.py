"""The methods on features against their formulas, on any pyramid and any boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import acam, aid, cases, cwd, defeat, fbkd, fgd, fgfi, gc_block, mgd, pad, pkd
from oracle.compare import RTOL64, RTOL_MASK
from oracle_support import IMAGE_SIZE, anchors, check_features, features

from kdkernels.losses.catalogue import make_loss

# Coefficients that let all terms be seen.
WEIGHTS = {"alpha": 0.4, "beta": 0.3, "gamma": 0.2, "lambda_": 0.1}
Oracle = Callable[..., Any]


def _blocks(parameters, t):
    return [gc_block.blocks(parameters, level) for level in range(len(t))]


def _mgd(s, t, parameters, case):
    generators = [(f"generators.{level}.0", f"generators.{level}.2") for level in range(len(t))]
    return mgd.terms(s, t, parameters, (case["seed"], 0), 0.4, 0.3, "align.", generators)


def _fbkd(s, t, parameters, case):
    weights = dict(zip(("feature", "channel", "spatial", "nonlocal"), WEIGHTS.values(), strict=True))
    return fbkd.terms(s, t, [fbkd.named(parameters, level) for level in range(len(t))], weights, 0.5, True)


def _pad(s, t, parameters, case):
    inner = {"divergence": cwd.terms(s, t, 0.7, 2.0, True)["channel"]}
    return pad.terms(s, inner, {"divergence": 0.7}, 1e-6)


# Options of the constructor, its formula, and what else of a pyramid it takes.
METHODS: dict[str, tuple[dict[str, Any], Oracle, tuple[str, ...]]] = {
    "acam": (
        {"alpha": 0.4, "lambda_": 0.3, "masks": 3},
        lambda s, t, p, case: acam.terms(s, t, *acam.named(p, len(t)), p, "align.", 0.4, 0.3),
        (),
    ),
    "cwd": (
        {"weight": 0.7, "temperature": 2.0, "entropy": True},
        lambda s, t, p, case: {"divergence": cwd.terms(s, t, 0.7, 2.0, True)["channel"]},
        (),
    ),
    "defeat": (
        {"alpha": 0.4, "beta": 0.3},
        lambda s, t, p, case: defeat.terms(s, t, p, case["boxes"], IMAGE_SIZE, 0.4, 0.3),
        ("boxes",),
    ),
    "fbkd": (WEIGHTS | {"temperature": 0.5}, _fbkd, ()),
    "fgd": (
        WEIGHTS,
        lambda s, t, p, case: fgd.terms(s, t, _blocks(p, t), case["boxes"], IMAGE_SIZE, **WEIGHTS),
        ("boxes",),
    ),
    "fgfi": (
        {"weight": 0.7},
        lambda s, t, p, case: fgfi.terms(s, t, p, case["anchors"], case["boxes"], 0.7),
        ("boxes", "anchors"),
    ),
    "gmask": (
        WEIGHTS,
        lambda s, t, p, case: fgd.terms(s, t, _blocks(p, t), case["boxes"], IMAGE_SIZE, **WEIGHTS, mask="gaussian"),
        ("boxes",),
    ),
    "mgd": ({"alpha": 0.4, "ratio": 0.3}, _mgd, ()),
    "pad": ({}, _pad, ()),
    "pkd": ({"weight": 0.7}, lambda s, t, p, case: pkd.terms(s, t, 0.7), ()),
}
TRAINED = {"acam", "defeat", "fbkd", "fgd", "fgfi", "gmask", "mgd"}


def _shapes(name: str, images: int, sizes: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    # Statistics of one or two numbers are 0 and 1, whatever these are: nothing to be compared in them.
    needs_more = name in ("pad", "pkd")
    return [(images, channels, height + 2 * needs_more, width) for channels, height, width in sizes]


def _case(name: str, shapes: list[tuple[int, ...]], seed: int) -> tuple[Any, Oracle, dict[str, Any], dict[str, Any]]:
    """The loss, its formula, what that takes, and the arguments of teacher_side."""
    options, formula, takes = METHODS[name]
    rng = np.random.RandomState(seed)
    case: dict[str, Any] = {"seed": seed, "shapes": shapes, "anchors": anchors(shapes), "boxes": []}
    for _ in range(shapes[0][0]):
        corner = rng.uniform(-10, 70, (rng.randint(0, 4), 2))
        case["boxes"].append(np.concatenate([corner, corner + rng.uniform(1, 70, corner.shape)], 1).astype(np.float32).astype(np.float64))
    arguments: dict[str, Any] = {}
    if "boxes" in takes:
        arguments |= {"boxes": cases.box_tensors(case["boxes"]), "image_size": IMAGE_SIZE}
    if "anchors" in takes:
        arguments["anchors"] = cases.tensors(case["anchors"], torch.float32)
    own = {"seed": seed} if name in TRAINED else {}
    if name == "pad":
        own["base"] = make_loss("cwd", METHODS["cwd"][0])
    return make_loss(name, options | own), formula, case, arguments


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=2),
    images=st.integers(1, 3),
)
def test_any_shape_and_boxes(name, seed, sizes, images):
    loss, formula, case, arguments = _case(name, _shapes(name, images, sizes), seed)
    rtol = RTOL_MASK if name == "gmask" else RTOL64
    levels = features(100 + seed, torch.float64, case["shapes"], case["shapes"])
    assert check_features(loss, lambda s, t, p: formula(s, t, p, case), levels, torch.float64, rtol, **arguments)


@pytest.mark.parametrize("granularity", ["image", "level x image"])
@pytest.mark.parametrize("name", METHODS)
def test_aid_weighs_every_entry(name, granularity):
    base, formula, case, arguments = _case(name, [(2, 3, 4, 3), (2, 2, 3, 5)], 1)
    losses = np.random.RandomState(7600).uniform(0.1, 3.0, (2, 2))
    weights = aid.weights(losses, granularity, 2, 2)

    def weighed(s, t, parameters):
        found = formula(s, t, parameters, case)
        return {term: [[x * float(weights[k, n]) for n, x in enumerate(row)] for k, row in enumerate(rows)] for term, rows in found.items()}

    levels = features(100, torch.float64, case["shapes"], case["shapes"])
    loss = make_loss("aid", {"base": base, "granularity": granularity})
    # AID's weight is fp32.
    assert check_features(loss, weighed, levels, torch.float64, RTOL_MASK, **arguments, teacher_losses=torch.tensor(losses))
