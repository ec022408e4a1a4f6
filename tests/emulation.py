"""The CUDA kernels on a CPU: csrc/cuda compiled with tests/emulator by a C++ compiler, as operators `torch.ops.kdkernels_emulated`.

Built once, in build/emulator, and again where a source or a flag has changed; what was built of others is removed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pybind11
import torch
from native_support import poisoned
from toolchain import CXX

from kdkernels import library

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "emulator"
NAME = "kdkernels_emulated"
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DKD_LIBRARY={NAME}"),
    # pybind11 first: torch brings one of its own, which refuses what keeps to the stable ABI.
    *(f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"),
    *(f"-I{ROOT / 'tests' / 'emulator'}", f"-isystem{TORCH / 'include'}"),
]


def jobs() -> int:
    """How many compilers run at a time: MAX_JOBS, or one for each core that this process may use."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def sources() -> list[Path]:
    cuda, own = sorted((ROOT / "csrc" / "cuda").glob("*.cu")), sorted((ROOT / "tests" / "emulator").glob("*.cpp"))
    common = [ROOT / "csrc" / f"{name}.cpp" for name in ("map_options", "ops", "pyramid", "terms")]
    return [*common, *cuda, *own]


@functools.cache
def module() -> ModuleType:
    """The emulator, compiled where it has to be. Raises RuntimeError with the compiler's output."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Other processes wait, and do not remove what this one is about to load.
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = _objects()
        file = _linked(objects)
        remove_others({*objects, file.parent, FOLDER / "lock"})
        spec = importlib.util.spec_from_file_location(NAME, file)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = found
        spec.loader.exec_module(found)
    return found


def remove_others(wanted: set[Path]) -> None:
    """Leaves only these in the folder that they are in."""
    (folder,) = {path.parent for path in wanted}
    for path in set(folder.iterdir()) - wanted:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _objects() -> list[Path]:
    """One of each source, compiled where it has to be."""
    assert CXX is not None
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "tests" / "emulator").glob("*.h")]
    common = hashlib.sha1("\n".join([CXX, torch.__version__, *FLAGS, *(f.read_text() for f in sorted(headers))]).encode())

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        target = FOLDER / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.is_file():
            # In one step, so that a broken build leaves no half of a file.
            partial = target.with_suffix(f".{os.getpid()}")
            _run([CXX, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(compiled, sources()))


def _linked(objects: list[Path]) -> Path:
    """The emulator of these objects."""
    assert CXX is not None
    name = hashlib.sha1("".join(path.name for path in objects).encode()).hexdigest()[:16]
    file = FOLDER / name / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        _run([CXX, "-shared", *map(str, objects), f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}", "-o", str(partial)])
        partial.replace(file)
    return file


@contextmanager
def emulated(seed: int = 0, processors: int = 3) -> Iterator[ModuleType]:
    """Within it the backend "native" runs the CUDA kernels, for tensors on the CPU, on poisoned memory.

    seed: the order of threads and blocks: as numbered, 1 backwards, others at random;   processors: blocks of a cooperative launch
    """
    emulator = module()
    emulator.set_machine(seed, processors)
    before = library._kernel

    def kernel(backend: str, primitive: str, name: str) -> Any:
        return getattr(torch.ops.kdkernels_emulated, name).default if backend == "native" else before(backend, primitive, name)

    # `kdkernels.ops.terms_persistent` is the function of that name.
    one_launch = importlib.import_module("kdkernels.ops.terms_persistent")
    library._kernel = kernel  # type: ignore[assignment]
    try:
        with poisoned(), patch.object(one_launch, "on_gpu", lambda x: True):
            yield emulator
    finally:
        library._kernel = before
        emulator.set_machine()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
