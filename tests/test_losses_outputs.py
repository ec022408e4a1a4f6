"""The losses on a head's outputs: what holds for all of them, alone, wrapped and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses_support import built
from oracle.compare import RTOL64, assert_close
from outputs_support import features, head_outputs, leaves, moved, targets
from torch import Tensor

from kdkernels import AIDLoss, CrossKDLoss, FRSLoss, FusedLoss, GIDLoss, LDLoss, PADLoss, functional
from kdkernels.outputs import HeadOutputs, levels_of

#: The class, options that are not the default, the functional form.
LOSSES: dict[str, tuple[Any, dict[str, Any], Callable[..., Any]]] = {
    "crosskd": (CrossKDLoss, {}, functional.crosskd),
    "crosskd fcos": (CrossKDLoss, {"preset": "fcos", "regression": 0.5}, functional.crosskd),
    "frs": (FRSLoss, {}, functional.frs),
    "ld": (LDLoss, {}, functional.ld),
    "ld kitti": (LDLoss, {"preset": "ld-kitti", "vlr": 0.25, "temperature": 3.0}, functional.ld),
}
IMAGE_SIZE = (48, 64)


def given(loss: Any, student: HeadOutputs, teacher: HeadOutputs, boxes: Any = None) -> dict[str, Any]:
    everything = {"student_outputs": student, "teacher_outputs": teacher, "boxes": boxes, "image_size": IMAGE_SIZE}
    return {name: everything[name] for name in loss.argument_names if name in everything}


def case(name: str, bins: int | None = 5, images: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, ...]:
    """The loss and its arguments by name."""
    kind, own, _ = LOSSES[name]
    s, t = features(1, images=images, dtype=dtype), features(2, images=images, dtype=dtype)
    loss = built(kind(**own, **options), s, t) if kind is FRSLoss else kind(**own, **options)
    student = head_outputs(3, bins=bins, images=images, dtype=dtype, requires_grad=True)
    return loss, s, t, given(loss, student, head_outputs(4, bins=bins, images=images, dtype=dtype), targets(images))


def gradients(value: Tensor, outputs: HeadOutputs) -> list[Tensor]:
    own = leaves(outputs)
    found = torch.autograd.grad(value.sum(), own, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, own, strict=True)]


@pytest.mark.parametrize("name", LOSSES)
def test_entries_add_up_and_the_functional_form_is_the_same(name):
    loss, s, t, arguments = case(name, reduction="none")
    entries = loss(s, t, **arguments)
    assert entries.shape == (2, 2) and (entries > 0).all()
    kind, own, function = LOSSES[name]
    trained = {"trained": loss.trainable} if kind is FRSLoss else {}
    total = function(s, t, *arguments.values(), **trained, **own)
    assert_close(total, entries.sum(), RTOL64)
    one, two = gradients(entries, arguments["student_outputs"]), gradients(total, arguments["student_outputs"])
    assert any(g.abs().max() > 0 for g in one)
    for a, b in zip(one, two, strict=True):
        assert_close(a, b, RTOL64)


@pytest.mark.parametrize("name", LOSSES)
def test_terms_carry_weight_and_coefficient(name):
    found = []
    for weight in (1.0, 3.0):
        loss, s, t, arguments = case(name, weight=weight)
        student = arguments.pop("student_outputs")
        found.append((loss, loss.terms(s, loss.teacher_side(t, **arguments), student_outputs=student)))
    (one, terms), (three, thrice) = found
    assert terms.keys() == thrice.keys()
    for term, value in terms.items():
        assert_close(thrice[term], 3 * value, RTOL64, what=term)
        assert three.coefficient(term) == pytest.approx(3 * one.coefficient(term)) and one.coefficient(term) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_images_and_of_boxes_does_not_matter(name):
    loss, s, t, arguments = case(name, images=3, reduction="none")
    entries = loss(s, t, **arguments)
    want = gradients(entries, arguments["student_outputs"])
    order = torch.tensor([2, 0, 1])
    other = {key: moved(value, order) for key, value in arguments.items() if key.endswith("outputs")}
    if "boxes" in arguments:
        # The first image's boxes backwards, and all of them padded.
        own = [arguments["boxes"][i].flip(0) for i in order]
        padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=7.0)
        other |= {"boxes": (padded, torch.tensor([len(b) for b in own])), "image_size": IMAGE_SIZE}
    got = loss([x[order] for x in s], [x[order] for x in t], **other)
    assert_close(got, entries[:, order].detach(), RTOL64)
    assert not torch.equal(got, entries)
    for a, b in zip(gradients(got, other["student_outputs"]), want, strict=True):
        assert_close(a, b[order], RTOL64, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sixteen_bit_outputs_have_fp32_maths(name, dtype):
    loss, s, t, arguments = case(name, dtype=dtype)
    value = loss(s, t, **arguments)
    assert value.dtype == torch.float32
    exact, _, _, double = case(name)
    for side in ("student_outputs", "teacher_outputs"):
        double[side] = HeadOutputs(
            *([x.detach().double().requires_grad_(x.requires_grad) for x in part] for part in arguments[side])
        )
    if exact.trainable is not None:
        exact.trainable.load_state_dict(loss.trainable.state_dict())
    want = exact([x.double() for x in s], [x.double() for x in t], **double)
    # The adapting convolution is in fp32.
    assert_close(value.double(), want, 2e-5)
    limit = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    for a, b in zip(gradients(value, arguments["student_outputs"]), gradients(want, double["student_outputs"]), strict=True):
        assert a.dtype == dtype
        assert_close(a.double(), b, limit)


@pytest.mark.parametrize("name", LOSSES)
def test_no_images_no_boxes_and_no_levels(name):
    loss, s, t, arguments = case(name, images=0, reduction="none")
    value = loss(s, t, **arguments)
    assert value.shape == (2, 0)
    own = arguments["student_outputs"]
    assert all(g.shape == x.shape for g, x in zip(gradients(value, own), leaves(own), strict=True))
    loss, s, t, arguments = case(name)
    if "boxes" in arguments:
        arguments["boxes"] = [torch.zeros(0, 4, dtype=torch.float64), torch.tensor([[5.0, 5.0, 5.0, 9.0]], dtype=torch.float64)]
        value = loss(s, t, **arguments)
        assert torch.isfinite(value) and all(g.isfinite().all() for g in gradients(value, arguments["student_outputs"]))
        assert (value == 0) == name.startswith("ld")
    empty = levels_of(arguments["student_outputs"], [])
    nothing = LOSSES[name][0]()
    assert nothing([], [], **given(nothing, empty, empty, [])).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_wrapped_and_fused_it_has_the_value_of_its_terms(name):
    loss, s, t, arguments = case(name, reduction="none")
    entries = loss(s, t, **arguments).detach()
    losses = torch.tensor([[0.5, 2.0]])
    weight = torch.exp(-0.1 * losses)
    aid = AIDLoss(loss)(s, t, *arguments.values(), teacher_losses=losses)
    assert_close(aid, (entries * weight).detach(), 1e-6)
    together = FusedLoss({"aid": AIDLoss(loss), "own": loss, "pad": PADLoss(loss)})(s, t, teacher_losses=losses, **arguments)
    assert_close(together["aid"], aid, RTOL64)
    assert_close(together["own"], entries, RTOL64)
    assert together["pad"].shape == (2, 2) and together["pad"].isfinite().all()
    assert torch.equal(functional.fused({"own": loss}, s, t, **arguments)["own"], together["own"])


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_missing_or_does_not_fit_is_named(name):
    loss, s, t, arguments = case(name)
    for argument in arguments:
        with pytest.raises(ValueError, match=f"{type(loss).__name__} needs {argument}, which is missing"):
            loss(s, t, **{**arguments, argument: None})
    other = head_outputs(3, classes=4)
    said = r"class logits do not fit: student_outputs have \[0: \(2, 48, 4\).*teacher_outputs \[0: \(2, 48, 3\)"
    with pytest.raises(ValueError, match=said):
        loss(s, t, **{**arguments, "student_outputs": other})


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so(name, bad):
    loss, s, t, arguments = case(name)
    with torch.no_grad():
        arguments["student_outputs"].classification[0][0, 20] = bad
        if arguments["student_outputs"].distribution is not None:
            arguments["student_outputs"].distribution[0][0, 20, 0, 0] = bad
    assert not torch.isfinite(loss(s, t, **arguments)) and loss.check()


def _changed(part: str, change: Callable[[Tensor], Tensor], level: int = 0) -> Callable[[HeadOutputs], HeadOutputs]:
    def changed(outputs: HeadOutputs) -> HeadOutputs:
        return outputs._replace(**{part: [change(x) if i == level else x for i, x in enumerate(getattr(outputs, part))]})

    return changed


#: What is wrong with both sides' outputs, so that they fit each other, and what is said of it.
UNFIT: dict[str, tuple[Callable[[HeadOutputs], HeadOutputs], str]] = {
    "images": (lambda o: moved(o, torch.tensor([0, 1, 1])), r"level 0: classification has shape \(3, 48, 3\), wanted \(2, A, K\)"),
    "classes": (_changed("classification", lambda x: x[..., :0]), r"level 0: classification has shape \(2, 48, 0\), .* K at least 1"),
    "axes": (_changed("classification", lambda x: x[0], 1), r"level 1: classification has shape \(12, 3\), wanted \(2, A, K\)"),
    "levels": (lambda o: levels_of(o, [0]), "classification has 1 levels, wanted 2: teacher_features are .*1: "),
    "none": (lambda o: levels_of(o, []), "classification has 0 levels, wanted 2"),
    "anchors": (_changed("anchors", lambda x: x[:-1], 1), r"level 1: anchors has shape \(11, 4\), wanted \(12, 4\): classification has"),
    "few anchors": (lambda o: o._replace(anchors=o.anchors[:1]), "anchors has 1 levels, wanted 2"),
    "boxes": (_changed("boxes", lambda x: x[:, 1:]), r"level 0: boxes has shape \(2, 47, 4\), wanted \(2, 48, 4\): classification has"),
    "regression": (_changed("regression", lambda x: x[..., :2]), r"level 0: regression has shape \(2, 48, 2\), wanted \(2, 48, 4\)"),
    "bins": (_changed("distribution", lambda x: x[:, :, 0]), r"level 0: distribution has shape \(2, 48, 5\), wanted \(2, 48, 4\) and bins"),
}


@pytest.mark.parametrize("name", [*LOSSES, "gid"])
@pytest.mark.parametrize("what", UNFIT)
def test_outputs_that_are_not_of_the_features_are_refused_by_level(name, what):
    if name == "gid":
        s, t, loss = features(1), features(2), GIDLoss()
        arguments = {"student_outputs": head_outputs(3), "teacher_outputs": head_outputs(4)}
    else:
        loss, s, t, arguments = case(name)
    change, said = UNFIT[what]
    unfit = {key: change(value) for key, value in arguments.items() if key.endswith("outputs")}
    with pytest.raises(ValueError, match=f"teacher_outputs.*{said}"):
        loss(s, t, **{**arguments, **unfit})


@pytest.mark.parametrize(("name", "part"), [("crosskd", "boxes"), ("ld", "anchors"), ("frs", "classification")])
def test_a_part_that_is_needed_is_missed(name, part):
    loss, s, t, arguments = case(name)
    empty = {key: value._replace(**{part: []}) for key, value in arguments.items() if key.endswith("outputs")}
    with pytest.raises(ValueError, match=f"teacher_outputs: {part} has 0 levels, wanted 2"):
        loss(s, t, **{**arguments, **empty})
