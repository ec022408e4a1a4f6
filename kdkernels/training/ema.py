"""Exponential moving average of a model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A copy of `model` whose floating-point state follows `average = decay * average + (1 - decay) * model`.

    The decay grows as (1 + n) / (10 + n) with the number of updates n up to `decay`, so that the random start is forgotten. Integer
    state is copied. The copy is in eval mode and frozen.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, loadable into the model's class."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        self.model.load_state_dict(state)
        self.updates = updates
