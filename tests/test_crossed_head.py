"""The teacher's head on the student's head features, against loops in float64: the cut, the statistics, the teacher's tail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectors import detector
from oracle.compare import RTOL64, assert_close
from oracle.layers import Level, conv2d, each, layer_norm, size
from oracle.tape import Evaluation, Number, Rows, mean, relu, root, square, total
from torch import Tensor, nn

from kdkernels.head import HeadRecord, HeadWatch, align_statistics
from kdkernels.integrations import find_adapter
from kdkernels.outputs import HeadOutputs

#: Two levels of a batch of two.
SIZES = ((2, 3), (3, 1))
CLASSES = 2
FAMILIES = ("fcos", "retinanet", "fasterrcnn")
BRANCHES = ("classification", "regression")
#: Differentiable up to a kink that no value is near to.
RTOL = 100 * RTOL64


def aligned(student: Level, teacher: Level) -> Level:
    """(x - mean) / (std + 1e-6) * the teacher's std + its mean, per channel over (N, H, W), std unbiased."""
    count, channels, height, width = size(student)
    out: Level = [[[[0.0] * width for _ in range(height)] for _ in range(channels)] for _ in range(count)]
    for c in range(channels):
        (m, d), (m_t, d_t) = (_moments([v for image in x for row in image[c] for v in row]) for x in (student, teacher))
        for n in range(count):
            for h in range(height):
                for w in range(width):
                    out[n][c][h][w] = (student[n][c][h][w] - m) / (d + 1e-6) * d_t + m_t
    return out


def _moments(values: list[Number]) -> tuple[Number, Number]:
    middle = mean(values)
    return middle, root(total([square(value - middle) for value in values]) / (len(values) - 1))


