"""What docs/methods/ tells of a method by the code itself: formula, source, defaults of every preset, cost."""

from __future__ import annotations

from typing import cast

from kdkernels import FitNetsLoss
from kdkernels.losses.base import Method
from kdkernels.losses.catalogue import METHODS, defaults, make_loss
from kdkernels.losses.trainable import Trainable
from kdkernels.losses.wrapper import WrapperLoss
from kdkernels.report.tables import Table, to_markdown

from ..registry import ENTRIES, Entry

MODES = {
    "forward": "values alone",
    "backward": "values and gradient",
    "backward_scaled": "values and gradient, another upstream gradient than 1",
    "inline": "inside the student's backward pass",
}


#: What a loss needs besides the features, in words.
NEEDS = {
    "boxes": "boxes",
    "anchors": "anchors",
    "outputs": "the heads' outputs",
    "teacher_gradients": "the teacher's gradients",
    "student_gradients": "the student's gradients",
    "teacher_losses": "the teacher's losses",
}


def overview() -> str:
    """A row a method: what its entries are made of, what it needs, what it trains, what it costs, and its page."""
    rows = []
    for name, (method, kind) in METHODS.items():
        loss = make_loss(name, {"base": FitNetsLoss()} if method.wraps else None)
        trains = isinstance(loss, Trainable) and loss.trains()
        entry = ENTRIES.get(name.replace("-", "_"))
        units = "" if entry is None or "backward" not in entry.units else f"{entry.units['backward']:g}{_on(entry, method)}"
        needs = ", ".join(words for need, words in NEEDS.items() if need in loss.needs)
        page = f"[{name}](methods/{kind.__module__.rpartition('.')[2]}.md)"
        coupling = "of what it wraps" if method.inherits else method.coupling
        rows.append([page, method.title, coupling, needs, "yes" if trains else "", units])
    columns = ["method", "", "(L, N) entries", "needs besides features", "trains parts", "units, values and gradient"]
    return to_markdown(Table("All methods", columns, rows))


def block(name: str) -> str:
    """Of one method."""
    method = METHODS[name][0]
    parts = [f"### `{name}`", f"```text\n{method.formula.strip()}\n```", f"Source: {method.paper}.", _coupling(name)]
    return "\n\n".join([*parts, _defaults(name), _cost(name)])


def _coupling(name: str) -> str:
    method = METHODS[name][0]
    if method.inherits:
        return "Its (level, image) entries are those of the loss that it wraps, weighted."
    if method.wraps:
        return "Coupled over the batch: the (level, image) entries of the loss that it wraps, with statistics of the whole batch in them."
    return {
        "separable": "Separable: every (level, image) entry is made of that level of that image alone.",
        "batch-coupled": "Coupled over the batch: each level's total is split over the images by their share of the numerator.",
        "level-free": "Without levels: one row of entries for all of them.",
    }[method.coupling]


def _defaults(name: str) -> str:
    presets = defaults(name)
    options = list(dict.fromkeys(option for values in presets.values() for option in values))
    rows = [[f"`{option}`", *(_text(values.get(option)) for values in presets.values())] for option in options]
    return to_markdown(Table("Defaults", ["option", *(f'"{preset}"' if preset else "" for preset in presets)], rows)).strip()


def _text(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _cost(name: str) -> str:
    method = METHODS[name][0]
    if method.inherits:
        return "It costs what the loss that it wraps costs: the weights multiply sums and gradients that are there anyway."
    entry = ENTRIES[name.replace("-", "_")]
    rows = [[MODES[mode], f"{units:g}"] for mode, units in entry.units.items()]
    return to_markdown(Table(f"Least traffic{_on(entry, method)}, in units (the bytes of one pyramid)", ["", "units"], rows)).strip()


def _on(entry: Entry, method: Method) -> str:
    """Of a wrapper with a cost of its own, which loss it is measured on."""
    if not method.wraps:
        return ""
    assert entry.losses is not None  # of every method
    base = cast(WrapperLoss, entry.losses()[method.name]).base
    return f", on {next(name for name, (_, kind) in METHODS.items() if kind is type(base))}"
