"""`kdkernels methods`, and the descriptions that `--method` names stand for."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from cli import kdkernels

from kdkernels import recipes
from kdkernels.losses.catalogue import METHODS, defaults

NAMES = list(METHODS)


def entry(name: str, **options: object) -> dict[str, object]:
    return {"type": name, **({"base": {"type": "bmfi"}} if METHODS[name][0].wraps else {}), **options}


def test_the_list_has_formula_defaults_coupling_and_paper_of_every_method() -> None:
    result = kdkernels("methods")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    for name, (method, _) in METHODS.items():
        coupling = "of what it weighs" if name == "aid" else method.coupling
        assert f"{name}: {method.title} ({coupling}) {' '.join(method.formula.split())}" in text
        assert method.paper in text and all(f"{preset}: " in text for preset in defaults(name))
    assert "two-stage: weight 1, alpha 5e-05, beta 2.5e-05, gamma 5e-05, lambda_ 5e-07" in text


def test_json_is_the_list_as_data() -> None:
    found = json.loads(kdkernels("methods", "--json").stdout)
    assert [one["name"] for one in found] == NAMES
    one = json.loads(kdkernels("methods", "bmfi", "--json").stdout)
    assert one == next(other for other in found if other["name"] == "bmfi")
    assert one["loss"] == "BMFILoss" and one["docs"] == "docs/methods/bmfi.md"
    assert one["recipe"]["lambda_"] == 0.3 and all(options["lambda_"] == 0 for options in one["defaults"].values())


def test_wrappers_and_recipes_say_what_they_are() -> None:
    pad, aid = (json.loads(kdkernels("methods", name, "--json").stdout) for name in ("pad", "aid"))
    # AID multiplies what is there; PAD divides by statistics of the whole batch.
    assert (pad["coupling"], aid["coupling"]) == ("batch-coupled", "of what it weighs")
    assert (pad["weighs"], aid["weighs"]) == ("fbkd", None)
    shown = {name: " ".join(kdkernels("methods", name).stdout.split()) for name in ("pad", "aid", "gkd")}
    assert "--method pad stands on fbkd" in shown["pad"] and "--aid puts it on every loss" in shown["aid"]
    assert "of what it weighs; " in shown["aid"] and "batch-coupled; " in shown["pad"]
    assert "kdkernels distill gives it the demo's values, weight 0.1; compare-methods has gkd with the defaults above" in shown["gkd"]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_shows_its_formula_and_every_option(name: str) -> None:
    result = kdkernels("methods", name)
    method, loss = METHODS[name]
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert " ".join(method.formula.split())[:40] in text and method.paper[:40] in text
    presets = defaults(name)
    assert all(option in text for options in presets.values() for option in options)
    assert all(preset in text for preset in presets) and loss.__name__ in text
    page = f"docs/methods/{loss.__module__.rpartition('.')[2]}.md"
    assert page in text and (Path(__file__).parent.parent / page).is_file()


def test_an_unknown_method_is_refused_with_the_names() -> None:
    result = kdkernels("methods", "nonsense")
    assert result.exit_code == 2 and "no method 'nonsense'; the methods are " in result.stderr and "bmfi" in result.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("detector", ["fcos", "retinanet", "fasterrcnn"])
def test_a_name_alone_is_a_whole_description(name: str, detector: str) -> None:
    """With every option, so that expanding it again changes nothing; and a loss can be built from it."""
    found = recipes.expand(name, entry(name), detector)
    loss = METHODS[name][1]
    assert found == recipes.expand("other", found, "fcos")
    assert set(found) == {"type", *inspect.signature(loss).parameters} - {"reduction"}
    assert type(recipes.build_losses({"x": found})["x"]) is loss
    suitable = [preset for preset in (detector, "two-stage" if detector == "fasterrcnn" else "one-stage") if preset in loss.PRESETS]
    if suitable and "preset" not in METHODS[name][0].options:
        assert found["preset"] == suitable[0]
    chosen = loss.PRESETS.get(str(found.get("preset")), {})
    fixed = {**METHODS[name][0].options, **recipes.LOSSES.get(name, {})}
    assert all(found[key] == fixed.get(key, value) for key, value in chosen.items() if key in found)


def test_a_preset_can_be_chosen_and_a_value_given_beside_it() -> None:
    for name, (method, loss) in METHODS.items():
        for preset, values in loss.PRESETS.items():
            found = recipes.expand(name, entry(name, preset=preset))
            fixed = {**method.options, **recipes.LOSSES.get(name, {})}
            assert all(found[key] == fixed.get(key, value) for key, value in values.items() if key in found), (name, preset)
    assert recipes.expand("bmfi", {"alpha": "2e-3"})["alpha"] == 2e-3
