"""Losses on the outputs of dense heads: what they are given, when they are evaluated, and what they must not disturb."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectors import FAMILIES, batch, detector
from head_support import OnOutputs
from torch import Tensor, nn

from kdkernels import AIDLoss, BMFILoss, CrossKDLoss, Distiller, FRSLoss, GIDLoss, GKDLoss, LDLoss, Teacher
from kdkernels.integrations.torchvision_heads import log_odds
from kdkernels.models import DetectorSpec, build_detector

TOWERS = ("fcos", "retinanet", "fasterrcnn")


def regressing_by_distribution(kind: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spec = DetectorSpec(kind, "slim-student", min_size=64, max_size=64, neck_channels=32, reg_max=7)
        return build_detector(spec).train()


def ask(model: nn.Module, **wanted: bool) -> Any:
    images, targets = model.transform(*batch())
    return Teacher(model)(images, targets, **wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_outputs_are_what_the_detector_detects_with(family: str) -> None:
    model = detector(family, 1)
    found = ask(model, outputs=True).outputs
    assert all(not level.requires_grad for part in found[:4] for level in part)
    images, _ = model.transform(*batch())
    head = model.rpn if family == "fasterrcnn" else model
    levels = list(model.backbone(images.tensors).values())
    anchors = head.anchor_generator(images, levels)[0]
    raw = head.head(levels)
    if family == "fasterrcnn":
        from torchvision.models.detection.rpn import concat_box_prediction_layers

        scores, codes = concat_box_prediction_layers(*raw)
        scores, codes = scores.view(2, -1, 1), codes.view(2, -1, 4)
        boxes = head.box_coder.decode(codes, [anchors, anchors]).view(2, -1, 4)
    else:
        scores, codes = raw["cls_logits"], raw["bbox_regression"]
        scores = scores.softmax(2)[..., 1:].logit() if family == "ssdlite" else scores
        single = head.box_coder.decode if family == "fcos" else head.box_coder.decode_single
        boxes = torch.stack([single(one, anchors) for one in codes])
    for got, want in zip(found[:4], (scores, codes, anchors, boxes), strict=True):
        torch.testing.assert_close(torch.cat(got, want.dim() - 2), want, rtol=1e-4, atol=1e-4)
    assert found.distribution is None


def test_log_odds_have_the_probabilities_of_the_softmax() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64) * 4
    logits[0, 0] = torch.tensor([0.0, 60.0, 0.0, 0.0])
    odds = log_odds(logits)
    torch.testing.assert_close(odds.sigmoid(), logits.softmax(2)[..., 1:])
    # Where the probability rounds to 1 the log odds still say how sure it is.
    torch.testing.assert_close(odds[0, 0, 0], 60 - torch.tensor(3.0, dtype=torch.float64).log())
    assert odds[0, 0, 0].sigmoid() == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("crosses", [False, True])
def test_gradient_reaches_head_and_backbone(family: str, crosses: bool) -> None:
    student, teacher = detector(family, 0), detector(family, 1)
    loss = OnOutputs(crosses)
    if family == "ssdlite" and crosses:
        with pytest.raises(ValueError, match="nothing in front of it to share"):
            Distiller(student, teacher, {"on": loss})
        assert not any(module._forward_hooks for module in student.modules())
        return
    distiller = Distiller(student, teacher, {"on": loss})
    losses = distiller(*batch())
    losses["kd_on"].backward()
    assert float(losses["kd_on"].detach()) == pytest.approx(float(distiller.last_values()["kd_on"])) and losses["kd_on"] > 0
    touched = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(name.startswith("backbone") for name in touched)
    own_head = any(".head" in "." + name for name in touched)
    # The region proposal network has one convolution: crossed, the teacher's head is put on the features themselves.
    assert own_head != (crosses and family == "fasterrcnn")
    assert all(p.grad is None for p in teacher.parameters())
    assert loss.seen is not None
    taught = 4 if family == "fasterrcnn" else len(loss.seen[0].anchors)
    assert all(len(part) == taught for part in (*loss.seen[0][:4], *loss.seen[1][:4], loss.seen[2]))
    assert all(torch.equal(a, b) for a, b in zip(loss.seen[1].anchors, loss.seen[2], strict=True))


@pytest.mark.parametrize("kind", [*TOWERS, "fcos by distribution", "fasterrcnn by distribution"])
def test_head_crossed_with_itself_says_the_same(kind: str) -> None:
    family, _, by = kind.partition(" ")
    student = regressing_by_distribution(family, 0) if by else detector(family, 0)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    loss = OnOutputs(crosses=True)
    Distiller(student, copy.deepcopy(student), {"on": loss})(*batch())
    assert loss.seen is not None
    assert (loss.seen[0].distribution is not None) == bool(by)
    for crossed, own in zip(loss.seen[0], loss.seen[1], strict=True):
        for a, b in zip(crossed or [], own or [], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("others", [{}, {"aid": AIDLoss(GKDLoss(form="imitation"))}])
def test_teacher_runs_its_head_once(others: dict[str, Any]) -> None:
    teacher = detector("fcos", 1)
    calls: list[int] = []
    teacher.head.register_forward_hook(lambda *_: calls.append(1))
    distiller = Distiller(detector("fcos", 0), teacher, {"on": OnOutputs(), "crossed": OnOutputs(crosses=True), **others})
    sum(distiller(*batch()).values()).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_student_is_that_of_a_run_without_a_teacher(family: str) -> None:
    bare, teacher = detector(family, 0), detector(family, 1)
    student = copy.deepcopy(bare)
    distiller = Distiller(student, teacher, {"on": OnOutputs()})
    torch.manual_seed(11)
    expected = bare(*batch())
    after_bare = torch.get_rng_state()
    torch.manual_seed(11)
    found = distiller(*batch())
    assert torch.equal(torch.get_rng_state(), after_bare)
    assert all(torch.equal(found[key], loss) for key, loss in expected.items())
    distiller.close()
    for model in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_explicit_gradient_is_that_of_the_task_alone() -> None:
    def gradients(losses: dict[str, Any], only: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        student = detector("fcos", 0)
        distiller = Distiller(student, detector("fcos", 1), losses, mode="explicit")
        found = distiller(*batch())
        (found[only] if only else sum(found.values())).backward()
        return distiller.last_values(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    alone, g_alone = gradients({"gkd": GKDLoss(weight=2.0)})
    both, g_both = gradients({"gkd": GKDLoss(weight=2.0), "on": OnOutputs()})
    assert torch.equal(alone["kd_gkd"], both["kd_gkd"])
    _, own = gradients({"gkd": GKDLoss(weight=2.0), "on": OnOutputs()}, "kd_on")
    whole = torch.stack([g.norm() for g in g_both.values()]).norm()
    for name, g in g_both.items():
        assert (g_alone[name] + own.get(name, 0) - g).norm() <= 1e-5 * g.norm() + 1e-6 * whole, name
    assert any(g.abs().max() > 0 for g in own.values())


def test_what_cannot_work_is_refused() -> None:
    student, teacher = detector("fcos", 0), detector("fcos", 1)
    with pytest.raises(ValueError, match=r"\['on'\] act on the head's outputs.*\['gkd'\].*mode='explicit'"):
        Distiller(student, teacher, {"gkd": GKDLoss(), "on": OnOutputs()})

    class Bare:
        default_tap = "backbone"

        def losses(self, model: Any, images: Any, targets: Any) -> dict[str, Tensor]:
            return {}

    with pytest.raises(ValueError, match=r"'on' needs the student's outputs, which Bare does not give \(it has no head_outputs\(\)\)"):
        Distiller(student, teacher, {"on": OnOutputs()}, adapter=Bare())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'on' has to see all levels at once, and a tap of 2 modules"):
        Distiller(student, teacher, {"on": OnOutputs()}, student_tap=("backbone.fpn", "backbone"))
    distiller = Distiller(student, detector("fcos", 1, channels=32), {"on": OnOutputs(crosses=True)})
    with pytest.raises(ValueError, match=r"cannot take the student's head features: \(2, 64, .*\(2, 32, "):
        distiller(*batch())
    families = Distiller(detector("fasterrcnn", 0), detector("fcos", 1), {"on": OnOutputs(crosses=True)})
    with pytest.raises(ValueError, match=r"the teacher's FCOSHead goes on from \['classification', 'regression'\].*a RPNHead has none"):
        families(*batch())
    body = Distiller(detector("fcos", 0), detector("fcos", 1), {"on": OnOutputs()}, student_tap="backbone.body")
    with pytest.raises(ValueError, match="the student's head takes 5 levels, its tap gives 3"):
        body(*batch())


def test_taught_levels_are_those_of_the_outputs() -> None:
    loss = OnOutputs()
    Distiller(detector("retinanet", 0), detector("retinanet", 1), {"on": loss}, levels=["1", "p6"])(*batch())
    assert loss.seen is not None
    student, teacher, anchors = loss.seen
    everything = ask(detector("retinanet", 1), outputs=True).outputs
    for i, level in enumerate((1, 3)):
        assert torch.equal(teacher.boxes[i], everything.boxes[level]) and torch.equal(anchors[i], everything.anchors[level])
        assert student.boxes[i].shape == teacher.boxes[i].shape


@pytest.mark.parametrize("kind", ["fcos", "fasterrcnn"])
def test_methods_on_outputs_have_together_the_values_they_have_alone(kind: str) -> None:
    made: dict[str, Any] = {"frs": FRSLoss, "ld": LDLoss, "crosskd": CrossKDLoss, "gid": GIDLoss}

    def values(losses: dict[str, Any], mode: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        distiller = Distiller(regressing_by_distribution(kind, 0), regressing_by_distribution(kind, 1), losses, mode=mode)
        sum(distiller(*batch()).values()).backward()
        assert not distiller.check()
        return distiller.last_values()

    others = {"gkd": GKDLoss(), "bmfi": BMFILoss(), "aid": AIDLoss(LDLoss(), granularity="level x image")}
    together = values({name: loss() for name, loss in made.items()} | others, "explicit")
    for name, loss in made.items():
        alone = values({name: loss()}, "inline")
        assert all(torch.equal(together[key], value) for key, value in alone.items()), name
    assert 0 < together["kd_aid"] < together["kd_ld"]


@pytest.mark.parametrize("granularity", [None, "level"])
def test_aid_weighs_place_and_class_by_the_teachers_own_loss_of_each(granularity: str | None) -> None:
    student, teacher = (regressing_by_distribution("fcos", seed) for seed in (0, 1))
    images, targets = batch(1)
    distiller = Distiller(student, teacher, {"ld": LDLoss(), "aid": AIDLoss(LDLoss(), alpha=0.5, granularity=granularity)})
    distiller(images, targets)
    found = distiller.last_values()
    parts = Teacher(teacher)(*student.transform(images, targets), losses=True, parts=True).parts
    assert parts["classification"] != parts["regression"]
    weighed = {"localization": "regression", "region": "regression", "classification": "classification"}
    for term, part in weighed.items():
        share = found[f"kd_aid/{term}"] / found[f"kd_ld/{term}"]
        if granularity is None:
            torch.testing.assert_close(share, (-0.5 * parts[part][0]).exp(), rtol=1e-5, atol=0)
        else:  # a mean of the weights of levels, all of which are below 1
            assert 0 < share < 1, term


def test_aid_on_ld_needs_an_adapter_that_takes_the_teachers_losses_apart() -> None:
    teacher = Teacher(regressing_by_distribution("fcos", 1))
    adapter = teacher.adapter

    class Whole:
        def __getattr__(self, name: str) -> Any:
            if name == "per_image_parts":
                raise AttributeError(name)
            return getattr(adapter, name)

    teacher.adapter = Whole()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Whole does not give classification and regression apart"):
        Distiller(regressing_by_distribution("fcos", 0), teacher, {"aid": AIDLoss(LDLoss())})(*batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_anchors_are_exact_for_features_of_16_bits(family: str) -> None:
    model = detector(family, 1)
    images, _ = model.transform(*batch())
    adapter = Teacher(model).adapter
    levels = list(adapter.features(model, images).values())
    half, exact = (adapter.anchors(model, images, [x.to(dtype) for x in levels]) for dtype in (torch.bfloat16, torch.float32))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(half, exact, strict=True))
