"""Distil any two PyTorch detectors: tap the student's features, ask the teacher, add the losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.adapters import PyramidAdapter
from kdkernels.distillation_call import DistillationCall, cuda_devices
from kdkernels.integrations import DetectorAdapter, find_adapter
from kdkernels.losses.base import DistillationLoss, NonFinite
from kdkernels.tap import Features, FeatureTap, unwrap
from kdkernels.teacher import Teacher, check_gradient_source

MODES = ("inline", "explicit")


class Distiller:
    """Calls the student as the training loop does, and adds distillation losses to its loss dict.

    The student is neither wrapped nor changed: its class, ``state_dict`` and checkpoints stay what they were. It may be
    inside DistributedDataParallel or torch.compile. ::

        distiller = Distiller(student, teacher, {"gkd": GKDLoss(), "bmfi": BMFILoss()})
        losses = distiller(images, targets)     # the detector's own losses plus "kd_gkd" and "kd_bmfi"
        sum(losses.values()).backward()

    Args:
        student: the detector to train, in training mode when called.
        teacher: a detector, or a `Teacher`. It is frozen.
        losses: name to loss; each appears as ``"kd_" + name``. Their ``reduction`` must be "sum".
        student_tap, teacher_tap: module paths as `FeatureTap` takes them; the adapters' defaults when None.
        levels: names of the student levels to teach; None means all but those the detector's adapter excludes.
        mode: "inline" evaluates losses that need the student's gradient during the backward pass, and with them those that
            share their passes over the features; their values are 0 until then and `last_values` has them afterwards.
            "explicit" asks for the gradient before the backward pass.
        adapter: the student's detector family; found by its type when None.
        task_weights: explicit only: weight of each task loss in the loss whose gradient G_S is; give those of your own
            weighted sum. Inline needs none: it sees the gradient that arrives.
        gradient_source: of the student, "gt", or in explicit mode "pseudo" (see `Teacher`).

    Raises:
        ValueError: options that cannot work together; the message names what to use instead.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher,
        losses: Mapping[str, DistillationLoss],
        student_tap: str | tuple[str, ...] | None = None,
        teacher_tap: str | tuple[str, ...] | None = None,
        levels: list[str] | None = None,
        mode: str = "inline",
        adapter: DetectorAdapter | None = None,
        task_weights: Mapping[str, float] | None = None,
        gradient_source: str = "gt",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        self.student = student
        self.adapter = adapter or find_adapter(student)
        self.losses = dict(losses)
        self.mode = mode
        self.levels = levels
        self.task_weights = dict(task_weights or {})
        self.gradient_source = gradient_source
        self._check_options()
        self._owns_teacher = not isinstance(teacher, Teacher)
        if isinstance(teacher, Teacher) and teacher_tap is not None:
            raise ValueError("teacher_tap: the given Teacher has a tap of its own; give its tap= instead")
        self.teacher = teacher if isinstance(teacher, Teacher) else _teacher_beside(student, teacher, teacher_tap)
        self.trainable = nn.ModuleDict()
        if any(loss.compares_features for loss in self.losses.values()):
            self.trainable["adapter"] = PyramidAdapter()
        self._call: DistillationCall | None = None
        self._values: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        paths = student_tap or self.adapter.default_tap
        self._tap = FeatureTap(student, *([paths] if isinstance(paths, str) else paths), replace=self._on_features)
        self._frame_hook: Any = None
        if frame_module := getattr(self.adapter, "frame_module", None):
            self._frame_hook = unwrap(student).get_submodule(frame_module).register_forward_hook(self._frame_seen)

    def _check_options(self) -> None:
        check_gradient_source(self.gradient_source, self.adapter)
        if not self.losses:
            raise ValueError("losses: expected at least one loss, got an empty mapping")
        for name, loss in self.losses.items():
            if not isinstance(loss, DistillationLoss):
                raise TypeError(f"loss {name!r}: expected a loss of this library, got {type(loss).__name__}")
            if loss.reduction != "sum":
                raise ValueError(f"loss {name!r}: the Distiller adds scalars, so reduction must be 'sum', got {loss.reduction!r}")
            if self.mode == "inline" and "student_gradients" in loss.needs:
                if reason := loss.inline_refusal():
                    raise ValueError(f"loss {name!r} cannot run inside the backward pass: {reason}; use mode='explicit'")
                if self.gradient_source == "pseudo":
                    raise ValueError(f"loss {name!r}: gradient_source='pseudo' is not the gradient that passes by; use mode='explicit'")
        if self.task_weights and self.mode == "inline":
            raise ValueError("task_weights belong to mode='explicit': inline sees the gradient of whatever sum you call backward on")

    def __call__(
        self,
        images: Any,
        targets: Any,
        student_gradients: Mapping[str, Tensor] | None = None,
        teacher_gradients: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The student's own losses plus one scalar per distillation loss.

        Args:
            images, targets: what the student itself takes in training.
            student_gradients, teacher_gradients: level name to (N, C, H, W), in place of the gradients that would be computed
                (student's: explicit mode only).

        Raises:
            RuntimeError: under no_grad, or when the student's tap saw no features.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("the Distiller computes training losses: call it outside of torch.no_grad()")
        if student_gradients is not None and self.mode == "inline":
            raise ValueError("student_gradients: inline uses the gradient that passes by; give them to mode='explicit'")
        call = DistillationCall(self, images, targets, student_gradients, teacher_gradients)
        self._values = call.record.values
        return self._run(call, self.student)

    def _run(self, call: DistillationCall, student: nn.Module) -> dict[str, Tensor]:
        self._call = call
        try:
            losses = self.adapter.losses(student, call.images, call.targets)
        finally:
            self._call = None
            self._tap.clear()
        return call.finish(losses)

    def _frame_seen(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._call is not None:
            self._call.frame = output

    def _on_features(self, path: str, features: Features) -> Features:
        # Without a call of ours under way the student is being evaluated, or trained without distillation.
        return features if self._call is None else self._call.student_features(self._tap.level_names(path, features), features)

    def build(self, images: Any, targets: Any) -> Distiller:
        """Make the channel adapters for one sample batch, before an optimiser or DistributedDataParallel looks for parameters.

        The student is as it was afterwards: buffers (running statistics) and the random stream are restored.
        """
        student = unwrap(self.student)
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        with torch.random.fork_rng(devices=cuda_devices(student)), torch.no_grad():
            self._run(DistillationCall(self, images, targets, only_build=True), student)
            for name, buffer in student.named_buffers():
                buffer.copy_(buffers[name])
        return self

    def prepare(self, wrap: Callable[[nn.Module], nn.Module] | None = None) -> Distiller:
        """Put the trainable parts into wrappers of their own, for more than one process. Call it after `build`.

        Args:
            wrap: what wraps a module, such as ``fully_shard`` or ``accelerator.prepare_model``; DistributedDataParallel when None
                and a process group of more than one rank exists.
        """
        if wrap is None:
            if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
                return self
            wrap = nn.parallel.DistributedDataParallel
        for name, module in self.trainable.items():
            if any(parameter.requires_grad for parameter in module.parameters()):
                self.trainable[name] = wrap(module)
        return self

    def last_values(self) -> dict[str, Tensor]:
        """Value of every loss ("kd_name") and term ("kd_name/term") of the last call; inline losses appear with its backward."""
        return dict(self._values)

    def check(self) -> list[NonFinite]:
        """Non-finite (loss by its name here, term, level, image) met since the last check, which this clears. Waits for the device."""
        return [report._replace(loss=name) for name, loss in self.losses.items() for report in loss.check()]

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: the trainable parts and the teacher's random stream. Not the student, not the teacher."""
        parts = {name: unwrap(module).state_dict() for name, module in self.trainable.items()}
        return {"trainable": parts, "teacher_random_state": self.teacher.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; the trainable parts must be built. Raises ValueError when the parts differ."""
        if set(state["trainable"]) != set(self.trainable):
            raise ValueError(f"trainable parts: expected {sorted(self.trainable)}, got {sorted(state['trainable'])}")
        for name, module in self.trainable.items():
            unwrap(module).load_state_dict(state["trainable"][name])
        self.teacher.load_state_dict(state["teacher_random_state"])

    def close(self) -> None:
        """Take all hooks off the student, and off the teacher unless it was given as a Teacher, which may serve others."""
        self._tap.remove()
        if self._owns_teacher:
            self.teacher.close()
        if self._frame_hook is not None:
            self._frame_hook.remove()

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def _teacher_beside(student: nn.Module, teacher: nn.Module, tap: str | tuple[str, ...] | None) -> Teacher:
    ours = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in ours for parameter in teacher.parameters()):
        raise ValueError("teacher and student share parameters, and the teacher would be frozen: pass copy.deepcopy(student)")
    return Teacher(teacher, tap=tap)
