"""Where a number comes from: versions, machine, command, and the state of the device."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kdkernels

#: What is measured and what measures; changes elsewhere do not make a number doubtful.
_MEASURED = ("kdkernels", "benchmarks", "csrc", "setup.py", "pyproject.toml", ":(exclude)benchmarks/results")
#: nvidia-smi's field -> ours.
_GPU_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}


def device_label(device: torch.device) -> str:
    """Folder name of a device: "cpu", "nvidia-h200"."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def provenance(device: torch.device, seed: int) -> dict[str, Any]:
    """What does not change during a run. `commit` and `dirty` are those of the checkout that kdkernels lies in, None outside of one;
    `native`: how the compiled library was built and which instructions its CPU kernels use, None where there is none."""
    commit, dirty = revision()
    on_gpu = device.type == "cuda"
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _installed("triton"),
            "numpy": _installed("numpy"),
            "kdkernels": kdkernels.__version__,
            "compiler": _first_line([os.environ.get("CXX") or "c++", "--version"]),
        },
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": _smi(device, ["driver_version"])[0] if on_gpu else None,
        "native": _native_library(),
        "platform": platform.platform(),
        "seed": seed,
        "command": _without_paths([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_state(device: torch.device) -> dict[str, Any]:
    """What may change from cell to cell; None for what nobody can read here.

    sm_mhz, memory_mhz, power_w, power_limit_w, temperature_c, throttle (nvidia-smi's mask of reasons): of the GPU;
    cpu_mhz: mean over the cores;   load: processes that want a core, mean of the last minute
    """
    gpu: Sequence[str | None] = [None] * len(_GPU_STATE)
    throttle = None
    if device.type == "cuda":
        # One process for all fields: it takes as long as a small cell. The second name is that of old drivers.
        for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
            *gpu, throttle = _smi(device, [*_GPU_STATE, reasons])
            if throttle is not None:
                break
    state: dict[str, Any] = {name: _number(value) for name, value in zip(_GPU_STATE.values(), gpu, strict=True)}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**state, "throttle": throttle, "cpu_mhz": _cpu_mhz(), "load": load}


def revision() -> tuple[str | None, bool | None]:
    """Commit of the checkout that kdkernels lies in, and whether what is measured differs from it. (None, None) outside of one."""
    package = Path(str(kdkernels.__file__)).resolve().parent
    # A package installed somewhere below another project's checkout is no part of that project.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    changes = _git(package.parent, "status", "--porcelain", "--", *_MEASURED)
    return _git(package, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _native_library() -> dict[str, Any] | None:
    """{"capability": "avx512", "compiler": "c++ (Debian) 12.2.0", "version": ..., "torch": ...}, the last three as far as it is known."""
    if not kdkernels.backend_info()["native"]["available"]:
        return None
    # Not above: `compare` measures versions of kdkernels that have no such module.
    from kdkernels import native

    built = native.build_info()
    compiler = " ".join(_without_paths(built.get("cpu", {}).get("compiler", "").split()))
    return {"capability": native.capability(), "compiler": compiler or None, "version": built.get("version"), "torch": built.get("torch")}


def _without_paths(words: Sequence[str]) -> list[str]:
    """A path of this machine is nobody else's business: its last part only."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def _git(folder: Path, *words: str) -> str | None:
    # Containers often run as another user than the one who owns the checkout.
    return _output(["git", "-c", "safe.directory=*", "-C", str(folder), *words])


def _smi(device: torch.device, fields: Sequence[str]) -> list[str | None]:
    """nvidia-smi's answers for this device; all None where it is absent or refuses."""
    # By UUID: CUDA_VISIBLE_DEVICES renumbers the devices for us and not for nvidia-smi.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _output(["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    values = [value.strip() for value in line.split(",")] if line else []
    return list(values) if len(values) == len(fields) else [None] * len(fields)


def _output(command: Sequence[str]) -> str | None:
    """What the command prints, stripped; None when it is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _first_line(command: Sequence[str]) -> str | None:
    output = _output(command)
    return output.splitlines()[0] if output else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # "[N/A]"
        return None


def _cpu_lines(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key]


def _cpu_model() -> str:
    models = _cpu_lines("model name")
    return models[0] if models else platform.processor() or platform.machine()


def _cpu_mhz() -> float | None:
    found = [float(value) for value in _cpu_lines("cpu MHz")]
    return sum(found) / len(found) if found else None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
