"""One call of the Distiller, from the student's forward pass to the end of its backward pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kdkernels.adapters import PyramidAdapter, pair_levels
from kdkernels.head import HeadRecord
from kdkernels.inline import InlinePlan, InlineTap, Terms
from kdkernels.losses.base import HEAD_NEEDS, DistillationLoss, TeacherLosses
from kdkernels.losses.composed import teacher_sides, term_values
from kdkernels.losses.trainable import trained_part
from kdkernels.outputs import HeadOutputs, levels_of
from kdkernels.tap import Features, unwrap
from kdkernels.teacher import TeacherOutput, loss_mode, pseudo_losses, scaled_gradients

if TYPE_CHECKING:
    from kdkernels.distiller import Distiller

Pairs = list[tuple[str, str]]
LEVEL_GRANULARITIES = {"level", "level x image"}


class CallValues:
    """Values of one call's losses and terms. Outlives the call inside the autograd graph, so it refers to nothing else."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._parts: dict[str, dict[int, Tensor]] = {}
        self._handles: dict[str, Tensor] = {}

    def bind(self, name: str, handle: Tensor) -> None:
        # .data: filling in the value during the backward pass is not an operation that autograd should see.
        self._handles[name] = handle.data

    def record(self, part: int, name: str, terms: Terms, value: Tensor) -> None:
        """Value of one loss at one firing of the tap; a second backward through the same graph replaces it."""
        numbers = {f"kd_{name}/{term}": entries.detach().sum() for term, entries in terms.items()}
        for key, number in {f"kd_{name}": value, **numbers}.items():
            parts = self._parts.setdefault(key, {})
            parts[part] = number
            self.values[key] = torch.stack(list(parts.values())).sum()
        if name in self._handles:
            self._handles[name].copy_(self.values[f"kd_{name}"])


