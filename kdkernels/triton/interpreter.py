"""Lets Triton's interpreter loop up to a number that a kernel computed, which numpy 2.4 stopped it from doing."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    # Triton 3.6 calls int() on its arrays of one element; numpy takes that for arrays without dimensions only.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
