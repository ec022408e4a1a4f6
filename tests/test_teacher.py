"""The teacher: frozen, with a random stream of its own, and with losses that come apart by image and level."""

from __future__ import annotations

import math

import pytest
import torch
from detectors import FAMILIES, batch, detector
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from kdkernels import Teacher
from kdkernels.teacher import FP16_GRADIENT_SCALE, loss_mode, scaled_gradients

AID_TERMS = {"fasterrcnn": ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")}


def transformed(model: nn.Module, images: int = 2) -> tuple[ImageList, list[dict[str, Tensor]]]:
    return model.transform(*batch(images))


def alone(images: ImageList, targets: list[dict[str, Tensor]], n: int) -> tuple[ImageList, list[dict[str, Tensor]]]:
    """Image n by itself in the frame of the batch."""
    return ImageList(images.tensors[n : n + 1], images.image_sizes[n : n + 1]), targets[n : n + 1]


@pytest.mark.parametrize("family", ["fcos", "retinanet", "ssdlite"])
def test_image_losses_are_those_of_the_image_alone(family: str) -> None:
    model = detector(family)
    teacher = Teacher(model)
    images, targets = transformed(model, 3)
    found = teacher(images, targets, losses=True, per_level=True)
    for n in range(3):
        with torch.no_grad(), loss_mode(model):
            losses = teacher.adapter.losses(model, *alone(images, targets, n))
        expected = losses["classification"] + losses["bbox_regression"]
        torch.testing.assert_close(found.losses[n], expected, rtol=1e-5, atol=1e-6)
    assert found.level_losses.shape == (len(found.features), 3)
    torch.testing.assert_close(found.level_losses.sum(0), found.losses, rtol=1e-5, atol=1e-6)
    assert (found.level_losses.min(1).values >= 0).all() and found.losses.unique().numel() == 3


def test_image_losses_of_faster_rcnn() -> None:
    model = detector("fasterrcnn", rpn_batch_size_per_image=8)
    teacher = Teacher(model)
    images, targets = transformed(model, 3)
    with loss_mode(model), torch.no_grad():
        losses = teacher.adapter.losses(model, images, targets)
        per_image = teacher.adapter.per_image_losses(model, losses, False)
        per_level = teacher.adapter.per_image_losses(model, losses, True)
    counts = [int((labels >= 0).sum()) for labels in losses.outputs.labels]
    assert counts == [8, 8, 8] and len({len(labels) for labels in losses.outputs.roi_labels}) == 1
    # With as many samples in each image the batch loss is the mean over the images.
    torch.testing.assert_close(per_image.mean(), sum(losses.values()), rtol=1e-5, atol=1e-6)
    # RoI terms stand in full at every level: they are counted L - 1 times too often in the sum over levels.
    levels = len(per_level)
    rpn = losses["loss_objectness"] + losses["loss_rpn_box_reg"]
    roi = losses["loss_classifier"] + losses["loss_box_reg"]
    torch.testing.assert_close(per_level.sum(0).mean(), rpn + levels * roi, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_come_apart_into_classification_and_regression(family: str) -> None:
    model = detector(family)
    teacher = Teacher(model)
    adapter = teacher.adapter
    with torch.no_grad(), loss_mode(model):
        losses = adapter.losses(model, *transformed(model, 1))
        found = {per_level: adapter.per_image_parts(model, losses, per_level) for per_level in (False, True)}
        whole = {per_level: adapter.per_image_losses(model, losses, per_level) for per_level in (False, True)}
    names = AID_TERMS.get(family, ("classification", "bbox_regression"))
    for part in ("classification", "regression"):
        # The loss of an image alone is that of the batch; those of the boxes have a name with "box".
        expected = sum(losses[name] for name in names if ("box" in name) == (part == "regression"))
        torch.testing.assert_close(found[False][part][0], expected, rtol=1e-5, atol=1e-6)
        if family != "fasterrcnn":
            torch.testing.assert_close(found[True][part].sum(0), found[False][part], rtol=1e-5, atol=1e-6)
    for per_level, parts in found.items():
        assert torch.equal(parts["classification"] + parts["regression"], whole[per_level])
    asked = teacher(*transformed(model), losses=True, per_level=True, parts=True)
    assert torch.equal(sum(asked.parts.values()), asked.losses) and torch.equal(sum(asked.level_parts.values()), asked.level_losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_without_boxes_has_a_finite_loss(family: str) -> None:
    model = detector(family)
    teacher = Teacher(model)
    images, targets = transformed(model)
    targets[0] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    found = teacher(images, targets, gradients=True, losses=True, per_level=True)
    assert found.losses.isfinite().all() and found.level_losses.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in found.gradients.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_the_batch_are_those_of_the_model_itself(family: str) -> None:
    model = detector(family)
    teacher = Teacher(model)
    raw_images, raw_targets = batch()
    with torch.no_grad(), loss_mode(model):
        torch.manual_seed(3)
        expected = model(raw_images, raw_targets)
        images, targets = model.transform(raw_images, raw_targets)
        torch.manual_seed(3)
        found = teacher.adapter.losses(model, images, targets)
    assert found.keys() == expected.keys()
    for key, loss in found.items():
        # Faster R-CNN draws its samples at other points of the stream; with all anchors sampled alike the loss is near, not equal.
        tolerance = {"rtol": 0.2, "atol": 0.02} if family == "fasterrcnn" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(loss, expected[key], **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_at_the_inputs_of_the_head(family: str) -> None:
    model = detector(family)
    images, targets = transformed(model)
    first = Teacher(model, seed=5)
    found = first(images, targets, gradients=True)
    assert all(not x.requires_grad for x in found.features.values())
    first.close()
    again = Teacher(model, seed=5)
    leaves = {name: x.clone().requires_grad_() for name, x in found.features.items()}
    with again._own_random_stream(), loss_mode(model):
        losses = again.adapter.head_losses(model, images, leaves, targets)
    expected = torch.autograd.grad(sum(losses.values()), list(leaves.values()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in expected)
    for (name, g), wanted in zip(found.gradients.items(), expected, strict=True):
        assert (g is None) == (wanted is None), name
        if g is not None:
            torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-9)


def test_is_frozen_and_keeps_its_running_statistics() -> None:
    model = detector("ssdlite")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = Teacher(model)
    teacher(*transformed(model), gradients=True, losses=True)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_has_a_random_stream_of_its_own() -> None:
    model = detector("fasterrcnn", rpn_batch_size_per_image=8)
    images, targets = transformed(model)
    state = torch.get_rng_state()
    one, two = Teacher(model, seed=1), Teacher(model, seed=1)
    first = [one(images, targets, losses=True).losses for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)  # what the caller draws makes no difference to the teacher
    second = [two(images, targets, losses=True).losses for _ in range(2)]
    saved = two.state_dict()
    second.append(two(images, targets, losses=True).losses)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    two.load_state_dict(saved)
    assert torch.equal(two(images, targets, losses=True).losses, first[2])


def test_features_only_stop_at_the_neck() -> None:
    model = detector("fcos")
    model.head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    found = Teacher(model)(*transformed(model))
    assert list(found.features) == ["0", "1", "2", "p6", "p7"] and found.gradients is None and found.losses is None


def test_pseudo_ground_truth_is_the_own_best_detections() -> None:
    model = detector("fcos", score_thresh=0.0)
    with torch.no_grad():  # an untrained head is unsure of everything: let it be sure
        model.head.classification_head.cls_logits.bias.fill_(3.0)
        model.head.regression_head.bbox_ctrness.bias.fill_(3.0)
        model.head.regression_head.bbox_reg.bias.fill_(2.0)
    images, targets = transformed(model)
    own = Teacher(model, gradient_source="pseudo")(images, targets, gradients=True).gradients
    other = [{"boxes": t["boxes"] + 3.0, "labels": t["labels"]} for t in targets]
    assert all(torch.equal(own[k], g) for k, g in Teacher(model, gradient_source="pseudo")(images, other, gradients=True).gradients.items())
    ground_truth = Teacher(model)(images, targets, gradients=True).gradients
    assert max(float((own[name] - ground_truth[name]).abs().max()) for name in own) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_pseudo_runs_on_every_family(family: str) -> None:
    model = detector(family)
    found = Teacher(model, gradient_source="pseudo")(*transformed(model), gradients=True)
    assert all(g is None or g.isfinite().all() for g in found.gradients.values())


def test_fp16_gradients_below_its_smallest_number_survive() -> None:
    x = torch.ones(1, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    tiny = 5e-9
    gradients = scaled_gradients({"loss": (x.float() * tiny).sum()}, {"0": x})
    assert gradients["0"].dtype == torch.float32 and math.log2(FP16_GRADIENT_SCALE) % 1 == 0
    torch.testing.assert_close(gradients["0"], torch.full((1, 1, 2, 2), tiny), rtol=1e-2, atol=0)
    plain = torch.autograd.grad((x.float() * tiny).sum(), x)[0]
    assert plain.abs().max() == 0


def test_unknown_gradient_source() -> None:
    with pytest.raises(ValueError, match="expected 'gt' or 'pseudo', got 'own'"):
        Teacher(detector("fcos"), gradient_source="own")


def test_unknown_detector_type_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"no adapter knows the detector type Linear; pass adapter="):
        Teacher(nn.Linear(2, 2))


def test_two_teachers_of_one_model_do_not_disturb_each_other() -> None:
    model = detector("fcos")
    images, targets = transformed(model)
    first = Teacher(model)
    expected = first(images, targets, gradients=True).gradients
    second = Teacher(model)
    found = first(images, targets, gradients=True).gradients
    assert all(torch.equal(found[name], g) for name, g in expected.items() if g is not None)
    assert any(g is not None for g in found.values())
    second(images, targets)


def test_a_tap_behind_the_neck_needs_the_head_to_run() -> None:
    model = detector("fcos")
    found = Teacher(model, tap="head:input")(*transformed(model))
    assert list(found.features) == ["0", "1", "2", "3", "4"]
