"""Some operators compiled anew, brought into the results of all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]
#: What tells versions of a kernel apart, as far as that has a name.
KNOWN = ("kernel", "capability", "dtype", "layout", "given", "flags", "parameters")


class Unmergeable(ValueError):
    """With what is to be done instead."""


def merged(whole: Mapping[str, Any], part: Mapping[str, Any]) -> Record:
    """The results with the operators of `part` as they are there, and what else it says of itself, its sources among that.

    Kernels that no operator launches any more are left out. Those that are the same keep their compile times, and with these the CPU stays.
    Raises Unmergeable where the other operators need compiling too: by another Triton, or where they launch a kernel that has changed.
    """
    if whole["versions"]["triton"] != part["versions"]["triton"]:
        raise Unmergeable(f"the rest is by Triton {whole['versions']['triton']}, this by {part['versions']['triton']}: compile all of it")
    renewed = {operator["operator"] for operator in part["operators"]}
    others = [operator for operator in whole["operators"] if operator["operator"] not in renewed]
    kept = [whole["kernels"][i] for i in sorted({i for operator in others for i in operator["kernels"]})]
    known, before = {_name(kernel) for kernel in kept}, {_text(kernel): place for place, kernel in enumerate(whole["kernels"])}
    if changed := {kernel["kernel"] for kernel in part["kernels"] if _name(kernel) in known and _text(kernel) not in before}:
        raise Unmergeable(f"other operators launch {', '.join(sorted(changed))} too, which has changed: name them as well")
    # A version that others launch too is there once. In their order and as they were, for `git diff`; what is new is last.
    found = {_text(kernel): kernel for kernel in (*part["kernels"], *kept)}
    found |= {text: whole["kernels"][place] for text, place in before.items() if text in found}
    kernels = sorted(found.values(), key=lambda kernel: before.get(_text(kernel), len(before)))
    places = {_text(kernel): place for place, kernel in enumerate(kernels)}
    order = {call: place for place, call in reversed([*enumerate(map(_call, whole["operators"]))])}
    operators = [
        {**operator, "kernels": sorted(places[_text(of["kernels"][i])] for i in operator["kernels"])}
        for of, some in ((whole, others), (part, part["operators"]))
        for operator in some
    ]
    operators.sort(key=lambda operator: order.get(_call(operator), len(whole["operators"])))
    return {**whole, **part, "cpu": whole["cpu"], "kernels": kernels, "operators": operators}


def _name(kernel: Record) -> str:
    return json.dumps([kernel[field] for field in KNOWN], sort_keys=True)


def _call(operator: Record) -> tuple[str, ...]:
    return tuple(str(operator[field]) for field in ("operator", "options", "capability", "dtype", "layout"))


def _text(kernel: Record) -> str:
    """All but the time that compiling it took."""
    return json.dumps({**kernel, "seconds": 0}, sort_keys=True)
