"""Mends Triton 3.6's interpreter: loops up to a number that a kernel computed, which numpy 2.4 stopped it from doing, and half its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_tensor, _patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    # Triton calls int() on its arrays of one element; numpy takes that for arrays without dimensions only.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_lang(function: Callable[..., Any]) -> Any:
    """Triton replaces the language's functions whenever a kernel calls a function of its own, although they have been replaced."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch_language(function)
    return interpreter._LangPatchScope()


@cache
def _languages(function: Callable[..., Any]) -> list[Any]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


interpreter._patch_lang_tensor, interpreter._patch_lang = _patch_lang_tensor, _patch_lang
