"""What tests compile with, and the marks that skip them where it is missing. A compiler that is there has to have built the library."""

from __future__ import annotations

import os
import shutil

import pytest
import torch


def find_nvcc() -> str | None:
    """CUDA's compiler. Raises RuntimeError without one where KDKERNELS_REQUIRE_NVCC is set, as by who has installed it for these tests."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None and os.environ.get("KDKERNELS_REQUIRE_NVCC"):
        raise RuntimeError("KDKERNELS_REQUIRE_NVCC is set, but there is no nvcc: neither on the path nor in /usr/local/cuda/bin")
    return found


CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NVCC = find_nvcc()
#: torch before 2.11 has not the headers that the library is compiled with.
needs_compiler = pytest.mark.skipif(CXX is None or torch.__version__ < (2, 11), reason="needs a C++ compiler and the headers of torch 2.11")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, CUDA's compiler")
