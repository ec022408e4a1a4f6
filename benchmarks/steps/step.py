"""What is timed: one training step of the student in a variant, and all that its variants share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import Distiller, Teacher
from kdkernels.losses import DistillationLoss
from kdkernels.losses.base import HEAD_NEEDS
from kdkernels.losses.trainable import trained_part

from ..providers import Provider
from ..registry import Entry
from .losses import FunctionLoss, Probe, all_needs
from .pairs import Pair, make_batch, make_models

#: A real update whose effect on the weights is too small to matter: every round measures the same step.
LEARNING_RATE = 1e-8

#: What the teacher is asked for (None: there is no teacher) -> name of the step that does just that.
PROBES: dict[frozenset[str] | None, str] = {
    None: "student",
    frozenset(): "+ teacher forward",
    frozenset({"teacher_gradients"}): "+ teacher head gradient",
    frozenset({"teacher_losses"}): "+ teacher losses",
    frozenset({"teacher_gradients", "teacher_losses"}): "+ teacher head gradient and losses",
}


@dataclass(frozen=True)
class Variant:
    """What a step does besides training the student.

    asks:     what the teacher is asked for, a key of `PROBES`
    loss, provider, mode: of distillation; None in a probe. `mode` is "inline", "explicit", or "either" of a loss that does not need the
              student's gradient: both are the same for it
    """

    asks: frozenset[str] | None
    loss: str | None = None
    provider: str | None = None
    mode: str | None = None

    @property
    def name(self) -> str:
        return PROBES[self.asks] if self.loss is None else f"+ {self.loss}"

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.provider, self.mode)))

    @property
    def probe(self) -> Variant:
        """The step that asks the teacher for the same."""
        return Variant(self.asks)


def variants(entries: Iterable[Entry], providers: Iterable[str], modes: Iterable[str]) -> list[Variant]:
    """All of a run: the probes that are needed, then each loss by each provider in each mode."""
    providers, modes = list(providers), list(modes)
    found = []
    for entry in entries:
        needs = all_needs(_losses(entry).values())
        asks = needs & {"teacher_gradients", "teacher_losses"}
        own_modes = modes if "student_gradients" in needs else ["either"]
        found += [Variant(asks, entry.name, provider, mode) for provider in providers for mode in own_modes]
    always = {None, frozenset[str](), frozenset({"teacher_gradients"})}
    asked = always | {variant.asks for variant in found}
    return [Variant(asks) for asks in PROBES if asks in asked] + found


class Bench:
    """Teacher, student and batch that all steps share. Each step trains a copy of the student; the teacher, frozen, is one for all.

    amp: run the student's and the teacher's forward under bf16 autocast.
    """

    def __init__(self, pair: Pair, batch: int, device: torch.device, amp: bool = False, seed: int = 0):
        self.device, self.amp, self.seed = device, amp, seed
        self.batch = make_batch(pair, batch, device, seed)
        teacher, self.student = make_models(pair, self.batch, device, seed)
        self.teacher = Teacher(teacher)
        self._random_state = self.teacher.state_dict()

    def reset(self) -> None:
        """Makes the next step's random choices (sampled anchors and regions) those of every other step after a reset."""
        torch.manual_seed(self.seed)
        self.teacher.load_state_dict(self._random_state)

    def step(self, variant: Variant, entry: Entry | None = None, provider: Provider | None = None) -> Step:
        """`entry` and `provider` of a variant with a loss."""
        losses: dict[str, DistillationLoss] = {}
        if entry is not None and provider is not None:
            losses = _losses(entry)
            if provider.backend is None:
                losses = {"loss": FunctionLoss(provider.function(entry), losses.values())}
        elif variant.asks is not None:
            losses = {"probe": Probe(variant.asks)}
        return Step(self, losses, "explicit" if variant.mode == "explicit" else "inline", provider)


class Step:
    """One training step: forward, backward, SGD. Frees its gradients at the end, so that only the step under way holds any."""

    def __init__(self, bench: Bench, losses: Mapping[str, DistillationLoss], mode: str, provider: Provider | None = None):
        self.bench, self.provider = bench, provider
        self.model = copy.deepcopy(bench.student)
        self._forward = Distiller(self.model, bench.teacher, losses, mode=mode) if losses else self.model
        self._optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE)

    def __call__(self) -> Tensor:
        """The sum of the losses (of inline ones the value is not in it)."""
        with self.provider.active(tf32=True) if self.provider else nullcontext():
            total = torch.stack(list(self._losses().values())).sum()
            total.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return total.detach()

    def gradient(self, factor: float = 1.0) -> Tensor:
        """The gradient at all parameters in one row, (P,), with distillation counted `factor` times; changes no parameter."""
        self.bench.reset()
        with self.provider.active(tf32=True) if self.provider else nullcontext():
            weighted = [value * factor if name.startswith("kd_") else value for name, value in self._losses().items()]
            torch.stack(weighted).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        self._optimizer.zero_grad()
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _losses(self) -> dict[str, Tensor]:
        with torch.autocast(self.bench.device.type, torch.bfloat16, enabled=self.bench.amp):
            losses = self._forward(*self.bench.batch)
        return {name: loss.float() for name, loss in losses.items()}


def has_step(entry: Entry) -> bool:
    """Whether its functions can stand in a step for its losses, in both modes: they get features, gradients, boxes and the teacher's losses
    there, and nothing that trains."""
    losses = [] if entry.losses is None else list(entry.losses().values())
    return bool(losses) and not any(loss.needs & HEAD_NEEDS or trained_part(loss) or loss.inline_refusal() for loss in losses)


def _losses(entry: Entry) -> dict[str, DistillationLoss]:
    if entry.losses is None:
        raise ValueError(f"{entry.name} has no losses, so no training step can use it")
    return entry.losses()
