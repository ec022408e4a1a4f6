"""What a detector's dense head took and gave in one forward pass, for the losses on its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.tap import _uncompiled, unwrap


class HeadRecord:
    """One forward pass of a head.

    head:     its type, for messages
    features: the levels (N, C, H, W) that it was given;   output: what it returned
    parts:    name of a watched submodule (an adapter's `watched`) -> what it gave, a tensor a level
    """

    def __init__(self) -> None:
        self.head = "head"
        self.features: list[Tensor] = []
        self.output: Any = None
        self.parts: dict[str, list[Tensor]] = {}

    def levels(self, order: Sequence[int]) -> HeadRecord:
        """Features and parts of these levels alone."""
        chosen = HeadRecord()
        chosen.head = self.head
        chosen.features = [self.features[i] for i in order]
        chosen.parts = {name: [part[i] for i in order] for name, part in self.parts.items()}
        return chosen


class HeadWatch:
    """Writes every forward pass of a model's head into the record that `record` gives, if any.

    adapter: of the model's family: `head_module` is the head's path;   crosses: whether the towers' features are wanted
    detach:  keep everything without its graph
    """

    def __init__(
        self, model: nn.Module, adapter: Any, crosses: bool, record: Callable[[], HeadRecord | None], detach: bool = False
    ) -> None:
        bare = unwrap(model)
        head = bare.get_submodule(adapter.head_module)
        self._record, self._detach, self._name = record, detach, type(head).__name__
        self._handles: list[Any] = [
            head.register_forward_pre_hook(_uncompiled(self._given()), with_kwargs=True),
            head.register_forward_hook(_uncompiled(self._returned())),
        ]
        for name, module in adapter.watched(bare, crosses).items():
            self._handles.append(module.register_forward_hook(_uncompiled(self._part(name))))

    def _given(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record = self._record()
            if record is not None:
                # A head that runs again is described by its last pass.
                record.parts.clear()
                record.head = self._name
                record.features = self._kept(list(args[0] if args else next(iter(kwargs.values()))))

        return hook

    def _returned(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record = self._record()
            if record is not None:
                record.output = self._kept(output)

        return hook

    def _part(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            record = self._record()
            if record is not None:
                # A copy: the activation behind it may work in place.
                record.parts.setdefault(name, []).append(self._kept(output).clone())

        return hook

    def _kept(self, value: Any) -> Any:
        if not self._detach:
            return value
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, Mapping):
            return {key: self._kept(one) for key, one in value.items()}
        return [self._kept(one) for one in value]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> HeadWatch:
        return self

    def __exit__(self, *details: object) -> None:
        self.remove()


def align_statistics(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's features (N, C, H, W) with the teacher's mean and unbiased deviation per channel over (N, H, W).

    (x - mean) / (std + 1e-6), as released with CrossKD; the deviation of a single value is 0.
    """
    mean, std = _statistics(student)
    mean_t, std_t = _statistics(teacher)
    return (student - mean) / (std + 1e-6) * std_t + mean_t


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    many = x.shape[0] * x.shape[2] * x.shape[3] > 1
    mean = x.mean((0, 2, 3), keepdim=True)
    return mean, x.std((0, 2, 3), keepdim=True) if many else torch.zeros_like(mean)
