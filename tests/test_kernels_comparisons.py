"""The losses that compare two pyramids, on fused kernels: values and gradients, those of the trained parts too, against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from all_kernels import on_all_kernels, poisoned
from levels import relative_error
from losses_support import built, pyramids
from native_support import GRADIENT, VALUE

from kdkernels import ACAMLoss, AIDLoss, CWDLoss, FBKDLoss, MGDLoss, PADLoss, PKDLoss, set_backend
from kdkernels.losses.trainable import Trainable

LOSSES = {
    "acam": ACAMLoss,
    "cwd": lambda **options: CWDLoss(temperature=2.0, entropy=True, **options),
    "fbkd": FBKDLoss,
    "mgd": MGDLoss,
    "pkd": PKDLoss,
    "pad": lambda **options: PADLoss(PKDLoss(**options)),
    "aid of pad": lambda **options: AIDLoss(PADLoss(CWDLoss(**options))),
}
SHAPES = [(2, 6, 9, 11), (2, 4, 5, 3)]


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    yield
    set_backend("auto")


@on_all_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    s, t = ([x.detach().to(dtype) for x in levels] for levels in pyramids(1, SHAPES))
    loss = built(LOSSES[name](reduction="none"), s, t)
    results = []
    for chosen, place, wide in (("reference", "cpu", True), (backend, device, False)):
        own = copy.deepcopy(loss).to(place)
        if wide and isinstance(own, Trainable):
            own.trainable.double()
        x, y = ([level.to(place, torch.float64 if wide else dtype) for level in levels] for levels in (s, t))
        x = [level.requires_grad_() for level in x]
        given: dict[str, Any] = {"teacher_losses": torch.tensor([[0.5, 2.0]], device=place)} if "teacher_losses" in own.needs else {}
        set_backend(chosen)
        with poisoned(backend):
            value = own(x, y, **given)
            gradients = torch.autograd.grad(value.sum(), [*x, *own.parameters()])
        results.append((value.detach().cpu(), [g.cpu() for g in gradients]))
    (want, exact), (got, found) = results
    assert relative_error(got, want) <= VALUE
    # What BatchNorm and softmax take away has no gradient but rounding: the largest of its kind is the scale.
    for part, tolerance in ((slice(None, 2), GRADIENT[dtype]), (slice(2, None), GRADIENT[torch.float32])):
        flat = [torch.cat([g.double().flatten() for g in gradients[part]] or [torch.zeros(0)]) for gradients in (found, exact)]
        assert not len(flat[0]) or relative_error(*flat) <= tolerance
