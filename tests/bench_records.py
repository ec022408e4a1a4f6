"""Made-up records of the benchmarks' schema, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.registry import Case

COPY_GB_PER_S = 10.0
#: Provider -> times the speed of light.
DISTANCES = {"paper": 60.0, "eager": 25.0, "compile": 4.0, "compile-max": 3.0, "reference": 20.0}
ABSENT = {"triton": "needs a GPU"}
UNITS = {"forward": 4, "backward": 7, "inline": 8}


def provenance(**changes: Any) -> dict[str, Any]:
    """One run of one CPU."""
    state = {"sm_mhz": None, "memory_mhz": None, "power_w": None, "power_limit_w": None, "temperature_c": None, "throttle": None}
    origin = {
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {
            "python": "3.11.2",
            "torch": "2.11.0",
            "cuda": None,
            "triton": None,
            "numpy": "2.0",
            "kdkernels": "0.1.0",
            "compiler": None,
        },
        "device": "cpu",
        "cpu": "Some CPU",
        "cores": 2,
        "threads": 2,
        "driver": None,
        "native": None,
        "platform": "Linux",
        "seed": 0,
        "command": ["kdkernels", "bench"],
        "time": "2025-11-21T09:00:00+00:00",
        "before": {**state, "cpu_mhz": 2100.0, "load": 0.5},
        "after": {**state, "cpu_mhz": 2900.0, "load": 1.5},
    }
    return {**origin, **changes}


def kernel(provider: str, ms: float | None = None, case: Case | None = None, mode: str = "backward", **changes: Any) -> dict[str, Any]:
    """A record; with `ms` a measured one, else an absent one."""
    case = case or Case()
    ideal = round(UNITS.get(mode, 7) * case.unit)
    rate = None if ms is None else ideal / ms / 1e6
    record = {
        "schema": 1,
        "kind": "kernel",
        "entry": "gkd_bmfi",
        "entry_kind": "method",
        "case": case.as_dict(),
        "mode": mode,
        "provider": provider,
        "status": "absent" if ms is None else "measured",
        "reason": ABSENT.get(provider, "not here") if ms is None else "",
        "ms": None if ms is None else {"p20": 0.9 * ms, "p50": ms, "p80": 1.2 * ms},
        "calls": 0 if ms is None else 20,
        "graph_ms": None,
        "ideal_bytes": ideal,
        "gb_per_s": rate,
        "copy_gb_per_s": COPY_GB_PER_S,
        "percent_of_copy": None if rate is None else 100 * rate / COPY_GB_PER_S,
        "peak_mb": None if ms is None else case.unit / 1e6,
        "launches": None,
        "host_us": None,
        "compile_s": 12.0 if provider.startswith("compile") and ms else None,
        "import_s": 1.5,
        "error": {"value": 1e-6, "gradient": 2e-6} if ms else {"value": None, "gradient": None},
        "provenance": provenance(),
    }
    return {**record, **changes}


def kernels(case: Case | None = None, distances: Mapping[str, float] = DISTANCES, **changes: Any) -> list[dict[str, Any]]:
    """One entry's records at a case: every mode, every provider at its distance from the speed of light, and the absent ones."""
    case = case or Case()
    found = []
    for mode, units in UNITS.items():
        light = units * case.unit / COPY_GB_PER_S / 1e6
        found += [kernel(name, light * times, case, mode, **changes) for name, times in distances.items()]
        found += [kernel(name, None, case, mode, **changes) for name in ABSENT]
    return found


def step(variant: str, ms: float | None, provider: str | None = None, mode: str | None = None, **changes: Any) -> dict[str, Any]:
    """A record of a training step whose student alone takes 100 ms, teacher's forward pass 40 ms and head gradient 10 ms."""
    loss = variant.removeprefix("+ ") if provider else None
    measured = ms is not None
    shares = {
        "teacher_forward_ms": 40.0 if measured and variant != "student" else None,
        "teacher_head_gradient_ms": 10.0 if measured and variant not in ("student", "+ teacher forward") else None,
        "teacher_losses_ms": None,
        "distillation_ms": ms - 150.0 if measured and loss else None,
    }
    record = {
        "schema": 1,
        "kind": "step",
        "pair": "fcos-small",
        "batch": 2,
        "image": [256, 416],
        "dtype": "fp32",
        "amp": "none",
        "variant": variant,
        "loss": loss,
        "provider": provider,
        "mode": mode,
        "status": "measured" if measured else "rejected",
        "reason": "" if measured else "gradient off by 0.1",
        "ms": {"p20": 0.95 * ms, "p50": ms, "p80": 1.1 * ms} if measured else None,
        "rounds": 20,
        "peak_mb": 2 * ms if measured else None,
        "compile_s": 3.0,
        "error": 1e-6,
        "shares": shares,
        "ratio_to_student": ms / 100 if measured else None,
        "provenance": provenance(),
    }
    return {**record, **changes}


def steps(losses: Sequence[str] = ("gkd_bmfi",), **changes: Any) -> list[dict[str, Any]]:
    """Three steps without a loss and, for each loss, two providers in both modes, one of them rejected."""
    found = [
        step("student", 100.0, **changes),
        step("+ teacher forward", 140.0, **changes),
        step("+ teacher head gradient", 150.0, **changes),
    ]
    for loss in losses:
        for provider, mode, ms in (
            ("eager", "explicit", 230.0),
            ("eager", "inline", None),
            ("reference", "explicit", 220.0),
            ("reference", "inline", 190.0),
        ):
            found.append(step(f"+ {loss}", ms, provider, mode, **changes))
    return found


def scaling(case: Case, ms: float | None, provider: str = "native", **changes: Any) -> dict[str, Any]:
    """A record of one size; without `ms` a skipped one. Its copies moved the bytes of a pyramid at `COPY_GB_PER_S`."""
    record = {**kernel(provider, ms, case), "kind": "scaling", "rounds": 0, "units": None}
    if ms is None:
        record |= {"status": "skipped", "reason": "needs about 30 GB, 20 GB are free"}
    else:
        units = ms * 1e6 * COPY_GB_PER_S / case.unit
        record |= {"rounds": 40, "units": {"p20": 0.9 * units, "p50": units, "p80": 1.1 * units}}
    return {**record, **changes}
