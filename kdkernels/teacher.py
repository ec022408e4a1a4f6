"""The frozen teacher: its features, the gradient of its detection loss at them, and its loss image by image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.head import HeadRecord, HeadWatch
from kdkernels.integrations import DetectorAdapter, find_adapter
from kdkernels.outputs import HeadOutputs
from kdkernels.tap import Features, FeatureTap, unwrap

# Gradients at coarse levels are near 5e-9, below the smallest fp16 number (6e-8), and some of a head's are 1: 2^14 leaves room on
# both sides, and a power of two keeps the scaling exact.
FP16_GRADIENT_SCALE = 2.0**14
PSEUDO_SCORE = 0.3
PSEUDO_BOXES = 10


class TeacherOutput(NamedTuple):
    """What one batch gives: features without graph, G_T per level (None where no gradient arrived), losses (N,) and (L, N).

    parts, level_parts: the same of "classification" and "regression" each
    anchors, outputs: of every level that the head takes;   head: the pass of the head that gave them, where features were asked for
    """

    features: Features
    gradients: dict[str, Tensor | None] | None = None
    losses: Tensor | None = None
    level_losses: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    level_parts: dict[str, Tensor] | None = None
    anchors: list[Tensor] | None = None
    outputs: HeadOutputs | None = None
    head: HeadRecord | None = None


class Teacher:
    """A frozen detector that is asked for features and gradients instead of detections.

    Args:
        model: the teacher; its parameters are frozen, and batch normalisation and dropout stay in eval mode.
        adapter: the detector family; found by the model's type when None.
        tap: module path (or paths) whose features are taught; the adapter's `default_tap` when None.
        gradient_source: "gt", the loss against the ground truth, or "pseudo", the loss against the teacher's own ten best
            detections of score above 0.3, as in the code released with GKD.
        seed: of the teacher's own random stream (RoI sampling); the caller's streams are left as they were.

    Raises:
        ValueError: for an unknown gradient source, or "pseudo" with an adapter that gives no detections.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: DetectorAdapter | None = None,
        tap: str | tuple[str, ...] | None = None,
        gradient_source: str = "gt",
        seed: int = 0,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.adapter = adapter or find_adapter(model)
        check_gradient_source(gradient_source, self.adapter)
        self.gradient_source = gradient_source
        paths = tap or self.adapter.default_tap
        self._leaves: Features = OrderedDict()
        self._tap = FeatureTap(model, *([paths] if isinstance(paths, str) else paths), replace=self._take)
        self._wants_gradients = False
        self._active = False
        self._random_state: dict[str, Tensor] = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        self._seed = seed

    def __call__(
        self,
        images: Any,
        targets: Any,
        gradients: bool = False,
        losses: bool = False,
        per_level: bool = False,
        anchors: bool = False,
        outputs: bool = False,
        crosses: bool = False,
        parts: bool = False,
    ) -> TeacherOutput:
        """Run the teacher on a batch that is already in its frame.

        Args:
            images, targets: as the adapter takes them (torchvision: an ImageList and transformed targets).
            gradients: also differentiate the detection loss with respect to the features.
            losses: also give the teacher's loss on each image against the ground truth, (N,).
            per_level: also take those losses apart by level, (L, N).
            anchors: also give the anchors.
            outputs: also give what the head says, from the pass that gradients or losses run anyway, or else from one of its own.
            crosses: also keep the head's features for `DetectorAdapter.cross`.
            parts: also give the `losses` of classification and of regression each.

        Raises:
            ValueError: `per_level` or `parts` of a detector family whose adapter cannot take its losses apart so.
        """
        self._leaves.clear()
        self._wants_gradients, self._active = gradients, True
        head = HeadRecord() if outputs else None
        try:
            found = self._ask(images, targets, gradients, losses, per_level, head, crosses, parts)
            return self._with_head(found, images, anchors, head)
        finally:
            self._active = False

    @torch.no_grad()
    def _with_head(self, found: TeacherOutput, images: Any, anchors: bool, head: HeadRecord | None) -> TeacherOutput:
        adapter: Any = self.adapter
        if head is not None:
            outputs = adapter.head_outputs(unwrap(self.model), images, head)
            head.output = None
            return found._replace(anchors=outputs.anchors, outputs=outputs, head=head)
        if anchors:
            return found._replace(anchors=adapter.anchors(unwrap(self.model), images, list(found.features.values())))
        return found

    def _ask(
        self,
        images: Any,
        targets: Any,
        gradients: bool,
        losses: bool,
        per_level: bool,
        head: HeadRecord | None,
        crosses: bool,
        parts: bool,
    ) -> TeacherOutput:
        model = self.model
        # Not the protocol: adapters for pseudo ground truth have more than it demands, as `check_gradient_source` has seen.
        adapter: Any = self.adapter
        with self._own_random_stream(), loss_mode(model):
            # The first pass is the one that is seen: the head may run again for the losses one by one.
            with HeadWatch(model, adapter, crosses, lambda: head, detach=True) if head is not None else nullcontext():
                if not gradients and not losses and hasattr(adapter, "features"):
                    with torch.no_grad():
                        features = adapter.features(model, images)
                        if head is not None:
                            unwrap(model).get_submodule(adapter.head_module)(list(features.values()))
                    if self._leaves:
                        return self._output()
                    # The tap lies behind the neck: the head has to run for it.
                with torch.set_grad_enabled(gradients):
                    if gradients and self.gradient_source == "pseudo":
                        total = pseudo_losses(adapter, model, images, adapter.features(model, images))
                        task = None
                    else:
                        total = task = adapter.losses(model, images, targets)
            leaves = OrderedDict(self._leaves)
            grads = scaled_gradients(total, leaves) if gradients else None
            per_image = level_losses = own_parts = level_parts = None
            if losses:
                with torch.no_grad():
                    task = adapter.losses(model, images, targets) if task is None else task
                    per_image = adapter.per_image_losses(model, task, False)
                    if per_image is None:
                        per_image = self._losses_one_by_one(images, targets)
                    level_losses = adapter.per_image_losses(model, task, True) if per_level else None
                    if parts and not hasattr(adapter, "per_image_parts"):
                        raise ValueError(f"{type(adapter).__name__} does not give classification and regression apart (per_image_parts())")
                    own_parts = adapter.per_image_parts(model, task, False) if parts else None
                    level_parts = adapter.per_image_parts(model, task, True) if parts and per_level else None
                if per_level and level_losses is None:
                    raise ValueError(f"{type(adapter).__name__} gives no losses per level: use granularity 'image' or 'batch'")
            self._leaves = leaves
            return self._output(grads, per_image, level_losses, own_parts, level_parts)

    def _take(self, path: str, features: Features) -> Features:
        if not self._active:  # somebody else's call of the same model: another Teacher's, or an evaluation
            return features
        taken = OrderedDict((name, x.detach().requires_grad_(self._wants_gradients)) for name, x in features.items())
        self._leaves.update(zip(self._tap.level_names(path, features), taken.values(), strict=True))
        return taken

    def _output(self, *found: Any) -> TeacherOutput:
        if not self._leaves:
            raise RuntimeError(f"the teacher's tap {self._tap.paths} saw no features: the module was not called")
        features = OrderedDict((name, x.detach()) for name, x in self._leaves.items())
        self._leaves = OrderedDict()
        self._tap.clear()
        return TeacherOutput(features, *found)

    def _losses_one_by_one(self, images: Any, targets: Any) -> Tensor:
        rows = [self.adapter.losses(self.model, images[n : n + 1], targets[n : n + 1]) for n in range(len(targets))]
        return torch.stack([torch.stack([loss.float() for loss in row.values()]).sum() for row in rows])

    @contextmanager
    def _own_random_stream(self) -> Iterator[None]:
        device = next(self.model.parameters()).device
        theirs = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            theirs["cuda"] = torch.cuda.get_rng_state(device)
            if "cuda" not in self._random_state:
                self._random_state["cuda"] = torch.Generator(device).manual_seed(self._seed).get_state()
        _set_random_state(self._random_state, device)
        try:
            yield
        finally:
            self._random_state["cpu"] = torch.get_rng_state()
            if device.type == "cuda":
                self._random_state["cuda"] = torch.cuda.get_rng_state(device)
            _set_random_state(theirs, device)

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's random stream, for a resumed run that samples as the uninterrupted one does."""
        return dict(self._random_state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._random_state = dict(state)

    def close(self) -> None:
        """Take the tap off the model."""
        self._tap.remove()


def check_gradient_source(source: str, adapter: DetectorAdapter) -> None:
    if source not in ("gt", "pseudo"):
        raise ValueError(f"gradient_source: expected 'gt' or 'pseudo', got {source!r}")
    if source == "pseudo" and not hasattr(adapter, "detections"):
        raise ValueError(f"gradient_source='pseudo' needs detections, which {type(adapter).__name__} does not give")


def pseudo_losses(adapter: Any, model: nn.Module, images: Any, features: Features) -> dict[str, Tensor]:
    """The head's losses against the model's own ten best detections of score above 0.3 (GKD's released configuration)."""
    with torch.no_grad():
        found = adapter.detections(model, images, OrderedDict((name, x.detach()) for name, x in features.items()))
    targets = []
    for image in found:
        best = image["scores"].argsort(descending=True)[:PSEUDO_BOXES]
        boxes = image["boxes"][best]
        # A detection clipped to nothing has no area and is no ground truth.
        keep = (image["scores"][best] > PSEUDO_SCORE) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        targets.append({"boxes": boxes[keep].float(), "labels": image["labels"][best][keep]})
    return adapter.head_losses(model, images, features, targets)


def scaled_gradients(
    losses: dict[str, Tensor], features: Features, retain_graph: bool = False, create_graph: bool = False
) -> dict[str, Tensor | None]:
    """Gradient of the sum of `losses` at each level, None where none arrives; in fp16 scaled by a power of two, unscaled in fp32."""
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    if not total.requires_grad:
        return dict.fromkeys(features)
    scale = FP16_GRADIENT_SCALE if any(x.dtype == torch.float16 for x in features.values()) else 1.0
    grads = torch.autograd.grad(
        total * scale if scale != 1.0 else total,
        list(features.values()),
        allow_unused=True,
        retain_graph=retain_graph,
        create_graph=create_graph,
    )
    if scale != 1.0:
        grads = tuple(None if g is None else g.float() / scale for g in grads)
    return dict(zip(features, grads, strict=True))


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Training mode, so that a detector gives losses, but with normalisation and dropout in eval mode; restored afterwards."""
    modules = list(unwrap(model).modules())
    before = [module.training for module in modules]
    for module in modules:
        module.training = not _is_stateful(module)
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _is_stateful(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
        return True
    # Stochastic depth goes by many classes (torchvision's StochasticDepth, timm's DropPath), all of them leaves.
    return any(word in type(module).__name__ for word in ("Drop", "StochasticDepth")) and not any(True for _ in module.children())


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
