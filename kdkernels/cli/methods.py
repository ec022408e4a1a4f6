"""`kdkernels methods`: what `kdkernels distill --method` can name."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from .console import console, note
from .errors import UserError, guarded


@guarded
def methods(
    name: Annotated[str | None, typer.Argument(help="A method: its formula, and its defaults by preset.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """List the methods that kdkernels distill --method takes: formula, published defaults by preset and paper of each.

    distill gives gkd, gkd-imitation and bmfi the values of the demo's recipe instead, which are shown beside them.

    Coupling says how a method's value divides into levels and images: separable (each from its own level and image), batch-coupled (a
    level's total over the batch, split over its images) or level-free (one row for all levels).
    """
    from kdkernels.losses.catalogue import METHODS

    if name is not None and name not in METHODS:
        raise UserError(f"no method {name!r}; the methods are {', '.join(METHODS)}")
    found = [describe(key) for key in ([name] if name is not None else METHODS)]
    if as_json:
        typer.echo(json.dumps(found if name is None else found[0], indent=2))
    elif name is None:
        _list(found)
    else:
        _show(found[0])


def describe(name: str) -> dict[str, Any]:
    """Everything about a method as plain data.

    "recipe": what `kdkernels distill` gives it instead of its defaults. "weighs", of a method that weighs another one: which, where
    nothing else is said; None where it has to be said.
    """
    from kdkernels.losses.catalogue import METHODS, defaults
    from kdkernels.recipes import LOSSES, WEIGHED

    method, loss = METHODS[name]
    return {
        **{key: getattr(method, key) for key in ("name", "title", "paper", "formula", "coupling", "wraps")},
        **({"coupling": "of what it weighs"} if method.inherits else {}),
        **({"weighs": WEIGHED.get(name)} if method.wraps else {}),
        "loss": loss.__name__,
        "defaults": defaults(name),
        "recipe": {key: value for key, value in LOSSES.get(name, {}).items() if key != "type"},
        "docs": f"docs/methods/{loss.__module__.rpartition('.')[2]}.md",
    }


def _list(found: list[dict[str, Any]]) -> None:
    out = console()
    for one in found:
        out.print(f"{one['name']}: {one['title']} ({one['coupling']})", style="bold", markup=False, highlight=False)
        defaults = (f"{preset}: {', '.join(_short(values))}" for preset, values in one["defaults"].items())
        weighs = (f"on {one['weighs']}, unless losses name another base",) if one.get("weighs") else ()
        recipe = (f"kdkernels distill: {', '.join(_short(one['recipe']))} (the demo's)",) if one["recipe"] else ()
        for line in (one["formula"], *defaults, *recipe, *weighs, one["paper"]):
            out.print(Padding(Text(line), (0, 0, 0, 4)), highlight=False)
    note("kdkernels methods NAME: one of them as a table; kdkernels distill --method NAME[+NAME] [--aid] uses them")


def _short(values: dict[str, Any]) -> list[str]:
    return [f"{key} {_text(value)}" for key, value in values.items() if value is not None]


def _show(one: dict[str, Any]) -> None:
    from kdkernels.report.tables import Table, to_rich

    presets = one["defaults"]
    options = dict.fromkeys(key for values in presets.values() for key in values)
    rows = [[key, *(_text(values.get(key)) for values in presets.values())] for key in options]
    out = console()
    out.print(to_rich(Table(f"{one['name']}: {one['title']}", ["option", *presets], rows, [one["formula"]])))
    if one["recipe"]:
        given = ", ".join(f"{key} {_text(value)}" for key, value in one["recipe"].items())
        out.print(
            f"kdkernels distill gives it the demo's values, {given}; compare-methods has {one['name']} with the defaults above and "
            f"{one['name']}-recipe with these",
            markup=False,
            highlight=False,
        )
    if one["wraps"]:
        used = f"--method {one['name']} stands on {one['weighs']} unless losses name another base"
        out.print(f"kdkernels distill: {used if one['weighs'] else '--aid puts it on every loss'}", markup=False, highlight=False)
    out.print(f"{one['coupling']}; {one['loss']}; {one['paper']}; {one['docs']}", markup=False, highlight=False)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