def answers(model: nn.Module, family: str, branch: str) -> Callable[[Level, Level], Rows]:
    """The teacher's answers (N, H W A columns) for the student's and the teacher's features at the cut, by the modules' own places."""
    if family == "fasterrcnn":
        tail, last, columns = [model.rpn.head.conv[0][0]], {"classification": "cls_logits", "regression": "bbox_pred"}, (1, 4)
        head = model.rpn.head
    else:
        head = getattr(model.head, f"{branch}_head")
        tail = [head.conv[9], head.conv[10]] if family == "fcos" else [head.conv[3][0]]
        last, columns = {"classification": "cls_logits", "regression": "bbox_reg"}, (CLASSES, 4)
    predictor, per_anchor = getattr(head, last[branch]), columns[BRANCHES.index(branch)]
    layers = [(type(module), module.weight.tolist(), module.bias.tolist()) for module in (*tail, predictor)]

    def function(student: Level, teacher: Level) -> Rows:
        x = aligned(student, teacher)
        # A single convolution has its features from the neck, without an activation between.
        x = x if family == "fasterrcnn" else each(relu, x)
        for kind, weight, bias in layers[:-1]:
            x = conv2d(x, weight, bias) if kind is nn.Conv2d else _instance_norm(x, weight, bias)
        y = conv2d(each(relu, x), *layers[-1][1:])
        y = each(relu, y) if (family, branch) == ("fcos", "regression") else y
        _, channels, height, width = size(y)
        places = [(h, w, a) for h in range(height) for w in range(width) for a in range(channels // per_anchor)]
        return [[image[a * per_anchor + k][h][w] for h, w, a in places for k in range(per_anchor)] for image in y]

    return function


def _instance_norm(x: Level, weight: list, bias: list) -> Level:
    """FCOS's group norm where each channel is a group."""
    _, _, height, width = size(x)
    out: Level = []
    for image in x:
        planes = []
        for c, plane in enumerate(image):
            flat = layer_norm([v for row in plane for v in row], [weight[c]] * (height * width), [bias[c]] * (height * width))
            planes.append([flat[h * width : (h + 1) * width] for h in range(height)])
        out.append(planes)
    return out


def small(family: str, seed: int) -> nn.Module:
    """A detector whose head is far from its initial values."""
    model: Any = detector(family, seed, channels=32 if family == "fcos" else 4, classes=CLASSES).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (model.rpn.head if family == "fasterrcnn" else model.head).parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def seen(model: Any, family: str, seed: int) -> HeadRecord:
    """What the head is given and has inside, with leaves for the gradient."""
    channels, record = 32 if family == "fcos" else 4, HeadRecord()
    generator = torch.Generator().manual_seed(seed)
    features = [(seed - 4) * torch.randn(2, channels, *shape, generator=generator, dtype=torch.float64) + seed for shape in SIZES]
    with HeadWatch(model, find_adapter(model), True, lambda: record, detach=True):
        (model.rpn.head if family == "fasterrcnn" else model.head)(features)
    for x in (x for part in (record.features, *record.parts.values()) for x in part):
        x.requires_grad_()
    return record


def held(model: Any, family: str, branch: str, record: HeadRecord) -> list[Tensor]:
    """What stands in front of the activation before the last convolution of the branch, by the modules' own places."""
    if family == "fasterrcnn":
        return record.features
    conv = getattr(model.head, f"{branch}_head").conv
    before = conv[:8] if family == "fcos" else nn.Sequential(conv[0], conv[1], conv[2][0])
    for kept, x in zip(record.parts[branch], record.features, strict=True):
        assert_close(kept, before(x).detach())
    return record.parts[branch]


def crossed(teacher: nn.Module, of_student: HeadRecord, of_teacher: HeadRecord) -> HeadOutputs:
    adapter: Any = find_adapter(teacher)
    per_cell = adapter.anchor_generator(teacher).num_anchors_per_location()[0]
    anchors = [torch.tensor([[0.0, 0.0, 8.0, 8.0]], dtype=torch.float64).expand(h * w * per_cell, 4) for h, w in SIZES]
    return adapter.cross(teacher, of_student, of_teacher, anchors)


def test_the_statistics_are_the_teachers() -> None:
    generator = torch.Generator().manual_seed(3)
    s, t = (torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) * a + b for a, b in ((2.0, 1.0), (0.3, -4.0)))
    s.requires_grad_()
    want = Evaluation(lambda x: {"x": [_flat(image) for image in aligned(x, t.tolist())]}, s.detach().numpy())
    found = align_statistics(s, t)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    assert_close(found.flatten(1), want.value())
    assert_close(torch.autograd.grad(found, s, upstream)[0], want.gradient(upstream.flatten(1).numpy())[0], RTOL)
    for measure in (torch.mean, torch.std):
        assert_close(measure(found, (0, 2, 3)), measure(t, (0, 2, 3)), 1e-5)
    single = align_statistics(s[:1, :, :1, :1], t[:1, :, :1, :1])
    assert torch.equal(single, t[:1, :, :1, :1])


def _flat(image: list) -> list[Number]:
    return [value for plane in image for row in plane for value in row]


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_teachers_tail_says_and_its_gradient(family: str, branch: str) -> None:
    student, teacher = small(family, 0), small(family, 1)
    of_student, of_teacher = seen(student, family, 5), seen(teacher, family, 6)
    found = getattr(crossed(teacher, of_student, of_teacher), branch)
    own, theirs = held(student, family, branch, of_student), held(teacher, family, branch, of_teacher)
    function, generator = answers(teacher, family, branch), torch.Generator().manual_seed(7)
    assert len(found) == len(SIZES)
    for got, s, t in zip(found, own, theirs, strict=True):
        want = Evaluation(lambda x, t=t: {branch: function(x, t.tolist())}, s.detach().numpy())
        assert_close(got.flatten(1), want.value(), RTOL)
        upstream = torch.randn(want.value().shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(got.flatten(1), s, upstream, retain_graph=True)
        assert gradient.abs().max() > 1e-3
        assert_close(gradient, want.gradient(upstream.numpy())[0], RTOL)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_and_offset_of_the_students_channels_do_not_matter(family: str) -> None:
    student, teacher = small(family, 0), small(family, 1)
    of_student, of_teacher = seen(student, family, 5), seen(teacher, family, 6)
    plain = crossed(teacher, of_student, of_teacher)
    generator = torch.Generator().manual_seed(9)
    for levels in of_student.parts.values() if of_student.parts else [of_student.features]:
        scale, offset = (torch.rand(1, levels[0].shape[1], 1, 1, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
        levels[:] = [x.detach() * scale - 3 * offset for x in levels]
    moved = crossed(teacher, of_student, of_teacher)
    for branch in BRANCHES:
        for before, after in zip(getattr(plain, branch), getattr(moved, branch), strict=True):
            # 1e-6 stands beside the deviation.
            assert_close(after, before.detach(), 1e-4)
            assert before.detach().std() > 0.01
