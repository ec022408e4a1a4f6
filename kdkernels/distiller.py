"""Distil any two PyTorch detectors: tap the student's features, ask the teacher, add the losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.adapters import PyramidAdapter
from kdkernels.distillation_call import DistillationCall, cuda_devices
from kdkernels.head import HeadWatch
from kdkernels.integrations import DetectorAdapter, find_adapter
from kdkernels.losses.base import DistillationLoss, NonFinite
from kdkernels.losses.trainable import Trainable, trained_part
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
        self._check_head_needs()
        self.trainable = nn.ModuleDict()
        if any(loss.compares_features for loss in self.losses.values()):
            self.trainable["adapter"] = PyramidAdapter()
        self._trained = self._find_trained()
        self.keep_trained()
        self._call: DistillationCall | None = None
        self._values: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        paths = student_tap or self.adapter.default_tap
        paths = (paths,) if isinstance(paths, str) else paths
        self._check_paths(paths)
        self._tap = FeatureTap(student, *paths, replace=self._on_features)
        self._head: HeadWatch | None = None
        if "outputs" in self.needs:
            self._head = HeadWatch(student, self.adapter, self.crosses, lambda: None if self._call is None else self._call.head)
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
        if self.mode == "inline":
            for refusal in inline_refusals(self.losses):
                raise ValueError(f"{refusal}; use mode='explicit', which takes the student's gradient from the detector's losses alone")
            for name, loss in self.losses.items():
                if "student_gradients" in loss.needs and self.gradient_source == "pseudo":
                    raise ValueError(f"loss {name!r}: gradient_source='pseudo' is not the gradient that passes by; use mode='explicit'")
        if self.task_weights and self.mode == "inline":
            raise ValueError("task_weights belong to mode='explicit': inline sees the gradient of whatever sum you call backward on")

    @property
    def needs(self) -> frozenset[str]:
        """What the losses need, all together."""
        return frozenset().union(*(loss.needs for loss in self.losses.values()))

    @property
    def crosses(self) -> bool:
        """Whether a loss wants the teacher's head on the student's head features."""
        return any(loss.crosses for loss in self.losses.values())

    def _check_head_needs(self) -> None:
        sides: Any = (("student", self.adapter), ("teacher", self.teacher.adapter))
        for name, loss in self.losses.items():
            wanted = [(need, side, adapter, "head_outputs") for side, adapter in sides for need in ["outputs"] if need in loss.needs]
            wanted += [("anchors", *sides[1], "anchors")] if "anchors" in loss.needs else []
            wanted += [("crossed heads", *sides[1], "cross")] if loss.crosses else []
            for need, side, adapter, method in wanted:
                if not hasattr(adapter, method):
                    kind = type(adapter).__name__
                    raise ValueError(f"loss {name!r} needs the {side}'s {need}, which {kind} does not give (it has no {method}())")
            if loss.crosses:
                # Raises for heads that have nothing to share, before there are hooks.
                for model, (_, adapter) in zip((self.student, self.teacher.model), sides, strict=True):
                    adapter.watched(unwrap(model), True)

    def _check_paths(self, paths: tuple[str, ...]) -> None:
        if len(paths) > 1:
            for name, loss in self.losses.items():
                whole = trained_part(loss) is not None or not loss.needs.isdisjoint({"outputs", "anchors"})
                if whole:
                    raise ValueError(f"loss {name!r} has to see all levels at once, and a tap of {len(paths)} modules fires one by one")

    def _find_trained(self) -> dict[str, Trainable]:
        found: dict[str, Trainable] = {}
        for name, loss in self.losses.items():
            part = trained_part(loss)
            if part is not None:
                if any(part is other for other in found.values()):
                    raise ValueError(f"loss {name!r} shares its trained parts with another one: give each a loss of its own")
                found["loss_" + name] = part
        return found

    def keep_trained(self) -> None:
        """Enter the losses' trained parts that exist into `trainable`."""
        for name, part in self._trained.items():
            if part.trainable is not None and name not in self.trainable:
                self.trainable[name] = part.trainable

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
        """Make all trainable parts for one sample batch, before an optimiser or DistributedDataParallel looks for parameters.

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
                if name in self._trained:
                    # The loss has to go through the wrapper, which is what adds up the gradients of all processes.
                    self._trained[name].trainable = self.trainable[name]
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
        """Restore `state_dict`; the trainable parts must be built. Raises ValueError when they are not, or differ."""
        if set(state["trainable"]) != set(self.trainable):
            hint = "; call build(images, targets) first" if set(state["trainable"]) > set(self.trainable) else ""
            raise ValueError(f"trainable parts: expected {sorted(self.trainable)}, got {sorted(state['trainable'])}{hint}")
        for name, module in self.trainable.items():
            unwrap(module).load_state_dict(state["trainable"][name])
        self.teacher.load_state_dict(state["teacher_random_state"])

    def close(self) -> None:
        """Take all hooks off the student, and off the teacher unless it was given as a Teacher, which may serve others."""
        self._tap.remove()
        if self._owns_teacher:
            self.teacher.close()
        for hook in (self._frame_hook, self._head):
            if hook is not None:
                hook.remove()

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def inline_refusals(losses: Mapping[str, DistillationLoss]) -> list[str]:
    """Why these losses cannot be computed inside the backward pass, a sentence a reason; none if they can."""
    found = []
    late = {name: loss for name, loss in losses.items() if "student_gradients" in loss.needs}
    for name, loss in late.items():
        reason = loss.inline_refusal()
        if reason is None and trained_part(loss) is not None:
            reason = "it has parts that train and needs the student's gradients"
        if reason is not None:
            found.append(f"loss {name!r} cannot run inside the backward pass: {reason}")
    on_outputs = [name for name, loss in losses.items() if "outputs" in loss.needs]
    if on_outputs and late:
        found.append(
            f"losses {on_outputs} act on the head's outputs, so their gradient would be part of the student's gradient that {list(late)} "
            "see passing by"
        )
    return found


def _teacher_beside(student: nn.Module, teacher: nn.Module, tap: str | tuple[str, ...] | None) -> Teacher:
    ours = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in ours for parameter in teacher.parameters()):
        raise ValueError("teacher and student share parameters, and the teacher would be frozen: pass copy.deepcopy(student)")
    return Teacher(teacher, tap=tap)
