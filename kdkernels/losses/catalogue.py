"""Every method of the library by name: its class, its defaults, and a new loss of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .. import losses
from .base import DistillationLoss, Method, check_kind

_EXPORTED = [getattr(losses, name) for name in losses.__all__]
_CLASSES: list[type[DistillationLoss]] = [kind for kind in _EXPORTED if isinstance(kind, type) and issubclass(kind, DistillationLoss)]
#: Name -> what it is and the loss that computes it, for the losses that `kdkernels.losses` exports.
METHODS: dict[str, tuple[Method, type[DistillationLoss]]] = {
    method.name: (method, kind)
    for method, kind in sorted(((method, kind) for kind in _CLASSES for method in vars(kind).get("methods", ())), key=lambda x: x[0].name)
}
#: How a loss is used, not what the method is; `base` is the loss that a wrapper takes.
_OF_THE_CALL = frozenset({"base", "preset", "reduction", "on_nonfinite", "seed"})


def make_loss(name: str, options: Mapping[str, Any] | None = None) -> DistillationLoss:
    """A new loss of the method `name` with the options of its constructor; a wrapper takes the loss that it wraps as `base`.

    Raises ValueError for an unknown method or option (with the valid ones), and for a value that the loss refuses.
    """
    method, kind = _found(name)
    given = {**method.options, **(options or {})}
    valid = inspect.signature(kind).parameters
    unknown = [key for key in given if key not in valid]
    if unknown:
        raise ValueError(f"unknown options {', '.join(unknown)}; {name} has {', '.join(valid)}")
    for key, value in given.items():
        # The losses check what their presets have.
        check_kind(key, value, valid[key].default)
    if method.wraps and "base" not in given:
        raise ValueError(f"{name} wraps another loss, base, which is missing")
    return kind(**given)


def defaults(name: str) -> dict[str, dict[str, Any]]:
    """Preset -> option -> value of the method `name`; where the loss has no presets, the only one is "default".

    Raises ValueError for an unknown method.
    """
    method, kind = _found(name)
    signature = {key: p.default for key, p in inspect.signature(kind).parameters.items() if key not in _OF_THE_CALL}
    fixed = {key: value for key, value in method.options.items() if key != "preset"}
    presets: Mapping[str, Mapping[str, Any]] = kind.PRESETS or {"default": {}}
    chosen = [method.options["preset"]] if "preset" in method.options else presets
    found = {preset: {**signature, **presets[preset], **fixed} for preset in chosen}
    return {preset: {key: value for key, value in values.items() if key not in method.lacks} for preset, values in found.items()}


def _found(name: str) -> tuple[Method, type[DistillationLoss]]:
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]
