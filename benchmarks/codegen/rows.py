"""What one compiled kernel is, as one record."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch import Tensor

from ..registry import DTYPES
from .capture import Launch, is_pyramid
from .disassembly import by_width, inspect
from .ptx import Access, Program, Value

Record = dict[str, Any]
_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


def record(launch: Launch, capability: int, layout: str) -> Record:
    """All that is known of the launch's kernel. JSON has no numbers as keys: widths in bytes are text.

    given: tensors that are there, of those that may be absent;   flags: constexprs that are no block sizes, which are `parameters`
    levels: of each level's first and last program, which of the kernel's accesses they reach: on the pyramids by width in bytes
            (`loads`, `stores`), on everything else (`other_loads`, `other_stores`)
    text:   accesses of all bodies in PTX;   machine: in the cubin
    unknown: accesses whose address could not be traced to an argument
    """
    compiled = launch.compiled
    assert compiled is not None
    binary = inspect(compiled.asm["cubin"])
    program = Program(compiled.asm["ptx"])
    values, pyramids = _parameters(launch, compiled.src.signature, len(program.parameters))
    levels = [_level(program, values, pyramids, ends) for ends in _levels(launch, program, values, pyramids)]
    everything = program.all_accesses()
    return {
        "kernel": launch.kernel,
        "capability": capability,
        "dtype": _DTYPES[next(iter(pyramids.values())).dtype] if pyramids else "",
        "layout": layout if pyramids else "",
        "given": sorted(name for name, value in _tensors(launch.arguments) if value is not None),
        "flags": {name: _plain(value) for name, value in launch.constants.items() if isinstance(value, (bool, str, tuple))},
        "parameters": {
            **{name: value for name, value in launch.constants.items() if type(value) is int},
            "num_warps": compiled.metadata.num_warps,
        },
        "axes": sum(size != 1 for size in launch.grid[1:]),
        "registers": binary.registers,
        "local": binary.local,
        "shared": compiled.metadata.shared,
        "fp64": binary.instructions.fp64 + compiled.asm["ptx"].count(".f64"),
        "atomics": binary.instructions.atomics,
        "levels": levels,
        "text": _widths(everything),
        "machine": {"loads": by_width(binary.instructions.loads), "stores": by_width(binary.instructions.stores)},
        "unknown": sum(level.pop("unknown") for level in levels),
        "seconds": round(launch.seconds, 2),
    }


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _tensors(arguments: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names of the arguments that are tensors, or None in the place of one; a pyramid's once, elements of a pair on their own."""
    for key, value in arguments.items():
        label = f"{name}[{key}]" if name else key
        if isinstance(value, tuple) and not is_pyramid(value):
            yield from _tensors(dict(enumerate(value)), label)
        elif value is None or isinstance(value, (Tensor, tuple)):
            yield label, value


def _levels(launch: Launch, program: Program, values: list[Value], pyramids: dict[int, Tensor]) -> list[tuple[int, int]]:
    """First and last program of every level, told by the levels that they use; of the launch where it uses none."""
    last = prod(launch.grid) - 1
    if not pyramids:
        return [(0, last)]

    def shape(number: int) -> tuple[int, ...]:
        accesses = program.accesses(values, number, pyramids)
        return next(tuple(pyramids[i].shape) for access in accesses for i in access.arguments if i in pyramids)

    found = [(0, last)]
    while shape(first := found[-1][0]) != shape(last):
        # Levels follow each other: the first program that is not of this level.
        end = bisect_left(range(first, last + 1), True, key=lambda number: shape(number) != shape(first)) + first
        found[-1:] = [(first, end - 1), (end, last)]
    return found


def _level(program: Program, values: list[Value], pyramids: dict[int, Tensor], programs: Sequence[int]) -> Record:
    """The accesses of the level that these programs reach, each instruction once a program, the programs' maximum."""
    reached = [program.accesses(values, which) for which in dict.fromkeys(programs)]
    found: Counter[tuple[str, int]] = Counter()
    for accesses in reached:
        found |= Counter((_place(access, pyramids), access.bytes) for access in accesses)
    mine = [pyramids[i] for accesses in reached for access in accesses for i in access.arguments if i in pyramids]
    shapes = {tuple(level.shape) for level in mine}
    assert len(shapes) <= 1, f"programs {programs} use levels of different shapes: {shapes}"
    places = ("loads", "stores", "other_loads", "other_stores")
    return {
        "shape": list(shapes.pop()) if shapes else None,
        "itemsize": min((level.element_size() for level in mine), default=None),
        **{place: by_width({bytes: count for (at, bytes), count in found.items() if at == place}) for place in places},
        "unknown": sum(not access.arguments for accesses in reached for access in accesses),
    }


def _place(access: Access, pyramids: dict[int, Tensor]) -> str:
    return f"{'other_' if access.arguments.isdisjoint(pyramids) else ''}{'stores' if access.store else 'loads'}"


def _parameters(launch: Launch, signature: dict[str, Any], count: int) -> tuple[list[Value], dict[int, Tensor]]:
    """What is known of every parameter of the PTX, and the levels of pyramids by their parameter's number.

    Parameters are the arguments in order, tuples taken apart, without what is constant; behind them come Triton's own.
    """
    values: list[Value] = []
    pyramids: dict[int, Tensor] = {}
    for name, kind in signature.items():
        argument = launch.arguments.get(name)
        for value in _flat([argument], [kind]):
            if is_pyramid(argument):
                pyramids[len(values)] = value
            pointer = frozenset({len(values)}) if isinstance(value, Tensor) else None
            values.append(value if isinstance(value, int) else pointer)
    assert len(values) <= count, "the parameters of the PTX are not the arguments"
    return values + [frozenset({i}) for i in range(len(values), count)], pyramids


def _flat(values: Sequence[Any], types: Sequence[Any]) -> Iterator[Any]:
    for value, kind in zip(values, types, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(value, kind)
        elif kind != "constexpr":
            yield value


def _widths(accesses: Sequence[Access]) -> Record:
    found = {False: Counter[int](), True: Counter[int]()}
    for access in accesses:
        found[access.store][access.bytes] += 1
    return {"loads": by_width(found[False]), "stores": by_width(found[True])}
