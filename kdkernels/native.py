"""The compiled libraries: finds and loads them, and says why when it cannot, or when a GPU cannot run what is in them.

`_C_cpu` holds the operators `torch.ops.kdkernels_native` and their kernels for the CPU, `_C_cuda` those for CUDA. Both lie beside this
file, with `_build_info.json`, in which setup.py says how it built them and why it left one out.
"""

from __future__ import annotations

import ctypes
import json
import re
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kdkernels

from .choice import constant

FOLDER = Path(__file__).parent
KINDS = ("cpu", "cuda")
#: Compute capabilities of GPUs on one chip with a CPU, which run no machine code but their own, and whose own runs on no other.
INTEGRATED = ((7, 2), (8, 7), (10, 1))


class Library(NamedTuple):
    """A compiled library: its file, None where there is none, and why it does not serve, "" when it does.

    Of a file that is there the reason begins with its name: `unfit`.
    """

    file: Path | None
    reason: str


def build_info(folder: Path = FOLDER) -> dict[str, Any]:
    """What setup.py wrote about the libraries in `folder`; {} where it wrote nothing.

    version: of kdkernels. torch, target: what they were built with, and the oldest that they run on. cpu, cuda: {"built", "reason",
    "compiler", "flags"}, for cuda "architectures" too; its "compiler" begins with nvcc's release.
    """
    try:
        found = json.loads((folder / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load(kind: str, folder: Path = FOLDER) -> Library:
    """The library of `kind`, cpu or cuda, in `folder`, loaded where it fits."""
    built = build_info(folder)
    file = next((path for path in (folder / f"_C_{kind}{suffix}" for suffix in EXTENSION_SUFFIXES) if path.is_file()), None)
    if file is None:
        why = built.get(kind, {}).get("reason")
        return Library(None, f"this installation of kdkernels has no compiled library _C_{kind}" + (f": {why}" if why else ""))
    reason = _too_different(built) or (_open_cuda(file, built.get("cuda", {})) if kind == "cuda" else _open_cpu(file))
    return Library(file, f"{file.name}: {reason}" if reason else "")


def library(kind: str = "cpu") -> Library:
    """The library of `kind`, cpu or cuda, of this installation. What happened when it was loaded is remembered."""
    if kind not in _loaded:
        _loaded[kind] = load(kind)
    return _loaded[kind]


@constant
def refuses(device: str, index: int | None = None) -> str:
    """Why there are no compiled kernels for tensors on a device of this type and index; "" when there are. Loads what is wanted for it.

    index: None is the current device
    """
    if device not in KINDS:
        return f"the tensors are on {device}, not on the CPU or a CUDA GPU"
    file, reason = library(device)
    if reason or file is None or device == "cpu":
        return reason
    return _cannot_run(file, torch.cuda.current_device() if index is None else index)


def unfit(reason: str) -> bool:
    """Whether `refuses` says this of a library that is there, and so was meant to be used."""
    return any(file is not None and reason.startswith(f"{file.name}: ") for file, _ in _loaded.values())


def expect(name: str, schema: str) -> None:
    """Takes the libraries out of use where their operator `name` has not this schema, "(Tensor x, ...) -> Tensor".

    An editable install whose sources have changed has such libraries until they are built again. The schemas are in that for the CPU, and
    setup.py builds both or leaves no old one behind, so that what holds for it holds for the other.
    """
    file, reason = _loaded["cpu"]
    if reason or file is None:
        return
    operator = getattr(torch.ops.kdkernels_native, name, None)
    # The stable ABI has no symbolic integers.
    wanted = str(torch._C.parse_schema(f"kdkernels_native::{name}{schema.replace('SymInt', 'int')}"))
    if operator is None or str(operator.default._schema) != wanted:
        _loaded["cpu"] = Library(file, f"{file.name}: it was built from other sources, its operator {name} is missing or another")
        # That for CUDA needs this one: whoever asks for it from now on is told so.
        _loaded.pop("cuda", None)


def version() -> str | None:
    """The version of kdkernels that the library is of; None where there is none, or where nothing is known."""
    return build_info().get("version") if library().file else None


def capability() -> str:
    """The instructions that the CPU kernels use: scalar, avx2 or avx512. Raises RuntimeError for others in KDKERNELS_CPU_CAPABILITY."""
    return torch.ops.kdkernels_native.cpu_capability.default()


def _too_different(built: dict[str, Any]) -> str:
    """Why a library so built cannot fit this kdkernels or this torch; "" when it may."""
    wanted, target = built.get("version", kdkernels.__version__), str(built.get("target", "2.11"))
    if wanted != kdkernels.__version__:
        return f"it was built for kdkernels {wanted}, this is {kdkernels.__version__}"
    if _release(torch.__version__) < _release(target):
        return f"it needs torch {target} or newer, this is {torch.__version__}"
    return ""


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version such as 2.11.0+cpu."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _open_cpu(file: Path) -> str:
    # Operators registered twice end the process, so a copy that is there already stays the one.
    reason = "" if hasattr(torch.ops.kdkernels_native, "cpu_capability") else _open(file)
    if reason:
        return reason
    if not hasattr(torch.ops.kdkernels_native, "cpu_capability"):
        return "it has not the operators of kdkernels"
    try:
        capability()
    except RuntimeError as error:
        # "function, file:line, message"
        return f"KDKERNELS_CPU_CAPABILITY: {re.sub(r'^[^,]*, [^,]*:[0-9]+, ', '', _line(error))}"
    return ""


def _open_cuda(file: Path, built: dict[str, Any]) -> str:
    """built: of `build_info`, what it says of this library"""
    if library("cpu").reason:
        return "it needs the library for the CPU, which does not serve"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.cuda is None:
        return "this torch is for GPUs of another make"
    # torch may be for an older CUDA than the one that the library was built with, and its runtime is linked into it.
    toolkit, driver = _toolkit(built), _of_driver()
    if toolkit and driver and driver[0] < toolkit[0]:
        return f"it was built with CUDA {_dotted(toolkit)}, the driver is for CUDA {_dotted(driver)}"
    return _open(file) or _lacking("CUDA")


@cache
def _cannot_run(file: Path, index: int) -> str:
    """Why the library for CUDA in this file has no code for this GPU; "" when it has, or where it is not known what it has."""
    built = build_info(file.parent).get("cuda", {})
    names = built.get("architectures", ())
    chip = torch.cuda.get_device_capability(index)
    if not names or any(_runs(name, chip) for name in names):
        return ""
    if not any(_compiles(name, chip) for name in names):
        return f"{file.name}: it was built for compute capability {' '.join(names)}, cuda:{index} has {_dotted(chip)}"
    # A driver runs newer machine code of its major release, but knows no newer PTX.
    toolkit, driver = _toolkit(built), _of_driver()
    if toolkit and driver and driver < toolkit:
        ours, theirs = _dotted(toolkit), _dotted(driver)
        return f"{file.name}: for cuda:{index}, {_dotted(chip)}, it has only PTX of CUDA {ours}, the driver is for CUDA {theirs}"
    return ""


def _runs(name: str, chip: tuple[int, int]) -> bool:
    """Whether GPUs of this compute capability run the machine code compiled for `name`, an architecture of `build_info`."""
    own, suffix, _ = _architecture(name)
    older = own[0] == chip[0] and own < chip and own not in INTEGRATED and chip not in INTEGRATED
    return own == chip or (older and suffix != "a")


def _compiles(name: str, chip: tuple[int, int]) -> bool:
    """Whether the driver can make code for GPUs of this compute capability from the PTX that is there for `name`, if there is any."""
    own, suffix, ptx = _architecture(name)
    # With a suffix PTX has in it what only this GPU has, or its family.
    return ptx and (_runs(name, chip) if suffix else own <= chip)


def _architecture(name: str) -> tuple[tuple[int, int], str, bool]:
    """10.0f+PTX: compute capability, what follows it, and whether there is PTX."""
    number, _, ptx = name.partition("+")
    own = number.rstrip("af")
    major, minor = own.split(".")
    return (int(major), int(minor)), number.removeprefix(own), bool(ptx)


def _toolkit(built: dict[str, Any]) -> tuple[int, int] | None:
    """The release of CUDA that the library was built with; None where nothing is known."""
    found = re.search(r"nvcc release (\d+)\.(\d+)", built.get("compiler", ""))
    return (int(found[1]), int(found[2])) if found else None


@cache
def _of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver is for; None where it does not say. torch does not tell."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _lacking(key: str) -> str:
    """The operators that the libraries have not got for this dispatch key, of those that differ by it; "" when that is none."""
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kdkernels_native::")]
    missing = sorted(name.partition("::")[2] for name in operators if not _has(name, key) and not _has(name, "CompositeExplicitAutograd"))
    return f"it was built from other sources and has no {', '.join(missing)}" if missing else ""


def _has(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def _open(file: Path) -> str:
    """Loads a library; returns what the dynamic loader says against it."""
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return _line(error.__cause__ or error).removeprefix(f"{file}: ")
    return ""


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


# Here and not at the first call: torch.compile traces through the choice of a backend. That of CUDA waits until somebody asks, for whether
# there is a GPU cannot be asked without starting CUDA.
_loaded = {"cpu": load("cpu")}
