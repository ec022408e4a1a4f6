"""Which global memory accesses of a kernel's PTX one program of a launch reaches, and how wide they are.

A kernel holds a body for every kind of level, and sizes, being arguments, choose among them. So the arguments' values and the program's
number are propagated through the code as constants, loops included, until nothing changes: branches whose condition is then known go one
way, all others both. What depends on the thread or on memory stays unknown, so an access that is reached may still be masked off, but one
that is not reached is never made.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

#: What a register holds: a number (predicates are 0 or 1; negative numbers in two's complement), the pointer arguments that it may be
#: derived from, or nothing that is known.
Value = int | frozenset[int] | None

#: Instructions that end a block.
_LEAVING = ("bra", "brx", "ret", "exit", "trap")
#: Comments and directives; what is left are labels, and instructions up to their semicolons.
_NO_CODE = re.compile(r"//.*|^\s*\..*$", re.MULTILINE)
_CODE = re.compile(r"(?P<label>[$\w]+):|(?:@(?P<not>!?)(?P<guard>%\w+)\s+)?(?P<name>[a-z][\w.:]*)(?P<operands>[^;]*);")
_SIGNED = re.compile(r"\.s(8|16|32|64)")
_BITS = re.compile(r"\.[busf](8|16|32|64)\b")
_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
    **dict(zip(("lo", "ls", "hi", "hs"), (operator.lt, operator.le, operator.gt, operator.ge), strict=True)),
}


class Access(NamedTuple):
    """One instruction: bytes a thread moves with it, and the numbers of the pointer arguments that the address may come from."""

    store: bool
    bytes: int
    arguments: frozenset[int]


@dataclass(frozen=True)
class _Instruction:
    name: str
    operands: tuple[str, ...]
    guard: str
    negated: bool


@dataclass
class _Block:
    instructions: list[_Instruction]
    following: int | None  # the block behind it in the text


class Program:
    """The code of one kernel."""

    def __init__(self, ptx: str) -> None:
        entry = ptx[ptx.index(".entry") :]
        self.parameters = re.findall(r"\.param\s+(?:\.\w+\s+)*?\.(\w+)\b[^,)]*?(\w+_param_\d+)", entry[: entry.index(")")])
        self._numbers = {name: i for i, (_, name) in enumerate(self.parameters)}
        self._labels: dict[str, list[int]] = {}
        self._blocks = self._split(entry[entry.index("{") + 1 : entry.index("\n}")])

    def accesses(self, arguments: Sequence[Value], program: int, until: Collection[int] = ()) -> list[Access]:
        """Global loads and stores that program number `program` reaches, each instruction once.

        arguments: what is known of every parameter, in order: a number, or frozenset({i}) for the pointer argument number i.
        until:     numbers of arguments with whose first access the search may end
        """
        waiting: dict[int, dict[str, Value]] = {0: {}}
        entered: dict[int, dict[str, Value]] = {}
        found: dict[int, list[Access]] = {}
        while waiting:
            number, state = waiting.popitem()
            before = entered.get(number)
            joined = dict(state) if before is None else _join(before, state)
            if before is not None and joined == before:
                continue
            entered[number] = joined
            run = _Run(self._numbers, arguments, program, dict(joined))
            targets, found[number] = run.block(self._blocks[number], self._labels)
            if any(not access.arguments.isdisjoint(until) for access in found[number]):
                break
            for target in targets:
                left = dict(run.state)
                waiting[target] = _join(waiting[target], left) if target in waiting else left
        return [access for number in sorted(found) for access in found[number]]

    def all_accesses(self) -> list[Access]:
        """Every global load and store of the text, of whatever body; their arguments are left open."""
        run = _Run(self._numbers, (), 0, {})
        instructions = (instruction for block in self._blocks for instruction in block.instructions)
        return [access for instruction in instructions if (access := run.access(instruction)) is not None]

    def _split(self, body: str) -> list[_Block]:
        """Blocks in the order of the text; fills `_labels`: where each leads to, a table of jumps to several."""
        blocks = [_Block([], None)]
        tables: dict[str, tuple[str, ...]] = {}
        label = ""
        for found in _CODE.finditer(_NO_CODE.sub("", body)):
            if found["label"]:
                label = found["label"]
                blocks.append(_Block([], None))
                self._labels[label] = [len(blocks) - 1]
                continue
            name, operands = found["name"], _operands(found["operands"])
            if name == "branchtargets":
                tables[label] = operands
                continue
            blocks[-1].instructions.append(_Instruction(name, operands, found["guard"] or "", bool(found["not"])))
            if name.split(".")[0] in _LEAVING:
                blocks.append(_Block([], None))
        for i, block in enumerate(blocks[:-1]):
            block.following = i + 1
        for name, targets in tables.items():
            self._labels[name] = [at for target in targets for at in self._labels[target]]
        return blocks


class _Run:
    """One pass over one block."""

    def __init__(self, numbers: Mapping[str, int], arguments: Sequence[Value], program: int, state: dict[str, Value]) -> None:
        self._numbers, self._arguments, self.state = numbers, arguments, state
        self._special = {"%ctaid.x": program, "%ctaid.y": 0, "%ctaid.z": 0}

    def block(self, block: _Block, labels: Mapping[str, list[int]]) -> tuple[list[int], list[Access]]:
        """The blocks that may follow, and the accesses."""
        found: list[Access] = []
        for instruction in block.instructions:
            guard = self._guard(instruction)
            if guard is False:
                continue
            kind = instruction.name.split(".")[0]
            if kind in _LEAVING:
                taken = self._targets(instruction, labels)
                past = [block.following] if guard is None and block.following is not None else []
                return taken + past, found
            if (access := self.access(instruction)) is not None:
                found.append(access)
            self._step(instruction, unsure=guard is None)
        return ([block.following] if block.following is not None else []), found

    def _targets(self, instruction: _Instruction, labels: Mapping[str, list[int]]) -> list[int]:
        *index, label = instruction.operands or ("",)
        targets = labels.get(label, [])
        number = self._value(index[0]) if index else None
        return targets[number : number + 1] if isinstance(number, int) else targets

    def _guard(self, instruction: _Instruction) -> bool | None:
        if not instruction.guard:
            return True
        value = self.state.get(instruction.guard)
        return bool(value) != instruction.negated if isinstance(value, int) else None

    def access(self, instruction: _Instruction) -> Access | None:
        """What a load or store of global memory moves; None for other instructions."""
        kind, *modifiers = instruction.name.split(".")
        if kind in ("ld", "st") and "global" in modifiers:
            bits = _BITS.search(f".{modifiers[-1]}")
            assert bits is not None, instruction.name
            lanes = [int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)]
            size = prod(lanes) * int(bits[1]) // 8
            address = next(operand for operand in instruction.operands if operand.startswith("["))
        elif instruction.name.startswith("cp.async.") and "global" in modifiers:
            size, address = int(instruction.operands[2], 0), instruction.operands[1]
        else:
            return None
        value = self._value(address.strip("[] ").split("+")[0].strip())
        return Access(kind == "st", size, value if isinstance(value, frozenset) else frozenset())

    def _step(self, instruction: _Instruction, unsure: bool) -> None:
        """What the instruction leaves in its registers."""
        kind = instruction.name.split(".")[0]
        if not instruction.operands or kind in ("st", "cp", "bar", "red", "prefetch", "membar", "fence"):
            return
        targets = re.findall(r"%\w+", instruction.operands[0])
        value = self._result(kind, instruction) if len(targets) == 1 and not instruction.operands[0].startswith("{") else None
        for target in targets:
            self.state[target] = _joined(self.state[target], value) if unsure and target in self.state else None if unsure else value

    def _result(self, kind: str, instruction: _Instruction) -> Value:
        name, operands = instruction.name, instruction.operands
        if kind == "ld":
            return self._arguments[self._numbers[operands[1].strip("[] ")]] if ".param" in name else None
        values = [self._value(operand) for operand in operands[1:]]
        if kind == "mov" or kind == "cvta":
            return values[0]
        if kind == "selp":
            return values[0 if values[2] else 1] if isinstance(values[2], int) else _joined(values[0], values[1])
        if any(f".{of}" in name for of in ("f16", "bf16", "f32", "f64", "bf16x2", "f16x2", "tf32")):
            return None
        numbers = [value for value in values if isinstance(value, int)]
        if len(numbers) == len(values):
            return _computed(kind, name, numbers)
        if (kind in ("and", "mul") and 0 in numbers) or (kind == "or" and name.endswith(".pred") and 1 in numbers):
            return 0 if kind != "or" else 1
        if kind in ("add", "sub", "mad"):
            pointers = [value for value in values if isinstance(value, frozenset)]
            return frozenset().union(*pointers) if pointers else None
        return None

    def _value(self, operand: str) -> Value:
        operand = operand.strip()
        if operand in self._special:
            return self._special[operand]
        if operand.startswith("%"):
            return self.state.get(operand)
        try:
            return int(operand, 0)
        except ValueError:
            return None  # a literal of floating point, or the address of shared memory


def _computed(kind: str, name: str, numbers: list[int]) -> int | None:
    """The result of an integer instruction on known numbers, as an unsigned number; None of one that is not modelled."""
    signed = _SIGNED.search(name) is not None
    sizes = [int(bits) for bits in _BITS.findall(name)]
    wide = ".wide" in name
    bits = 1 if name.endswith(".pred") else sizes[-1] if sizes else 32
    if kind in ("shl", "shr", "bfe"):
        read = [_read(numbers[0], bits, signed), *numbers[1:]]
    elif kind == "mad" and wide:
        read = [*(_read(n, bits, signed) for n in numbers[:2]), numbers[2]]
    else:
        read = [_read(n, bits, signed) for n in numbers]
    result = _integer(kind, name, read, bits)
    if result is None or kind == "setp":
        return result
    written = sizes[0] if kind == "cvt" else 2 * bits if wide else bits
    return result & ((1 << written) - 1)


def _integer(kind: str, name: str, read: list[int], bits: int) -> int | None:
    if kind == "setp":
        compared = next((_COMPARED[part] for part in name.split(".") if part in _COMPARED), None)
        return None if compared is None or len(read) != 2 else int(compared(read[0], read[1]))
    if kind in ("div", "rem"):
        if read[1] == 0:
            return None
        quotient = abs(read[0]) // abs(read[1]) * (1 if (read[0] < 0) == (read[1] < 0) else -1)
        return quotient if kind == "div" else read[0] - quotient * read[1]
    if kind in ("mul", "mad"):
        product = read[0] * read[1] >> (bits if ".hi" in name else 0)
        return product + (read[2] if kind == "mad" else 0)
    if kind == "shl":
        return read[0] << read[1] if read[1] < bits else 0
    if kind == "bfe":
        return (read[0] >> read[1]) & ((1 << read[2]) - 1) if ".u" in name else None
    return _SIMPLE[kind](*read) if kind in _SIMPLE else None


_SIMPLE: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shr": operator.rshift,
    "min": min,
    "max": max,
    "neg": operator.neg,
    "not": operator.invert,
    "abs": abs,
    "cvt": lambda x: x,
}


def _read(number: int, bits: int, signed: bool) -> int:
    low = number & ((1 << bits) - 1)
    return low - (1 << bits) if signed and low >> (bits - 1) else low


def _joined(a: Value, b: Value) -> Value:
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return a | b
    return a if a == b else None


def _join(a: Mapping[str, Value], b: Mapping[str, Value]) -> dict[str, Value]:
    """What holds whichever way was taken. A register that one way never wrote is not read behind it unless it was written again."""
    return {**b, **{name: _joined(value, b[name]) if name in b else value for name, value in a.items()}}


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces and brackets."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,])+", text) if part.strip())
