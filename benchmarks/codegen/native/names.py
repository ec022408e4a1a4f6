"""Kernels as their sources have them: `_ZN2kd3runINS_6ReduceIfEEEEvT_` is `Reduce<fp32>`."""

from __future__ import annotations

import ctypes
import re
from functools import cache

#: C++'s word for a type -> ours.
_TYPES = {"float": "fp32", "Half": "fp16", "__half": "fp16", "BFloat16": "bf16", "__nv_bfloat16": "bf16"}
#: The kernel that runs a functor, csrc/cuda/launch.h, has the functor's name.
_RUN = re.compile(r"(?:\w+::)*run<(.*)>")
_WORD = re.compile(r"(?<![\w:])[A-Za-z_][\w:]*")
_NUMBER = re.compile(r"\b(\d+)u?l{0,2}\b")


def kernel_name(symbol: str) -> str:
    """Without namespaces, types as they are called elsewhere: `Reduce<bf16, 4, true>`. Raises ValueError for what is no symbol of C++."""
    head = _head(demangled(symbol).replace("(anonymous namespace)::", "").replace("> >", ">>"))
    inner = _RUN.fullmatch(head)
    words = _WORD.sub(lambda word: _short(word[0]), inner[1] if inner else head)
    return _NUMBER.sub(r"\1", words)


def arguments(name: str) -> set[str]:
    """All template arguments in a kernel's name."""
    return set(re.findall(r"[\w.]+", name.partition("<")[2]))


def _short(word: str) -> str:
    last = word.rpartition("::")[2]
    return _TYPES.get(last, last)


def _head(text: str) -> str:
    """The function's name of "void name<...>(...)", template arguments included."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if depth == 0 and letter == " ":
            start = i + 1
        elif depth == 0 and letter == "(":
            return text[start:i]
    return text[start:]


def demangled(symbol: str) -> str:
    """As C++ writes it. Raises ValueError for what is no symbol of C++."""
    runtime = _runtime()
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        raise ValueError(f"no symbol of C++: {symbol}")
    found = ctypes.string_at(text).decode()
    runtime.free(ctypes.c_void_p(text))
    return found


@cache
def _runtime() -> ctypes.CDLL:
    """C++'s own library, which torch has loaded; binutils' c++filt need not be there."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    return runtime
