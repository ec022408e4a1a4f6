"""The catalogue of methods: every exported loss is in it, its defaults are those of the loss, and it makes losses by name."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

from kdkernels import losses
from kdkernels.losses.base import COUPLINGS, DistillationLoss
from kdkernels.losses.catalogue import METHODS, defaults, make_loss


def _made(name, **options):
    base = {"base": losses.FitNetsLoss()} if METHODS[name][0].wraps else {}
    return make_loss(name, {**base, **options})


def test_every_exported_loss_has_a_method_and_no_name_is_taken_twice():
    exported = {x for x in map(losses.__dict__.get, losses.__all__) if isinstance(x, type) and issubclass(x, DistillationLoss)}
    methods = [method.name for kind in exported for method in vars(kind).get("methods", ())]
    assert {kind for _, kind in METHODS.values()} == exported - {DistillationLoss}
    assert sorted(methods) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    method, _ = METHODS[name]
    assert method.name == name and method.coupling in COUPLINGS
    assert all((method.title, method.paper, method.formula))


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_of_every_preset_has_the_defaults_of_that_preset(name):
    for preset, options in defaults(name).items():
        made = _made(name, **({} if preset == "default" else {"preset": preset}))
        assert type(made) is METHODS[name][1]
        found = {key: getattr(made, key) for key in options if hasattr(made, key)}
        assert found and found == {key: options[key] for key in found}
        assert not {"preset", "reduction", "on_nonfinite", "seed", "base"} & set(options)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_preset_is_the_default_one(name):
    first = next(iter(defaults(name)))
    parameters = inspect.signature(METHODS[name][1]).parameters
    assert first == "default" or first == METHODS[name][0].options.get("preset", parameters["preset"].default)


def test_options_are_handed_on():
    made = make_loss("gkd-imitation", {"weight": 3.0, "spatial": False})
    assert (made.form, made.weight, made.spatial) == ("imitation", 3.0, False)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gdk", {}, r"(?s)no method 'gdk'.*gkd"),
        ("bmfi", {"beta": 1.0}, r"(?s)beta; bmfi has.*beta_bg"),
        ("aid", {}, "^aid wraps another loss, base, which is missing"),
        ("fitnets", {"preset": "three-stage"}, "(?s)preset.*three-stage"),
    ],
)
def test_what_is_unknown_or_missing_is_named(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_loss(name, options)


#: An option of each kind -> what is of another kind.
OTHERS = {
    bool: ["yes", 1, 0.0, [True]],
    int: [2.5, 6.0, True, "6", math.nan],
    float: [math.nan, math.inf, True, "hot", [1.0], {}],
}


@pytest.mark.parametrize("name", METHODS)
def test_values_of_another_kind_are_refused_by_name(name):
    checked = 0
    for options in defaults(name).values():
        for option, value in [*options.items(), ("seed", 0)]:
            if option != "seed" or "seed" in inspect.signature(METHODS[name][1]).parameters:
                for other in OTHERS.get(type(value), ()):
                    with pytest.raises(ValueError, match=rf"^{option} must be (a finite|a whole) number|^{option} must be true or false"):
                        _made(name, **{option: other})
                    checked += 1
    assert checked


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (losses.FGDLoss, {"alpha": "x"}),
        (losses.LDLoss, {"temperature": "hot"}),
        (losses.ACAMLoss, {"masks": 2.5}),
        (losses.FGFILoss, {"adapter": "yes"}),
        (losses.DeFeatLoss, {"alpha": math.nan}),
        (losses.BMFILoss, {"expand": math.inf}),
        (losses.BMFILoss, {"area_norm": "no"}),
        (losses.GKDLoss, {"spatial": 0}),
        (losses.GKDLoss, {"eps": "small"}),
        (losses.PKDLoss, {"weight": True}),
    ],
)
def test_the_losses_themselves_refuse_them(loss, options):
    ((option, _),) = options.items()
    with pytest.raises(ValueError, match=f"^{option} must be "):
        loss(**options)


def test_whole_numbers_are_numbers():
    assert losses.FGDLoss(weight=2, alpha=1, beta=np.float32(0.5)).alpha == 1 and losses.ACAMLoss(masks=np.int64(3)).masks == 3
