"""The catalogue of methods: every exported loss is in it, its defaults are those of the loss, and it makes losses by name."""

from __future__ import annotations

import inspect

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
        ("bmfi", {"beta": 1.0}, r"(?s)'bmfi'.*beta;.*beta_bg"),
        ("aid", {}, "'aid'.*base"),
        ("fitnets", {"preset": "three-stage"}, "(?s)preset.*three-stage"),
    ],
)
def test_what_is_unknown_or_missing_is_named(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_loss(name, options)
