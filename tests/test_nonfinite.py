"""Non-finite values: flagged on the device without waiting for it, or raised, and found where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import AIDLoss, BMFILoss, FusedLoss, GKDLoss, NonFinite, NonFiniteError
from kdkernels.losses import FGFILoss
from kdkernels.pyramid import split_over_images

SIZES = [(5, 6), (3, 4)]
BOXES = [torch.tensor([[2.0, 2.0, 12.0, 14.0]]), torch.tensor([[8.0, 1.0, 20.0, 18.0]]), torch.zeros(0, 4)]
IMAGE = (20, 24)
NAN, INF = float("nan"), float("inf")


def pyramid(seed: int, images: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 4, h, w, generator=generator) for h, w in SIZES]


def arguments(images: int = 3) -> dict:
    return {
        "student_features": pyramid(1, images),
        "teacher_features": pyramid(2, images),
        "student_gradients": pyramid(3, images),
        "teacher_gradients": pyramid(4, images),
        "boxes": BOXES[:images],
        "image_size": IMAGE,
        "teacher_losses": 0.5,
    }


def poisoned(argument: str, level: int, image: int, value: float = NAN) -> dict:
    given = arguments()
    given[argument][level][image, 1, 2, 1] = value
    return given


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait for values of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_flags_stay_where_they_are():
    """A captured CUDA graph writes to the memory that it found at the capture, at every replay."""
    loss = GKDLoss()
    addresses = set()
    for argument in ("student_features", "teacher_features"):
        given = poisoned(argument, 1, 2)
        loss(*(given[key] for key in loss.argument_names))
        addresses |= {flags.data_ptr() for flags in loss._flags.values()}
        assert loss.check() == [NonFinite("GKDLoss", "map", 1, 2)] and loss.check() == []
    assert len(addresses) == 1


def test_finite_values_leave_no_flag():
    loss = GKDLoss()
    loss(*(arguments()[key] for key in loss.argument_names))
    assert loss.check() == []


@pytest.mark.parametrize("argument", ["student_features", "teacher_features", "student_gradients", "teacher_gradients"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_poisoned_element_is_reported_where_it_is_and_once(argument, value):
    loss = GKDLoss()
    given = poisoned(argument, level=1, image=2, value=value)
    result = loss(*(given[key] for key in loss.argument_names))
    assert not torch.isfinite(result)
    assert loss.check() == [NonFinite("GKDLoss", "map", level=1, image=2)]
    assert loss.check() == []


def test_other_images_and_levels_keep_their_values():
    loss = GKDLoss(reduction="none")
    clean, dirty = arguments(), poisoned("student_gradients", level=0, image=1, value=INF)
    want = loss(*(clean[key] for key in loss.argument_names))
    got = loss(*(dirty[key] for key in loss.argument_names))
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[0, 1] = True
    assert torch.equal(~got.isfinite(), bad)
    assert torch.equal(got[~bad], want[~bad])


def test_the_lowest_image_of_each_term_and_level_is_kept_over_calls():
    loss = BMFILoss(lambda_=1.0)
    for level, image in ((0, 1), (0, 0), (1, 1), (1, 2)):
        given = poisoned("student_features", level, image)
        loss(given["student_features"], given["teacher_features"], BOXES, IMAGE)
    found = loss.check()
    assert {(f.term, f.level): f.image for f in found} == {
        (term, level): image for term in ("region", "attention", "whole") for level, image in ((0, 0), (1, 1))
    }
    assert len(found) == 6


def test_flags_survive_a_smaller_last_batch():
    loss = GKDLoss()
    given = poisoned("student_features", level=1, image=2)
    loss(*(given[key] for key in loss.argument_names))
    small = arguments(images=1)
    loss(*(small[key] for key in loss.argument_names))
    assert loss.check() == [NonFinite("GKDLoss", "map", 1, 2)]


def test_aid_and_fused_report_under_their_own_names():
    fused = FusedLoss({"map": GKDLoss(), "aid": AIDLoss(BMFILoss(gamma=0.0)), "fine": GKDLoss(form="imitation", spatial=False)})
    given = arguments()
    given["student_gradients"][0][1] = NAN
    given["teacher_losses"] = torch.tensor([[1.0, NAN, 1.0]])
    fused(**given)
    assert fused.check() == [
        NonFinite("map", "map", 0, 1),
        NonFinite("aid", "region", 0, 1),
        NonFinite("aid", "region", 1, 1),
    ]
    assert fused.check() == []


def test_raise_stops_at_once_and_says_where():
    loss = BMFILoss(on_nonfinite="raise")
    given = arguments()
    loss(given["student_features"], given["teacher_features"], BOXES, IMAGE)
    bad = poisoned("teacher_features", level=1, image=2)
    with pytest.raises(NonFiniteError, match="BMFILoss, term region, level 1, image 2") as error:
        loss(bad["student_features"], bad["teacher_features"], BOXES, IMAGE)
    assert isinstance(error.value, FloatingPointError)
    assert {f.term for f in error.value.found} == {"region", "attention"}
    assert loss.check() == []


def test_raise_inside_a_fused_loss_names_the_loss():
    fused = FusedLoss({"mine": GKDLoss(on_nonfinite="raise")})
    with pytest.raises(NonFiniteError, match="mine, term map, level 0, image 0"):
        fused(**poisoned("student_features", 0, 0))


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="on_nonfinite must be one of flag, raise"):
        GKDLoss(on_nonfinite="ignore")


@pytest.mark.parametrize("padded", [False, True])
def test_flagging_and_the_losses_themselves_never_wait_for_the_device(padded):
    fused = FusedLoss(
        {
            "map": GKDLoss(box_weight="sqrt_mask"),
            "imitation": GKDLoss(form="imitation"),
            "bmfi": BMFILoss(lambda_=1.0, beta_bg=1.0),
            "aid": AIDLoss(BMFILoss(attention_from="mean", mask="area")),
        }
    )
    given = poisoned("student_gradients", 0, 0)
    given["teacher_losses"] = torch.ones(2, 3)
    given["student_features"] = [x.requires_grad_() for x in given["student_features"]]
    if padded:
        given["boxes"] = torch.stack([torch.cat([b, torch.zeros(1 - len(b), 4)]) for b in BOXES]), torch.tensor([1, 1, 0])
    with Syncs() as syncs:
        sum(fused(**given).values()).backward()
    assert syncs.seen == []
    with Syncs() as syncs:
        assert fused.check()
    assert syncs.seen == []  # tolist() reads storage directly; what it found is the test above


def test_flags_are_no_part_of_the_state_and_copies_have_their_own():
    loss = GKDLoss()
    given = poisoned("student_features", 0, 0)
    loss(*(given[key] for key in loss.argument_names))
    twin = copy.deepcopy(loss)
    assert loss.state_dict() == {}
    assert len(loss.check()) == 1 and len(twin.check()) == 1 and twin.check() == []


def test_inference_mode_before_training_does_no_harm():
    loss = GKDLoss()
    given = poisoned("student_features", 0, 0)
    with torch.inference_mode():
        loss(*(given[key] for key in loss.argument_names))
    loss(*(given[key] for key in loss.argument_names))
    assert loss.check() == [NonFinite("GKDLoss", "map", 0, 0)]


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loss_split_over_the_images_is_reported_at_the_one_that_broke_it(value):
    totals, rows = torch.tensor([6.0, value]), torch.tensor([[1.0, 2.0, 3.0], [1.0, value, 3.0]])
    entries = split_over_images(totals, rows)
    assert entries[0].tolist() == [1.0, 2.0, 3.0]
    assert entries[1, [0, 2]].tolist() == [0.0, 0.0] and not entries[1, 1].isfinite()
    loss = FGFILoss(adapter=False)
    given = poisoned("student_features", 1, 1, value)
    anchors = [torch.tensor([[0.0, 0.0, 24.0, 20.0]]).expand(h * w, 4) for h, w in SIZES]
    loss(given["student_features"], given["teacher_features"], [BOXES[0]] * 3, IMAGE, anchors)
    assert loss.check() == [NonFinite("FGFILoss", "imitation", 1, 1)]