class DistillationCall:
    """State of one call: what the student showed, what the teacher said, and the values found on the way."""

    def __init__(
        self,
        distiller: Distiller,
        images: Any,
        targets: Any,
        student_gradients: Mapping[str, Tensor] | None = None,
        teacher_gradients: Mapping[str, Tensor] | None = None,
        only_build: bool = False,
    ) -> None:
        self.distiller = distiller
        self.images, self.targets = images, targets
        self.frame: tuple[Any, Any] = (images, targets)
        self.given_student_gradients = student_gradients
        self.given_teacher_gradients = teacher_gradients
        self.only_build = only_build
        self.record = CallValues()
        self.results: dict[str, list[Tensor]] = {}
        self.head = HeadRecord()
        self.on_outputs: tuple[Features, Pairs] | None = None
        self.explicit: list[tuple[Features, Pairs]] = []
        self.copies: Features = OrderedDict()
        self.head_features: Features = OrderedDict()
        self._handles: dict[str, list[Tensor]] = {}
        self._adapted: dict[tuple[str, ...], list[Tensor]] = {}
        self._teacher: TeacherOutput | None = None
        self._own_outputs: HeadOutputs | None = None
        self._names: list[str] = []
        self._seen: set[str] = set()

    def student_features(self, names: list[str], features: Features) -> Features:
        """Called by the student's tap: uses what passes and gives what the head shall see."""
        again = self._seen.intersection(names)
        if again:
            raise RuntimeError(f"levels {sorted(again)} passed the student's tap twice in one call: tap a module that is called once")
        self._seen.update(names)
        self._names = list(names)
        named = OrderedDict(zip(names, features.values(), strict=True))
        chosen = self._chosen(named)
        if not chosen:
            return features
        try:
            pairs = pair_levels(chosen, self._teacher_levels(), self._image_size)
        except ValueError:
            # Of several paths some may have no partner, as some levels of one path may; `finish` raises when none has.
            if len(self.distiller._tap.paths) == 1:
                raise
            return features
        chosen = OrderedDict((name, chosen[name]) for name, _ in pairs)
        self._build(chosen, pairs)
        if self.only_build:
            return features
        if any(_after_the_head(loss) for loss in self.distiller.losses.values()):
            self.on_outputs = chosen, pairs
        with_gradient, without = self._split_losses(chosen, pairs)
        self._evaluate(without, chosen, None, pairs)
        passed = dict(zip(named, features, strict=True))
        replaced = OrderedDict(features)
        if with_gradient and self.distiller.mode == "inline" and any(x.requires_grad for x in chosen.values()):
            record = partial(self.record.record, len(self._seen))
            plan = InlinePlan(with_gradient, self._sides(with_gradient, pairs), record)
            outputs = InlineTap.apply(plan, *chosen.values())
            for name, handle in zip(with_gradient, outputs[len(chosen) :], strict=True):
                self._handles.setdefault(name, []).append(handle)
        elif with_gradient:
            if self.distiller.mode == "inline":
                self.distiller.warn_once(
                    "the student's tapped features need no gradient (frozen backbone), so no backward pass reaches them: "
                    "their losses are evaluated explicitly"
                )
            outputs = InlineTap.apply(InlinePlan({}, {}, lambda *_: None), *(_differentiable(x) for x in chosen.values()))
            self.copies.update(zip(chosen, outputs, strict=True))
            self.explicit.append((chosen, pairs))
        else:
            return features
        for name, output in zip(chosen, outputs[: len(chosen)], strict=True):
            replaced[passed[name]] = output
        self.head_features.update(replaced)
        return replaced

    def finish(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called after the student's forward pass: the explicit losses, and everything in one dict."""
        if not self._seen:
            raise RuntimeError(f"the student's tap {self.distiller._tap.paths} saw no features: the module was not called")
        if self.only_build:
            return losses
        if self.explicit:
            self._evaluate_explicit(losses)
        if self.on_outputs is not None:
            chosen, pairs = self.on_outputs
            self._evaluate({n: loss for n, loss in self.distiller.losses.items() if _after_the_head(loss)}, chosen, None, pairs)
        result = dict(losses)
        for name in self.distiller.losses:
            key = "kd_" + name
            if name in self._handles:
                handles = self._handles[name]
                result[key] = handles[0] if len(handles) == 1 else torch.stack(handles).sum()
                self.record.bind(name, result[key])
            elif name in self.results:
                result[key] = torch.stack(self.results[name]).sum()
            else:
                raise RuntimeError(f"loss {name!r}: none of the levels {self.distiller.levels} passed the student's tap")
        return result

    def _chosen(self, named: Features) -> Features:
        distiller = self.distiller
        if distiller.levels is not None:
            return OrderedDict((name, x) for name, x in named.items() if name in distiller.levels)
        excluded = getattr(distiller.adapter, "excluded_levels", ())
        return OrderedDict((name, x) for name, x in named.items() if name.rpartition(".")[2] not in excluded)

    def _teacher_levels(self) -> Features:
        excluded = getattr(self.distiller.teacher.adapter, "excluded_levels", ())
        return OrderedDict((name, x) for name, x in self._output().features.items() if name.rpartition(".")[2] not in excluded)

    def _output(self) -> TeacherOutput:
        """What the teacher says about this batch; it is asked once."""
        if self._teacher is None:
            self._teacher = self._ask_teacher()
        return self._teacher

    def _ask_teacher(self) -> TeacherOutput:
        distiller, teacher = self.distiller, self.distiller.teacher
        images, targets = self.frame
        self._boxes, self._counts, self._image_size = distiller.adapter.frame(distiller.student, images, targets)
        if hasattr(distiller.adapter, "teacher_images"):
            images = distiller.adapter.teacher_images(distiller.student, teacher.model, images)
        needs = frozenset() if self.only_build else distiller.needs
        # What not every teacher takes is asked for where a loss needs it.
        wanted = {
            "anchors": "anchors" in needs,
            "outputs": "outputs" in needs,
            "crosses": "outputs" in needs and distiller.crosses,
            "parts": "teacher_losses" in needs and any(loss.by_parts for loss in distiller.losses.values()),
        }
        granularities = {getattr(loss, "granularity", None) for loss in distiller.losses.values()}
        return teacher(
            images,
            targets,
            gradients="teacher_gradients" in needs and self.given_teacher_gradients is None,
            losses="teacher_losses" in needs,
            per_level=not granularities.isdisjoint(LEVEL_GRANULARITIES),
            **{name: True for name, asked in wanted.items() if asked},
        )

    def _split_losses(self, chosen: Features, pairs: Pairs) -> tuple[dict[str, DistillationLoss], dict[str, DistillationLoss]]:
        """Those evaluated where the student's gradients are known, and those evaluated in the forward pass.

        With one that needs these gradients go all that can share its passes over the features and its one gradient: all that see the
        tapped features themselves and not what parts that train make of them. Those on the head's outputs are in neither.
        """
        losses = {name: loss for name, loss in self.distiller.losses.items() if not _after_the_head(loss)}
        if not any("student_gradients" in loss.needs for loss in losses.values()):
            return {}, losses
        late = {
            name: loss
            for name, loss in losses.items()
            if "student_gradients" in loss.needs
            or (trained_part(loss) is None and _same_tensors(self._student_levels(loss, chosen, pairs), chosen.values()))
        }
        return late, {name: loss for name, loss in losses.items() if name not in late}

    def _sides(self, losses: dict[str, DistillationLoss], pairs: Pairs) -> dict[str, Any]:
        features = [self._output().features[name] for _, name in pairs]
        if self.given_teacher_gradients is not None:
            check_names("teacher_gradients", self.given_teacher_gradients, self._output().features)
        found = self.given_teacher_gradients or self._output().gradients or {}
        # None, a level that no gradient reached, stays None: the losses let it contribute 0.
        gradients = [found.get(name) for _, name in pairs]
        given: dict[str, dict[str, Any]] = {
            name: {
                "teacher_gradients": gradients if "teacher_gradients" in loss.needs else None,
                # Only where needed: boxes that are merely given would put GKD's imitation form inside their mask.
                "boxes": (self._boxes, self._counts) if "boxes" in loss.needs else None,
                "image_size": self._image_size if "boxes" in loss.needs else None,
                "teacher_losses": self._teacher_losses(loss, pairs) if "teacher_losses" in loss.needs else None,
            }
            for name, loss in losses.items()
        }
        for name, loss in losses.items():
            order = self._order(pairs) if not loss.needs.isdisjoint(HEAD_NEEDS) else []
            if "outputs" in loss.needs:
                given[name]["teacher_outputs"] = levels_of(cast(HeadOutputs, self._output().outputs), order)
            if "anchors" in loss.needs:
                anchors = cast(list[Tensor], self._output().anchors)
                given[name]["anchors"] = [anchors[i] for i in order]
        return teacher_sides(losses, features, given)

    def _order(self, pairs: Pairs) -> list[int]:
        """Where the teacher's paired levels are among those that its head takes."""
        names = list(self._output().features)
        taken = len(cast(list[Tensor], self._output().anchors))
        if taken != len(names):
            raise ValueError(f"the teacher's head takes {taken} levels, its tap gives {len(names)}: tap what the head takes")
        return [names.index(name) for _, name in pairs]

    def _student_outputs(self, crosses: bool, pairs: Pairs) -> HeadOutputs:
        """What the student's head says of the paired levels, or the teacher's head on the student's head features."""
        distiller = self.distiller
        adapter: Any = distiller.adapter
        taken = len(self.head.features)
        if taken != len(self._names):
            raise ValueError(f"the student's head takes {taken} levels, its tap gives {len(self._names)}: tap what the head takes")
        order = [self._names.index(name) for name, _ in pairs]
        if not crosses:
            if self._own_outputs is None:
                self._own_outputs = adapter.head_outputs(unwrap(distiller.student), self.frame[0], self.head)
            return levels_of(self._own_outputs, order)
        teacher: Any = distiller.teacher
        theirs = self._order(pairs)
        anchors = [cast(list[Tensor], self._output().anchors)[i] for i in theirs]
        seen = cast(HeadRecord, self._output().head).levels(theirs)
        return teacher.adapter.cross(unwrap(teacher.model), self.head.levels(order), seen, anchors)

    def _teacher_losses(self, loss: DistillationLoss, pairs: Pairs) -> TeacherLosses:
        """D_n as (1, N), or D_ln of the taught levels as (L, N), by the loss's granularity; its two parts where the loss asks for them."""
        output, per_level = self._output(), getattr(loss, "granularity", None) in LEVEL_GRANULARITIES
        order = list(output.features)
        rows: Any = [order.index(name) for _, name in pairs] if per_level else None
        if loss.by_parts:
            return {part: t[rows] for part, t in cast(dict[str, Tensor], output.level_parts if per_level else output.parts).items()}
        return cast(Tensor, output.level_losses if per_level else output.losses)[rows]

    def _student_levels(self, loss: DistillationLoss, chosen: Features, pairs: Pairs) -> list[Tensor]:
        if not loss.compares_features:
            return list(chosen.values())
        key = tuple(chosen)
        if key not in self._adapted:
            self._adapted[key] = self.distiller.trainable["adapter"](chosen, [self._output().features[name] for _, name in pairs])
        return self._adapted[key]

    def _build(self, chosen: Features, pairs: Pairs) -> None:
        if "adapter" in self.distiller.trainable:
            adapter = cast(PyramidAdapter, unwrap(self.distiller.trainable["adapter"]))
            adapter.build(chosen, [self._output().features[name] for _, name in pairs])
        for loss in self.distiller.losses.values():
            part = trained_part(loss)
            if part is not None and part.trainable is None:
                part.build(self._student_levels(loss, chosen, pairs), [self._output().features[name] for _, name in pairs])
        self.distiller.keep_trained()

    def _evaluate(
        self,
        losses: dict[str, DistillationLoss],
        chosen: Features,
        gradients: list[Tensor | None] | None,
        pairs: Pairs,
    ) -> None:
        if not losses:
            return
        sides = self._sides(losses, pairs)
        levels = {name: self._student_levels(loss, chosen, pairs) for name, loss in losses.items()}
        left = dict(losses)
        while left:
            student = levels[next(iter(left))]
            alike = {name: loss for name, loss in left.items() if _same_tensors(levels[name], student)}
            for name, terms in self._terms(alike, student, sides, gradients, pairs).items():
                value = alike[name].reduce(terms)
                values = self.results.setdefault(name, [])
                self.record.record(len(values), name, terms, value.detach())
                values.append(value)
            left = {name: loss for name, loss in left.items() if name not in alike}

    def _terms(
        self,
        losses: dict[str, DistillationLoss],
        student: list[Tensor],
        sides: dict[str, Any],
        gradients: list[Tensor | None] | None,
        pairs: Pairs,
    ) -> dict[str, Terms]:
        found: dict[str, Terms] = {}
        for crosses in (False, True):
            some = {name: loss for name, loss in losses.items() if loss.crosses == crosses}
            if some:
                outputs = self._student_outputs(crosses, pairs) if any("outputs" in loss.needs for loss in some.values()) else None
                found |= term_values(some, student, sides, gradients, outputs)
        return found

    def _evaluate_explicit(self, losses: dict[str, Tensor]) -> None:
        distiller = self.distiller
        if self.given_student_gradients is not None:
            check_names("student_gradients", self.given_student_gradients, self.head_features)
            found: Mapping[str, Tensor | None] = self.given_student_gradients
        else:
            if distiller.gradient_source == "pseudo":
                student = unwrap(distiller.student)
                with loss_mode(student), torch.random.fork_rng(devices=cuda_devices(student)):
                    task = pseudo_losses(distiller.adapter, student, self.frame[0], self.head_features)
            else:
                task = losses
            unknown = set(distiller.task_weights) - set(task)
            if unknown:
                raise ValueError(f"task_weights: no task loss named {sorted(unknown)}; the detector gives {sorted(task)}")
            weighted = {key: loss * distiller.task_weights.get(key, 1.0) for key, loss in task.items()}
            second_order = any(getattr(loss, "grad_mode", None) == "second_order" for loss in distiller.losses.values())
            found = scaled_gradients(weighted, self.copies, retain_graph=True, create_graph=second_order)
        for chosen, pairs in self.explicit:
            with_gradient, _ = self._split_losses(chosen, pairs)
            self._evaluate(with_gradient, chosen, [found.get(name) for name in chosen], pairs)


def check_names(argument: str, given: Mapping[str, Any], levels: Mapping[str, Any]) -> None:
    """A misnamed gradient would silently count as none."""
    if set(given) != set(levels):
        raise ValueError(f"{argument}: expected the levels {list(levels)} (None for a level without gradient), got {list(given)}")


def _after_the_head(loss: DistillationLoss) -> bool:
    """Whether it has to wait for the student's head, and not for the student's gradients, which come later still."""
    return "outputs" in loss.needs and "student_gradients" not in loss.needs


def cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _same_tensors(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True))


def _differentiable(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()
