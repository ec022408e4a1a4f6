"""Threads and processes around the native kernels: the same bits whoever calls and with however many threads, and forks that go on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from levels import pyramid
from native_support import needs_library, threads
from test_import import run
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdkernels import functional, set_backend

pytestmark = needs_library
#: Of many more pieces of work than there are threads.
SHAPES = [(3, 20, 75, 90), (3, 33, 19, 23)]


@pytest.fixture(autouse=True)
def chosen_native() -> Iterator[None]:
    set_backend("native")
    yield
    set_backend("auto")


def everything(seed: int = 0) -> list[Tensor]:
    """Values and gradients of each kind of pass, of features that follow from the seed."""
    x, t = (pyramid(SHAPES, layout=layout, seed=seed + i) for i, layout in enumerate(("channels_last", "contiguous")))
    leaves = [level.requires_grad_() for level in x]
    means = functional.channel_mean(t)
    maps, low, _ = functional.weighted_channel_sum(leaves, means)
    spatial, channel = functional.attention(leaves)
    masked = functional.random_mask(leaves, torch.tensor([seed, 3]), 0.4)
    pooled = functional.spatial_pool(masked, maps, "softmax")
    values = [functional.map_distance(maps, [m.detach() for m in spatial]), functional.feature_imitation(leaves, t, spatial_weights(t))]
    values += [functional.logit_bce(leaves, t, spatial_weights(t), 1.0), functional.logit_kl(leaves, t, None, 2.0)]
    values += [functional.channel_kl(leaves, t, 2.0), functional.correlation(leaves, t)]
    total = sum(v.sum() for v in (*values, *low, *pooled)) + sum(v.square().sum() for v in (*spatial, *channel))
    boxes = torch.tensor([[[10.0, 20.0, 300.0, 200.0]]]).repeat(3, 1, 1)
    masks = functional.box_mask((boxes, torch.ones(3, dtype=torch.int64)), (300, 360), [(75, 90), (19, 23)])
    results = [*means, *maps, *masked, *pooled, *spatial, *channel, *values, *masks, *torch.autograd.grad(total, leaves)]
    return [result.detach() for result in results]


def spatial_weights(x: list[Tensor]) -> list[Tensor]:
    return [level[:, 0].abs() for level in x]


def equal(results: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_threads_gives_the_same_bits(count: int) -> None:
    with threads(3):
        want = everything()
    with threads(count):
        assert equal(everything(), want)


def test_calls_from_several_threads_at_once_give_the_same_bits() -> None:
    want = [everything(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(everything, [seed % 4 for seed in range(16)]))
    assert all(equal(results, want[i % 4]) for i, results in enumerate(got))


def test_instructions_may_be_chosen_while_others_compute() -> None:
    want = everything()
    names = ["scalar", torch.ops.kdkernels_native.cpu_capability()]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(everything) for _ in range(4)]
        while not all(future.done() for future in running):
            for name in names:
                torch.ops.kdkernels_native.set_cpu_capability(name)
    assert all(equal(future.result(), want) for future in running)


def test_backward_runs_in_threads_of_autograd() -> None:
    # Two roots of one graph whose gradients meet in the same features.
    leaves = [x.requires_grad_() for x in pyramid(SHAPES)]
    with ThreadPoolExecutor(2) as pool:
        values = list(pool.map(lambda mode: sum(m.square().sum() for m in functional.channel_mean(leaves, mode)), ["signed", "abs"]))
    together = torch.autograd.grad(values[0] + values[1], leaves, retain_graph=True)
    apart = [torch.autograd.grad(value, leaves) for value in values]
    assert all(torch.equal(a, b + c) for a, b, c in zip(together, *apart, strict=True))


class Samples(Dataset[Tensor]):
    """Each the means of features that its worker computes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> Tensor:
        return functional.channel_mean(pyramid(SHAPES, seed=place))[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute(start: str) -> None:
    # The parent's threads are there when the workers are forked, who work with one thread, as torch tells them to.
    want = [functional.channel_mean(pyramid(SHAPES, seed=place))[0] for place in range(4)]
    loader = DataLoader(Samples(), batch_size=None, num_workers=2, multiprocessing_context=start)
    assert equal(list(loader), want)


FORKED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from test_native_threads import equal, everything
from kdkernels import set_backend
set_backend("native")
torch.set_num_threads({before})
want = everything()
child = os.fork()
if child == 0:
    signal.alarm(20)
    torch.set_num_threads({within})
    os._exit(0 if equal(everything(), want) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), equal(everything(), want))
"""


@pytest.mark.parametrize(("before", "within"), [(1, 1), (1, 2), (2, 1)])
def test_a_forked_child_computes_and_so_does_its_parent(before: int, within: int) -> None:
    # More than one thread on both sides is what no OpenMP of GNU's survives, in torch's own operators either.
    assert run(FORKED.format(tests=str(Path(__file__).parent), before=before, within=within)) == "0 True"
