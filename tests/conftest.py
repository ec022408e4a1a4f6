"""Shared by all tests: fixed seeds, at most two threads, a deterministic hypothesis profile."""

from __future__ import annotations

import os
import random

# Threads that spin while they wait make a shared machine ten times slower; read once, when torch loads OpenMP.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(min(2, torch.get_num_threads()))
settings.register_profile("kdkernels", derandomize=True, database=None, deadline=None, max_examples=12)
settings.load_profile("kdkernels")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
