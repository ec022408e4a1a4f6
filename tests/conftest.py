"""Shared by all tests: fixed seeds, at most two threads, a deterministic hypothesis profile."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Threads that spin while they wait make a shared machine ten times slower; read once, when torch loads OpenMP.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: without a GPU they are interpreted.
    os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()))
try:
    from hypothesis import settings
except ImportError:
    # The GPU suite runs on machines without it, leaving out the tests that need it.
    pass
else:
    settings.register_profile("kdkernels", derandomize=True, database=None, deadline=None, max_examples=12)
    settings.load_profile("kdkernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def emulator(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `emulated` run the native backend's CUDA kernels on the CPU."""
    if request.node.get_closest_marker("emulated") is None:
        yield
        return
    from emulation import emulated

    with emulated():
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
