"""The process that compiles for one capability: `python -m benchmarks.codegen.worker`; JSON on standard output.

A process of its own, because TRITON_INTERPRET is read when kernels are defined, and for a cache of compiled code without content.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from kdkernels.triton import launch

from ..registry import Case
from .capture import recorded, variants
from .cases import SIZES, Call, Inputs, calls, cases
from .rows import record
from .run import PROGRESS

#: Times that it says how far it is.
PARTS = 10
#: Kernel -> its launch parameters.
Parameters = Mapping[str, Mapping[str, int]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--kernel", default="")
    parser.add_argument("--operator", nargs="*")
    parser.add_argument("--dtype", nargs="*")
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args(argv)
    print(json.dumps(compiled(args)))


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """kernels: a record of each compiled version;   operators: of each call which of them it launches."""
    # A version that both layouts share has other accesses in each.
    found: dict[tuple[str, str], dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    served = []
    chosen = [(call, case) for call in calls() for case in cases(call) if _wanted(args, call, case)]
    _load_compiler(args.capability)
    with recorded(args.capability, lambda name: args.kernel in ("", name, name.partition(".")[0])) as launches:
        for number, (call, case) in enumerate(chosen):
            if number * PARTS // len(chosen) != (number - 1) * PARTS // len(chosen):
                print(f"{PROGRESS}sm_{args.capability}: {number} of {len(chosen)} calls compiled", file=sys.stderr, flush=True)
            for parameters in tabulated(args.capability, case):
                launches.clear()
                with _overridden(parameters):
                    call.run(Inputs(case))
                mine = set()
                for one in launches:
                    if one.compiled is not None:
                        key = (one.key, case.layout if one.on_pyramids else "")
                        taken = seconds.setdefault(one.key, one.seconds)
                        if key not in found:
                            found[key] = record(replace(one, seconds=taken), args.capability, key[1])
                        mine.add(list(found).index(key))
                if mine:
                    served.append((call, case, parameters, sorted(mine)))
    operators = [_operator(args, *one) for one in served]
    return {"kernels": list(found.values()), "operators": operators}


def _wanted(args: argparse.Namespace, call: Call, case: Case) -> bool:
    """Kernels that take no features belong to every type and layout."""
    return (not args.operator or call.operator in args.operator) and (not args.dtype or not call.on_features or case.dtype in args.dtype)


def _operator(args: argparse.Namespace, call: Call, case: Case, parameters: Parameters, kernels: list[int]) -> dict[str, Any]:
    return {
        "operator": call.operator,
        "options": call.options,
        "capability": args.capability,
        "dtype": case.dtype if call.on_features else "",
        "layout": case.layout if call.on_features else "",
        "kernels": kernels,
        "variants": _variants(call, case, parameters, args.capability) if args.variants and not args.kernel else None,
    }


def _variants(call: Call, case: Case, parameters: Parameters, capability: int) -> int:
    """Versions of all its kernels together, over all sizes and batches."""
    sizes = [replace(size, dtype=case.dtype, layout=case.layout) for size in SIZES]
    with _overridden(parameters):
        return sum(len(keys) for keys in variants([partial(call.run, Inputs(size)) for size in sizes], capability).values())


def tabulated(capability: int, case: Case) -> list[Parameters]:
    """Kernel -> launch parameters, for each size of inputs what the table of such GPUs says of this type and layout; {} without any.

    The launchers would look it up themselves, but only for tensors on such a GPU.
    """
    file = launch.path((capability // 10, capability % 10))
    if not file.is_file():
        return [{}]
    found: list[Parameters] = []
    entries = {tuple(name.split(" ")): entry["parameters"] for name, entry in launch.read(file)["entries"].items()}
    for size in launch.SIZES:
        chosen = {key[0]: value for key, value in entries.items() if value and key[1:] == (case.dtype, case.layout, size)}
        if chosen not in found:
            found.append(chosen)
    return found


@contextmanager
def _overridden(parameters: Parameters) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel, chosen in parameters.items():
            stack.enter_context(launch.override(kernel, chosen))
        yield


@triton.jit
def _nothing(out):
    tl.store(out, 0.0)


def _load_compiler(capability: int) -> None:
    """The compiler's own start, a second or two, is nobody's compile time."""
    with recorded(capability):
        _nothing[(1,)](torch.empty(1))


if __name__ == "__main__":
    main()
