"""One declaration of a primitive or method, read by the tests and by the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.losses import DistillationLoss

from .case import DTYPES, LAYOUTS, Case

#: forward:         values without gradient
#: backward:        values and the gradient to `differentiable`, upstream gradient 1
#: backward_scaled: the same at upstream gradient 65536, as a GradScaler sends it
#: inline:          G_S + d * dKD inside the backward pass (methods only)
MODES = ("forward", "backward", "backward_scaled", "inline")
UPSTREAM = {"backward": 1.0, "backward_scaled": 65536.0, "inline": 65536.0}

Inputs = dict[str, Any]
Function = Callable[..., Any]


class Tolerance(NamedTuple):
    """Largest relative error ||got - want|| / ||want|| of each value and of each level's gradient."""

    value: float
    gradient: float


#: Sums are fp32 whatever the inputs are; a gradient is rounded once to its feature's type (half a unit in the last place: 2^-9 for bf16,
#: 2^-12 for fp16). fp32 sums of 1e7 terms by any sensible tree are good to a few 1e-6.
TOLERANCES: dict[str, Tolerance] = {"fp32": Tolerance(2e-5, 2e-5), "bf16": Tolerance(2e-5, 4e-3), "fp16": Tolerance(2e-5, 1e-3)}


@dataclass(frozen=True)
class Entry:
    """A primitive or a method of kdkernels.

    name:           its one name
    kind:           "primitive" or "method"
    inputs:         (case, generator, device) -> keyword arguments of the functions below: tensors, lists of tensors, plain values
    call:           the public kdkernels call; with backend "reference" and float64 inputs it is the oracle
    eager:          the same maths as a good PyTorch user writes it: vectorised, no kdkernels
    paper:          the same maths as the published codes do it: Python loops over images and boxes, no kdkernels
    units:          mode -> pyramids moved at the least (architecture: one unit is the bytes of one pyramid); modes that are not in it are
                    not defined for this entry
    small_bytes:    (case, mode) -> least bytes besides whole pyramids; counted where there are no pyramids
    differentiable: name of the argument, a list of tensors, that the gradient goes to; None where there is no gradient
    values_like:    name of the argument, a list of tensors, whose types the values have; None where they are fp32 whatever it is
    losses:         of a method: makes the losses it consists of, for the inline mode and for whole training steps
    tolerances:     dtype -> Tolerance
    absent:         (backend of kdkernels or name of a baseline, case, device) -> why that cannot make this call there, or has none of
                    its own, "" where it can
    settle:         moves random inputs, in place, off the points where this entry's gradient jumps (see `settle.py`), so that the
                    tolerances hold without exceptions; `inputs` has done it, whoever fills inputs anew does it again
    """

    name: str
    kind: str
    inputs: Callable[[Case, torch.Generator, torch.device], Inputs]
    call: Function
    eager: Function
    paper: Function
    units: Mapping[str, float]
    small_bytes: Callable[[Case, str], int] = lambda case, mode: 0
    differentiable: str | None = None
    values_like: str | None = None
    losses: Callable[[], dict[str, DistillationLoss]] | None = None
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: TOLERANCES)
    absent: Callable[[str, Case, torch.device], str] = lambda backend, case, device: ""
    settle: Callable[[Inputs], None] = lambda inputs: None

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in MODES if mode in self.units)

    def ideal_bytes(self, case: Case, mode: str) -> int:
        """The least a fused version must move."""
        return round(self.units[mode] * case.unit) + self.small_bytes(case, mode)


def pyramid(case: Case, generator: torch.Generator, device: torch.device, scale: float = 1.0) -> list[Tensor]:
    """Normal random levels (N, C, H, W) of the case's type and layout."""
    levels = []
    for height, width in case.level_sizes:
        x = scale * torch.randn(case.batch, case.channels, height, width, generator=generator)
        levels.append(x.to(device, DTYPES[case.dtype]).contiguous(memory_format=LAYOUTS[case.layout]))
    return levels


def boxes(case: Case, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded boxes (N, M, 4) xyxy in pixels, 16 to 400 wide and high and partly outside, and counts (N,)."""
    height, width = case.image_size
    extent = torch.tensor([width, height], dtype=torch.float32)
    centre = torch.rand(case.batch, case.boxes, 2, generator=generator) * extent
    half = 8 * 25 ** torch.rand(case.batch, case.boxes, 2, generator=generator)
    padded = torch.cat([centre - half, centre + half], 2)
    return padded.to(device), torch.full((case.batch,), case.boxes, device=device)


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a result, depth first."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in flat(value)]
