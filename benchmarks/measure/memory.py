"""Memory: what a call takes, what is free, and how much the caches hold."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Where neither the system nor the device says how large its last-level cache is.
UNKNOWN_CACHE = 32 << 20
#: "5" written into it makes the highest resident memory start anew.
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
#: What the profiler says where there is no GPU, and of blocks from before it started, which are not counted on purpose.
_NOISE = (b"gpuGetDeviceCount failed", b"Memory block of unknown size was allocated before the profiling started")
_CPUS = Path("/sys/devices/system/cpu")
_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int | None:
    """The most that `call` holds at a time above what was there before, its results included. None where the profiler sees no allocation.

    On a CPU only memory from torch's allocator counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        return None
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident_bytes(device: torch.device, call: Callable[[], Any]) -> int | None:
    """The most that `call` adds to the resident memory of the process, its results included; of a call that ran before.

    Besides what torch's allocator hands out these are buffers that a library takes elsewhere, and freed blocks that malloc keeps for later.
    None on a GPU and where the system does not count it.
    """
    if device.type != "cpu" or not os.access(_RESET, os.W_OK):
        return None
    gc.collect()
    # What malloc has kept until here would serve the call without being seen.
    _trim()
    _RESET.write_text("5")
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return peak - before


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated on the device; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [limit for limit in (_free_of_system(), *map(_free_of_group, _GROUPS)) if limit is not None]
    return min(limits, default=None)


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache: a GPU's L2; on a CPU all those that the cores of this process reach, together."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found = {}
    for core in cores:
        described = _last_cache(_CPUS / f"cpu{core}" / "cache")
        if described is not None:
            found[described[0]] = described[1]
    if found:
        return sum(found.values())
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or UNKNOWN_CACHE
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_CACHE


@contextmanager
def _quiet() -> Iterator[None]:
    """Lets through to stderr, afterwards, all lines but the profiler's `_NOISE`, which libraries write past Python."""
    sys.stderr.flush()
    own = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            held.seek(0)
            for line in held:
                if not any(text in line for text in _NOISE):
                    os.write(2, line)


def _trim() -> None:
    """Gives malloc's free blocks back to the system, where malloc can do that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    """Bytes of a field of this process's status: VmRSS now, VmHWM the most since the reset."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) << 10


def _last_cache(folder: Path) -> tuple[str, int] | None:
    """Which cores share a core's highest cache, and its bytes."""
    caches = []
    for index in folder.glob("index*"):
        try:
            level, size, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        except OSError:
            continue
        if size.endswith("K"):
            caches.append((int(level), shared, int(size[:-1]) << 10))
    if not caches:
        return None
    _, shared, held = max(caches)
    return shared, held


def _free_of_system() -> int | None:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def _free_of_group(limit: Path) -> int | None:
    """What a container may still take: its limit less what cannot be written back to files."""
    try:
        used = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        return int(limit.read_text()) - int(used["anon"] if "anon" in used else used["rss"])
    except (OSError, KeyError, ValueError):  # no such group, or its limit is "max"
        return None
