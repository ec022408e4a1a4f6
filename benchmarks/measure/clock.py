"""Milliseconds of calls: CUDA events behind a sleeping stream, CUDA graph replay, or `perf_counter`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

#: Milliseconds that a CUDA stream sleeps before the first call, whose enqueueing time nobody knows yet, and at the most before any other.
FIRST_SLEEP, LONGEST_SLEEP = 10.0, 50.0


class Clock:
    """Times calls on one device. CUDA work is timed on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._cycles_per_ms = _sleep_rate(device)
            self._pool = torch.cuda.graph_pool_handle()

    def measure(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each call, in order. What a call returns is dropped after its time is taken.

        Python's garbage collector is off meanwhile: it would visit every object of the process inside somebody's time.
        """
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._measure_cuda(calls) if self.device.type == "cuda" else _measure_cpu(calls)
        finally:
            if collecting:
                gc.enable()

    def graph(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any] | None:
        """What replays the work of `call` as a CUDA graph, with the tensors it has now, and what the call returned, whose memory every
        replay fills anew. None where that cannot be had, and on a CPU."""
        if self.device.type != "cuda":
            return None
        try:
            with torch.cuda.device(self.device):
                _warm_for_capture(call)
                graph = torch.cuda.CUDAGraph()
                # One pool for all: a graph needs its intermediate results during its own replay only.
                with torch.cuda.graph(graph, pool=self._pool):
                    results = call()
        except RuntimeError:  # the host is waited for, or the memory does not suffice
            torch.cuda.synchronize(self.device)
            self._pool = torch.cuda.graph_pool_handle()
            return None
        return graph.replay, results

    def _measure_cuda(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """An event pair a call, each behind a sleep that lasts until the host has enqueued the call: else a pair that starts on an idle
        stream would time the host. A call whose sleep was over before that is taken again behind a longer one, up to `LONGEST_SLEEP`.
        (What fills the queue, a thousand launches or so, or waits for the device itself cannot be hidden.)"""
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        sleep = FIRST_SLEEP
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for call in calls:
                start, stop, late, host = self._enqueue(call, sleep)
                while late and sleep < LONGEST_SLEEP:
                    sleep = min(4 * sleep, LONGEST_SLEEP)
                    start, stop, late, host = self._enqueue(call, sleep)
                if not pairs and not late:
                    # Only from the first: later ones may find the queue full, and their time would be the sleep's own.
                    sleep = min(2e3 * host + 0.05, LONGEST_SLEEP)
                pairs.append((start, stop))
            torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]

    def _enqueue(self, call: Callable[[], Any], sleep: float) -> tuple[torch.cuda.Event, torch.cuda.Event, bool, float]:
        """Events around a call behind a sleep of so many ms, whether the sleep was over too early, and seconds that the host took."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(sleep * self._cycles_per_ms))
        begun = time.perf_counter()
        start.record()
        call()
        stop.record()
        return start, stop, start.query(), time.perf_counter() - begun


def quantiles(ms: Sequence[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} of at least one time."""
    return {name: float(value) for name, value in zip(("p20", "p50", "p80"), np.quantile(ms, (0.2, 0.5, 0.8)), strict=True)}


def _measure_cpu(calls: Sequence[Callable[[], Any]]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - start))
        del result
    return times


def _warm_for_capture(call: Callable[[], Any]) -> None:
    """Some runs on a side stream, as torch asks for before a capture. Raises RuntimeError if the call waits for the device: found out here,
    because a capture that breaks leaves the allocator in a state of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(stream):
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(stream)


def _sleep_rate(device: torch.device) -> float:
    """Cycles of `torch.cuda._sleep` in a millisecond."""
    cycles = 10_000_000
    with torch.cuda.device(device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        torch.cuda._sleep(cycles)
        stop.record()
        torch.cuda.synchronize()
    return cycles / start.elapsed_time(stop)
