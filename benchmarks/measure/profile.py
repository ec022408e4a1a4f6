"""Launches and host time of a call on a GPU; what importing kdkernels costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import kdkernels

_IMPORT = "import time, numpy, torch; start = time.perf_counter(); import kdkernels; print(time.perf_counter() - start)"


def launches(device: torch.device, call: Callable[[], Any]) -> int | None:
    """Kernels, copies and sets of one call. None on a CPU, and where the profiler sees nothing on the device."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as trace:
        call()
        torch.cuda.synchronize(device)
    count = sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in trace.events())
    return count or None


def host_times(device: torch.device, call: Callable[[], Any], repeats: int) -> tuple[float | None, float | None]:
    """Medians on an idle device: microseconds until the host has enqueued a call, milliseconds until the device has done it.

    The second is what a call costs whoever waits for it, launches included. (None, None) on a CPU, where both are the call's time.
    """
    if device.type != "cuda":
        return None, None
    enqueued, done = [], []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        enqueued.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize(device)
        done.append(1e3 * (time.perf_counter() - start))
    return median(enqueued), median(done)


def runs_compiled(call: Callable[[], Any]) -> bool:
    """Whether any of the work of `call` is done by code from torch.compile, which falls back to eager in silence for many reasons."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        call()
    return any(event.name.startswith("Torch-Compiled Region") for event in trace.events())


def import_seconds() -> float | None:
    """Seconds of `import kdkernels` after numpy and torch, median of three fresh processes. None where it cannot be imported in one."""
    folder = str(Path(str(kdkernels.__file__)).resolve().parents[1])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", _IMPORT], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode != 0:
            return None
        times.append(float(done.stdout))
    return median(times)
