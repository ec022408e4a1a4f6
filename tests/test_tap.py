"""FeatureTap: what it sees, under which names, and what it says when it sees nothing."""

from __future__ import annotations

import os
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from detectors import batch, detector
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdkernels import FeatureTap


class Net(nn.Module):
    """A backbone that gives a dict, a neck that gives a list, a head that takes both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.deep = nn.Conv2d(4, 4, 3, 2, 1)
        self.backbone = Backbone(self.stem, self.deep)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x), scale=2.0)


class Backbone(nn.Module):
    def __init__(self, stem: nn.Module, deep: nn.Module) -> None:
        super().__init__()
        self.stem, self.deep = stem, deep

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        p3 = self.stem(x)
        return OrderedDict([("p3", p3), ("p4", self.deep(p3))])


class Head(nn.Module):
    def forward(self, features: OrderedDict[str, Tensor], scale: float) -> Tensor:
        return scale * sum(x.mean() for x in features.values())


def test_output_of_one_path() -> None:
    net = Net()
    with FeatureTap(net, "backbone") as tap:
        net(torch.rand(2, 3, 16, 24))
    assert {name: tuple(x.shape) for name, x in tap.features.items()} == {"p3": (2, 4, 8, 12), "p4": (2, 4, 4, 6)}
    assert not net.backbone._forward_hooks


def test_input_and_several_paths() -> None:
    net, x = Net(), torch.rand(2, 3, 16, 24)
    with FeatureTap(net, "head:input") as tap:
        net(x)
    assert list(tap.features) == ["p3", "p4"]
    with FeatureTap(net, "backbone.stem", "backbone.deep", "head:input") as tap:
        net(x)
    assert list(tap.features) == ["backbone.stem", "backbone.deep", "head:input.p3", "head:input.p4"]
    torch.testing.assert_close(tap.features["backbone.deep"], tap.features["head:input.p4"], rtol=0, atol=0)


def test_list_and_tensor_outputs() -> None:
    class Neck(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, x[..., ::2, ::2]]

    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), neck=Neck()))
    with FeatureTap(net, "neck") as lists, FeatureTap(net, "conv") as single:
        net(torch.rand(1, 3, 8, 8))
    assert [tuple(x.shape) for x in lists.features.values()] == [(1, 4, 8, 8), (1, 4, 4, 4)]
    assert list(single.features) == ["0"]


@pytest.mark.parametrize("path", ["backbone", "head:input"])
def test_replace_is_what_the_head_sees(path: str) -> None:
    net, x = Net(), torch.rand(2, 3, 16, 24)
    expected = net(x)
    with FeatureTap(net, path, replace=lambda _, features: OrderedDict((k, 3 * v) for k, v in features.items())):
        replaced = net(x)
    torch.testing.assert_close(replaced, 3 * expected)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_complains_when_nothing_passed() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="nothing passed through 'head'"), FeatureTap(net, "backbone", "head"):
        net.backbone(torch.rand(1, 3, 8, 8))
    tap = FeatureTap(net, "backbone")
    with pytest.raises(RuntimeError, match="nothing passed through 'backbone'"):
        _ = tap.features
    tap.remove()


def test_errors_name_the_path_and_what_there_is() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"'nek' not found.*stem, deep, backbone, head"):
        FeatureTap(net, "nek")
    with pytest.raises(ValueError, match="expected 'input' or 'output', got 'in'"):
        FeatureTap(net, "head:in")
    with pytest.raises(ValueError, match="at least one module path"):
        FeatureTap(net)
    with pytest.raises(TypeError, match=r"'head'.*got a tensor of shape \(\)"), FeatureTap(net, "head"):
        net(torch.rand(1, 3, 8, 8))
    # A failure inside the block is not replaced by the tap's own complaint.
    with pytest.raises(ZeroDivisionError), FeatureTap(net, "backbone"):
        _ = 1 / 0


def test_under_ddp_prefixes() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        net = DistributedDataParallel(Net())
        with FeatureTap(net, "backbone") as tap:
            net(torch.rand(2, 3, 16, 24))
        assert list(tap.features) == ["p3", "p4"]
    finally:
        dist.destroy_process_group()


def test_under_torch_compile() -> None:
    net = Net()
    compiled = torch.compile(net, backend="eager")
    tap = FeatureTap(compiled, "backbone", replace=lambda _, features: OrderedDict((k, 3 * v) for k, v in features.items()))
    x = torch.rand(2, 3, 16, 24)
    found = compiled(x)
    assert list(tap.features) == ["p3", "p4"]
    tap.remove()
    torch.testing.assert_close(found, 3 * net(x))


def test_on_a_real_detector() -> None:
    model = detector("fcos")
    images, targets = batch()
    with FeatureTap(model, "backbone") as tap, FeatureTap(model, "head:input") as head:
        model(images, targets)
    assert list(tap.features) == ["0", "1", "2", "p6", "p7"]
    for ours, theirs in zip(tap.features.values(), head.features.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
