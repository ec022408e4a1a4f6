"""Losses around another loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import ARGUMENTS, DistillationLoss


class WrapperLoss(DistillationLoss):
    """Base of the losses that change the terms of another one, `base`.

    It needs what `base` needs and `also`; weight, reduction and on_nonfinite of `base` stay in force.
    """

    also: frozenset[str] = frozenset()

    def __init__(self, base: DistillationLoss):
        if not isinstance(base, DistillationLoss):
            raise TypeError(f"{type(self).__name__} wraps a loss of this library (GKDLoss, BMFILoss, ...); got {type(base).__name__}")
        super().__init__(base.weight, base.reduction, base.on_nonfinite)
        self.base: Any = base
        self.needs = base.needs | self.also
        self.compares_features, self.level_free, self.crosses = base.compares_features, base.level_free, base.crosses
        self.argument_names = base.argument_names
        self.weighed_by, self.by_parts = base.weighed_by, base.by_parts
        # Whoever provides the student's gradients asks for it, to know whether they need a graph.
        self.grad_mode = getattr(base, "grad_mode", None)

    def inline_refusal(self) -> str | None:
        return self.base.inline_refusal()

    def coefficient(self, term: str) -> float:
        return self.base.coefficient(term)

    def check_features(self, student_features: Any, teacher_features: Any) -> None:
        self.base.check_features(student_features, teacher_features)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base loss's arguments, and by keyword what wrappers need besides (teacher_losses). Scalar, or (L, N) by its reduction."""
        base, names = type(self.base).__name__, self.argument_names
        keywords = [name for name in ARGUMENTS["teacher_losses"] if name not in names and "teacher_losses" in self.needs]
        if len(args) > len(names):
            hint = "".join(f"; pass {name}= by keyword" for name in keywords)
            raise TypeError(f"{base} takes {len(names)} arguments, got {len(args)}{hint}")
        given = dict(zip(names, args, strict=False))
        repeated = sorted(given.keys() & kwargs.keys())
        if repeated:
            raise TypeError(f"{type(self).__name__} got {', '.join(repeated)} twice")
        unknown = sorted(kwargs.keys() - {*names, *keywords})
        if unknown:
            raise TypeError(f"{base} takes no argument {', '.join(unknown)}")
        missing = [name for name in ("student_features", "teacher_features") if name not in given and name not in kwargs]
        if missing:
            raise TypeError(f"{type(self).__name__} needs {' and '.join(missing)}, which {base} compares")
        return self.evaluate(**given, **kwargs)
