"""Channel and size adapters, and pairing by stride."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch.nn import functional as F

from kdkernels.adapters import PyramidAdapter, pair_levels


def pyramid(channels: int, sizes: list[tuple[int, int]], names: str = "abcdefg") -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, torch.randn(2, channels, h, w)) for name, (h, w) in zip(names, sizes, strict=False))


def test_pairs_by_stride_whatever_the_names_and_sizes() -> None:
    frame = (100, 150)
    student = pyramid(4, [(13, 19), (7, 10), (4, 5)])
    teacher = pyramid(8, [(25, 38), (12, 18), (7, 10), (4, 5), (2, 3)], "vwxyz")
    assert pair_levels(student, teacher, frame) == [("a", "w"), ("b", "x"), ("c", "y")]
    assert pair_levels(teacher, student, frame) == [("w", "a"), ("x", "b"), ("y", "c")]


def test_levels_of_one_stride_pair_in_order() -> None:
    levels = pyramid(4, [(8, 8), (8, 8)])
    assert pair_levels(levels, pyramid(4, [(8, 8), (8, 8)], "xy"), (64, 64)) == [("a", "x"), ("b", "y")]


def test_no_pair_names_both_sides() -> None:
    with pytest.raises(ValueError, match=r"student \{a: \(2, 4, 32, 32\)\}, teacher \{a: \(2, 4, 4, 4\)\}, image 64 x 64"):
        pair_levels(pyramid(4, [(32, 32)]), pyramid(4, [(4, 4)]), (64, 64))


def test_equal_pyramids_pass_untouched_and_need_no_parameters() -> None:
    student = pyramid(4, [(8, 8), (4, 4)])
    adapter = PyramidAdapter()
    adapted = adapter(student, list(pyramid(4, [(8, 8), (4, 4)]).values()))
    assert all(ours is given for ours, given in zip(adapted, student.values(), strict=True))
    assert not list(adapter.parameters())


def test_channels_and_sizes_follow_the_teacher() -> None:
    student = pyramid(4, [(8, 8), (4, 4)])
    teacher = [torch.randn(2, 6, 8, 8), torch.randn(2, 4, 5, 7)]
    adapter = PyramidAdapter().build(student, teacher)
    assert [name for name, _ in adapter.named_parameters()] == ["convolutions.level_a.weight", "convolutions.level_a.bias"]
    first, second = adapter(student, teacher)
    weight = adapter.convolutions["level_a"].weight
    expected = torch.einsum("nchw,oc->nohw", student["a"], weight[:, :, 0, 0]) + adapter.convolutions["level_a"].bias[:, None, None]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, F.interpolate(student["b"], size=(5, 7), mode="bilinear", align_corners=False))


def test_lazy_and_built_adapters_start_alike_and_leave_the_random_stream_alone() -> None:
    student, teacher = pyramid(4, [(8, 8)]), [torch.randn(2, 6, 8, 8)]
    state = torch.get_rng_state()
    built = PyramidAdapter().build(student, teacher)
    lazy = PyramidAdapter()
    lazy(student, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(built.convolutions["level_a"].weight, lazy.convolutions["level_a"].weight)


def test_a_level_that_changes_its_channels_is_named() -> None:
    adapter = PyramidAdapter().build(pyramid(4, [(8, 8)]), [torch.randn(2, 6, 8, 8)])
    with pytest.raises(ValueError, match="level 'a': the adapter was built for 4 -> 6 channels, got 4 -> 5"):
        adapter(pyramid(4, [(8, 8)]), [torch.randn(2, 5, 8, 8)])
