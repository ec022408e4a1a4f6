"""The compiled operators called directly, with tensors that do not fit each other: an error, where memory of others would be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_support import needs_library
from terms_arguments import MAPS, REFUSED, VECTORS, S, arguments
from torch import Tensor

pytestmark = needs_library


def operator(name: str) -> Any:
    return getattr(torch.ops.kdkernels_native, name)


def saved() -> list[Tensor]:
    return operator("terms")(*arguments(S, S))[1:]


@pytest.mark.parametrize("name", ["terms", "terms_with_gradient"])
@pytest.mark.parametrize("case", REFUSED)
def test_terms_refuse(case: str, name: str) -> None:
    s, t, changed = REFUSED[case]
    with pytest.raises(RuntimeError, match=r"level|expected|imitation|operands|unknown|float32|spatial") as error:
        operator(name)(*arguments(s, t, **changed))
    assert ".cpp" in str(error.value)


def test_the_values_of_several_imitations_do_not_come_with_their_gradient() -> None:
    with pytest.raises(RuntimeError, match="several imitations") as error:
        operator("terms_with_gradient")(*arguments(S, S, imitations=2, scales=(1.0, 1.0)))
    assert ".cpp" in str(error.value)


@pytest.mark.parametrize("case", ["grad", "saved", "fewer saved", "arriving", "more arriving"])
def test_their_backward_refuses(case: str) -> None:
    given: dict[str, Any] = {"grad": torch.ones(1, 1, 2), "saved": saved(), "arriving": [torch.ones_like(S[0])]}
    wrong = {
        "grad": {"grad": torch.ones(1)},
        "saved": {"saved": [x[:1] for x in saved()]},
        "fewer saved": {"saved": saved()[:2]},
        "arriving": {"arriving": [torch.ones(1, 1, 1, 1)]},
        "more arriving": {"arriving": given["arriving"] * 2},
    }
    (written,) = operator("terms_backward")(*given.values(), *arguments(S, S))
    with pytest.raises(RuntimeError, match=r"expected|level"):
        operator("terms_backward")(*{**given, **wrong[case]}.values(), *arguments(S, S))
    assert torch.equal(written, torch.ones_like(S[0]))


@pytest.mark.parametrize("gradients", [[], [torch.ones(2, 3, 4, 5).half()], [torch.ones(2, 3, 4, 4)], [torch.ones(2, 3, 4, 5)] * 2])
def test_a_correction_refuses_gradients_that_are_not_the_student_s(gradients: list[Tensor]) -> None:
    before = [x.clone() for x in gradients]
    with pytest.raises(RuntimeError, match=r"expected|level"):
        operator("terms_correct_gradient")(gradients, torch.full((1, 1, 2), 2.0), saved(), *arguments(S, S))
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


OTHERS = {
    "channel_kl": lambda: ([torch.ones(9, 3, 1, 1), torch.ones(2, 3, 1, 1)], S, 1.0, True),
    "channel_kl_backward": lambda: (S, S, torch.ones(1), torch.ones(1), 1.0),
    "correlation": lambda: ([torch.ones(9, 3, 1, 1), torch.ones(2, 3, 1, 1)], S, 1e-6),
    "correlation_backward": lambda: (S, S, torch.ones(1), torch.ones(1), torch.ones(1)),
    "channel_mean": lambda: ([torch.ones(9, 3, 1, 1), torch.ones(2, 3, 1, 1)], False),
    "channel_mean_backward": lambda: (S, torch.ones(1), False),
    "weighted_channel_sum": lambda: (S, torch.ones(1), False),
    "weighted_channel_sum_backward": lambda: (S, VECTORS, torch.ones(1), False),
    "attention_backward": lambda: (S, MAPS, VECTORS, MAPS[:3], VECTORS, 0.5),
    "shared_read": lambda: (S, torch.ones(7), False, 0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_refuse(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"expected") as error:
        operator(name)(*OTHERS[name]())
    assert "float32" in str(error.value) or "(N, C, H, W)" in str(error.value)
