"""The Distiller: a student that is not changed, levels, adapters, AID weights, and what it refuses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from detectors import FAMILIES, batch, detector
from torch import Tensor

from kdkernels import AIDLoss, BMFILoss, Distiller, FeatureTap, GKDLoss, Teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_student_is_that_of_a_run_without_a_teacher(family: str) -> None:
    bare, teacher = detector(family, 0), detector(family, 1)
    student = copy.deepcopy(bare)
    distiller = Distiller(student, teacher, {"gkd": GKDLoss(), "aid": AIDLoss(BMFILoss())})
    torch.manual_seed(11)
    expected = bare(*batch())
    after_bare = torch.get_rng_state()
    torch.manual_seed(11)
    found = distiller(*batch())
    assert torch.equal(torch.get_rng_state(), after_bare)
    assert list(found) == [*expected, "kd_gkd", "kd_aid"]
    for key, loss in expected.items():
        assert torch.equal(found[key], loss), key
    sum(found.values()).backward()
    assert type(student) is type(bare)
    state = student.state_dict()
    assert list(state) == list(bare.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in bare.state_dict().items())
    distiller.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_only_the_student_learns() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1)
    distiller = Distiller(student, teacher, {"gkd": GKDLoss(), "bmfi": BMFILoss()})
    sum(distiller(*batch()).values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_evaluation_and_plain_training_are_left_alone() -> None:
    student = detector("fcos", 0)
    bare = copy.deepcopy(student)
    Distiller(student, detector("fcos", 1), {"gkd": GKDLoss()})
    images, targets = batch()
    with torch.no_grad():
        for ours, theirs in zip(student.eval()(images), bare.eval()(images), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    found, expected = student.train()(images, targets), bare.train()(images, targets)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_channels_that_differ_get_an_adapter_in_the_trainable_parts() -> None:
    student = detector("ssdlite", 0)
    teacher = detector("ssdlite", 1, backbone="mobilenet_v3_small")
    distiller = Distiller(student, teacher, {"bmfi": BMFILoss(), "gkd": GKDLoss()})
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    distiller.build(*batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    parameters = dict(distiller.trainable.named_parameters())
    assert parameters and all(p.grad is None for p in parameters.values())
    sum(distiller(*batch()).values()).backward()
    assert dict(distiller.trainable.named_parameters()).keys() == parameters.keys()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())

    other = Distiller(copy.deepcopy(student), Teacher(copy.deepcopy(teacher)), {"bmfi": BMFILoss(), "gkd": GKDLoss()}).build(*batch())
    for p in distiller.trainable.parameters():
        p.data.add_(1.0)
    other.load_state_dict(copy.deepcopy(distiller.state_dict()))
    for ours, theirs in zip(other.trainable.parameters(), distiller.trainable.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_map_needs_no_adapter_for_channels() -> None:
    student, teacher = detector("ssdlite", 0), detector("ssdlite", 1, backbone="mobilenet_v3_small")
    distiller = Distiller(student, teacher, {"gkd": GKDLoss()})
    sum(distiller(*batch()).values()).backward()
    assert not list(distiller.trainable.parameters()) and distiller.last_values()["kd_gkd"] > 0


def test_levels_choose_what_is_taught() -> None:
    def values(**options: object) -> dict[str, Tensor]:
        distiller = Distiller(detector("fcos", 0), detector("fcos", 1), {"gkd": GKDLoss(), "bmfi": BMFILoss()}, **options)
        sum(distiller(*batch()).values()).backward()
        return distiller.last_values()

    whole = values()
    parts = [values(levels=[name]) for name in ("0", "1", "2", "p6", "p7")]
    for key in whole:
        torch.testing.assert_close(sum(part[key] for part in parts), whole[key], rtol=1e-4, atol=1e-9)


def test_several_paths_give_what_one_path_gives() -> None:
    def gradients(mode: str, taps: object) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        student = detector("fcos", 0)
        losses = {"gkd": GKDLoss(), "bmfi": BMFILoss()}
        distiller = Distiller(student, detector("fcos", 1), losses, student_tap=taps, teacher_tap=taps, mode=mode)
        found = distiller(*batch())
        sum(found.values()).backward()
        return {n: p.grad for n, p in student.named_parameters()}, distiller.last_values(), found["kd_gkd"].detach()

    # Two convolutions of the FPN fire one after the other; their outputs are P3 and P4, which the FPN then passes on.
    taps = ("backbone.fpn.layer_blocks.0", "backbone.fpn.layer_blocks.1")
    inline, values, handle = gradients("inline", taps)
    explicit, expected, _ = gradients("explicit", taps)
    torch.testing.assert_close(values["kd_gkd"], expected["kd_gkd"], rtol=1e-4, atol=0)
    assert handle == values["kd_gkd"]
    whole = torch.stack([g.norm() for g in explicit.values()]).norm()
    for name, g in explicit.items():
        assert (inline[name] - g).norm() <= 1e-5 * g.norm() + 1e-6 * whole, name


def easy_and_hard() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """For an untrained detector, which is sure that there is nothing: an image with nothing in it, and one with two objects."""
    images = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    objects = {"boxes": torch.tensor([[10.0, 20.0, 50.0, 60.0], [60.0, 30.0, 120.0, 90.0]]), "labels": torch.tensor([1, 2])}
    return images, [nothing, objects]


def test_aid_weighs_images_by_the_teachers_loss_on_each() -> None:
    teacher = detector("fcos", 1)
    images, targets = easy_and_hard()
    student = detector("fcos", 0)
    plain = GKDLoss(form="imitation", spatial=False)
    aid = AIDLoss(GKDLoss(form="imitation", spatial=False), alpha=0.5)
    seen: dict[str, Tensor] = {}

    class Spy(AIDLoss):
        def teacher_side(self, *args: object, **kwargs: object) -> object:
            seen["losses"] = kwargs["teacher_losses"]
            return super().teacher_side(*args, **kwargs)

        def reduce(self, terms: dict[str, Tensor]) -> Tensor:
            seen["weighted"] = sum(terms.values()).detach()
            return super().reduce(terms)

    spy = Spy(plain, alpha=0.5)
    distiller = Distiller(student, teacher, {"plain": plain, "aid": aid, "spy": spy})
    distiller(images, targets)
    d = seen["losses"].flatten()
    assert d.shape == (2,) and d[1] > d[0] + 0.1, d
    weights = torch.exp(-0.5 * d)
    assert weights[0] > weights[1] and weights[0] - weights[1] > 0.03
    torch.testing.assert_close(distiller.last_values()["kd_aid"], distiller.last_values()["kd_spy"])
    unweighted = seen["weighted"] / weights
    torch.testing.assert_close(unweighted.sum(), distiller.last_values()["kd_plain"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("granularity", ["image", "level x image", "level", "batch"])
def test_every_granularity_of_aid(granularity: str) -> None:
    distiller = Distiller(
        detector("fcos", 0), detector("fcos", 1), {"aid": AIDLoss(BMFILoss(), alpha=0.2, granularity=granularity), "bmfi": BMFILoss()}
    )
    sum(distiller(*batch()).values()).backward()
    values = distiller.last_values()
    assert 0 < values["kd_aid"] < values["kd_bmfi"]


def test_given_gradients_replace_the_computed_ones() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1)
    with FeatureTap(student, "backbone") as tap:
        student(*batch())
    gradients = {name: torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for name, x in tap.features.items()}
    distiller = Distiller(student, teacher, {"gkd": GKDLoss()}, mode="explicit")
    found = distiller(*batch(), student_gradients=gradients, teacher_gradients=gradients)
    with FeatureTap(teacher.train(), "backbone") as tap_t, FeatureTap(student, "backbone") as tap_s, torch.no_grad():
        teacher(*batch())
        student(*batch())
    expected = GKDLoss()(tap_s.features, tap_t.features, gradients, gradients)
    torch.testing.assert_close(found["kd_gkd"].detach(), expected, rtol=1e-4, atol=1e-7)


def test_pseudo_gradients_of_the_student_in_explicit_mode() -> None:
    student = detector("fcos", 0, score_thresh=0.0)
    with torch.no_grad():
        student.head.classification_head.cls_logits.bias.fill_(2.0)
        student.head.regression_head.bbox_ctrness.bias.fill_(2.0)
    distiller = Distiller(student, detector("fcos", 1), {"gkd": GKDLoss()}, mode="explicit", gradient_source="pseudo")
    found = distiller(*batch())
    sum(found.values()).backward()
    assert found["kd_gkd"] > 0 and all(p.grad is not None for p in student.backbone.parameters())


def test_a_frozen_backbone_falls_back_to_explicit_and_says_so_once() -> None:
    student = detector("fcos", 0)
    student.backbone.requires_grad_(False)
    distiller = Distiller(student, detector("fcos", 1), {"gkd": GKDLoss()})
    with pytest.warns(UserWarning, match="frozen backbone"):
        found = distiller(*batch())
    assert found["kd_gkd"] > 0
    sum(found.values()).backward()
    assert all(p.grad is not None for p in student.head.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(*batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"gkd": GKDLoss(preset="release")}}, "absolute.*mode='explicit'"),
        ({"losses": {"gkd": GKDLoss(normalize="softmax")}}, "mode='explicit'"),
        ({"losses": {"gkd": GKDLoss(normalize="zscore")}}, "mode='explicit'"),
        ({"losses": {"gkd": GKDLoss(normalize="none")}}, "mode='explicit'"),
        ({"losses": {"gkd": GKDLoss(grad_mode="second_order")}}, "mode='explicit'"),
        ({"losses": {"gkd": GKDLoss(reduction="none")}}, "reduction must be 'sum'"),
        ({"losses": {}}, "at least one loss"),
        ({"mode": "lazy"}, "expected one of"),
        ({"task_weights": {"classification": 2.0}}, "mode='explicit'"),
        ({"gradient_source": "pseudo"}, "mode='explicit'"),
    ],
)
def test_refusals_at_construction(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distiller(detector("fcos", 0), detector("fcos", 1), **{"losses": {"gkd": GKDLoss()}, **options})


@pytest.mark.parametrize("loss", [GKDLoss(preset="release"), GKDLoss(normalize="softmax"), GKDLoss(grad_mode="second_order")])
def test_explicit_takes_what_inline_refuses(loss: GKDLoss) -> None:
    student = detector("fcos", 0)
    distiller = Distiller(student, detector("fcos", 1), {"gkd": loss}, mode="explicit")
    found = distiller(*batch())
    sum(found.values()).backward()
    assert found["kd_gkd"].isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_refusals_at_the_call() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1)
    distiller = Distiller(student, teacher, {"gkd": GKDLoss()})
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        distiller(*batch())
    student.eval()
    with pytest.raises(ValueError, match=r"eval mode.*\.train\(\)"):
        distiller(*batch())
    student.train()
    with pytest.raises(ValueError, match="student_gradients"):
        distiller(*batch(), student_gradients={})
    with pytest.raises(ValueError, match="share parameters"):
        Distiller(student, student, {"gkd": GKDLoss()})
    explicit = Distiller(student, teacher, {"gkd": GKDLoss()}, mode="explicit", task_weights={"cls": 2.0})
    with pytest.raises(ValueError, match=r"no task loss named \['cls'\]"):
        explicit(*batch())


def test_levels_that_do_not_exist() -> None:
    distiller = Distiller(detector("fcos", 0), detector("fcos", 1), {"gkd": GKDLoss()}, levels=["p9"])
    with pytest.raises(RuntimeError, match="p9"):
        distiller(*batch())


def test_non_finite_gradients_pass_on_and_are_reported() -> None:
    student = detector("fcos", 0)
    distiller = Distiller(student, detector("fcos", 1), {"gkd": GKDLoss()})
    (sum(distiller(*batch()).values()) * float("inf")).backward()
    assert not torch.stack([p.grad.sum() for p in student.backbone.parameters()]).isfinite().all()
    reports = distiller.check()
    assert reports and reports[0].loss == "gkd" and reports[0].term == "map" and reports[0].level == 0
    assert distiller.check() == []


def test_teacher_sees_the_students_frame_in_its_own_normalisation() -> None:
    student = detector("fcos", 0)
    teacher = detector("fcos", 0, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 2.0], min_size=64, max_size=80)
    seen: list[Tensor] = []
    teacher.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    distiller = Distiller(student, teacher, {"bmfi": BMFILoss()})
    images, targets = batch()
    distiller(images, targets)
    with torch.no_grad():
        ours, _ = student.transform(images, targets)
    height, width = ours.image_sizes[0]
    std, mean, new_mean, new_std = (
        torch.tensor(values)[:, None, None]
        for values in ([0.229, 0.224, 0.225], [0.485, 0.456, 0.406], [0.1, 0.2, 0.3], [0.5, 0.25, 2.0])
    )
    expected = (ours.tensors[0, :, :height, :width] * std + mean - new_mean) / new_std
    assert seen[0].shape == ours.tensors.shape
    torch.testing.assert_close(seen[0][0, :, :height, :width], expected, rtol=1e-4, atol=1e-5)
    assert seen[0][0, :, height:].abs().sum() == 0 and seen[0][0, :, :, width:].abs().sum() == 0


def test_a_given_teacher_serves_one_distiller_after_the_other() -> None:
    teacher = Teacher(detector("fcos", 1))
    values = []
    for _ in range(2):
        distiller = Distiller(detector("fcos", 0), teacher, {"gkd": GKDLoss()})
        sum(distiller(*batch()).values()).backward()
        values.append(distiller.last_values()["kd_gkd"])
        distiller.close()
    assert torch.equal(*values) and values[0] > 0
    with pytest.raises(ValueError, match="teacher_tap"):
        Distiller(detector("fcos", 0), teacher, {"gkd": GKDLoss()}, teacher_tap="head:input")


def test_given_gradients_need_the_names_of_the_levels() -> None:
    distiller = Distiller(detector("fcos", 0), detector("fcos", 1), {"gkd": GKDLoss()}, mode="explicit")
    with pytest.raises(ValueError, match=r"teacher_gradients: expected the levels \['0', '1', '2', 'p6', 'p7'\].*got \['P3'\]"):
        distiller(*batch(), teacher_gradients={"P3": torch.zeros(1)})


def test_a_path_without_a_partner_is_left_out() -> None:
    taps = ("backbone.body.layer1", "backbone.fpn.layer_blocks.0")
    distiller = Distiller(detector("fcos", 0), detector("fcos", 1), {"gkd": GKDLoss()}, student_tap=taps)
    sum(distiller(*batch()).values()).backward()
    assert distiller.last_values()["kd_gkd"] > 0
