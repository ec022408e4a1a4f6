"""The compiled libraries: finds and loads them, and says why when it cannot.

`_C_cpu` holds the operators `torch.ops.kdkernels_native` and their kernels for the CPU, `_C_cuda` those for CUDA. Both lie beside this
file, with `_build_info.json`, in which setup.py says how it built them and why it left one out.
"""

from __future__ import annotations

import json
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kdkernels

from .choice import constant

FOLDER = Path(__file__).parent
KINDS = ("cpu", "cuda")


class Library(NamedTuple):
    """A compiled library: its file, None where there is none, and why it does not serve, "" when it does."""

    file: Path | None
    reason: str


def build_info(folder: Path = FOLDER) -> dict[str, Any]:
    """What setup.py wrote about the libraries in `folder`; {} where it wrote nothing.

    version: of kdkernels. torch, target: what they were built with, and the oldest that they run on. cpu, cuda: {"built", "reason",
    "compiler", "flags"}, for cuda "architectures" too.
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
    reason = _too_different(built) or (_open_cuda(file) if kind == "cuda" else _open_cpu(file))
    return Library(file, f"{file.name}: {reason}" if reason else "")


def library(kind: str = "cpu") -> Library:
    """The library of `kind`, cpu or cuda, of this installation. What happened when it was loaded is remembered."""
    if kind not in _loaded:
        _loaded[kind] = load(kind)
    return _loaded[kind]


def loaded() -> tuple[Library, ...]:
    """The libraries of this installation that were asked for so far."""
    return tuple(_loaded.values())


@constant
def refuses(device: str) -> str:
    """Why there are no compiled kernels for tensors on a device of this type; "" when there are. Loads what is wanted for it."""
    if device not in KINDS:
        return f"the tensors are on {device}, not on the CPU or a CUDA GPU"
    return library(device).reason


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


def _open_cuda(file: Path) -> str:
    if library("cpu").reason:
        return "it needs the library for the CPU, which does not serve"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _open(file) or _lacking("CUDA")


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
