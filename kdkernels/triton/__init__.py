"""The Triton backend: one file a primitive, its launchers named as the operators of `kdkernels.ops` that call them."""

from __future__ import annotations

import triton

if triton.knobs.runtime.interpret:
    from . import interpreter as interpreter
