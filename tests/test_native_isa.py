"""The library runs on every processor of its architecture: only what is chosen for a processor has that processor's instructions."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache

import pytest
from native_support import needs_library

from kdkernels import native

pytestmark = needs_library
X86 = platform.machine().lower() in ("x86_64", "amd64")
#: Namespaces of kernels, and what some of them must show. Other processors have one set.
KERNELS: dict[str, set[str]] = {"scalar": set(), **({"avx2": {"vex", "ymm"}, "avx512": {"vex", "zmm"}} if X86 else {})}


@cache
def registers_and_codings() -> dict[str, set[str]]:
    """Of every function of the library what its instructions show of the processor that they need.

    "vex": a mnemonic that begins with v, so of AVX or later, on whatever registers; "ymm", "zmm": registers of 32 and 64 bytes; "mask": the
    registers k1 to k7 of AVX-512; "high": the vector registers from 16 on, which are AVX-512's too.
    """
    file = native.library().file
    listing = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", str(file)], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    shown: set[str] = set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            shown = found.setdefault(line.partition("<")[2][:-2], set())
        elif "\t" in line:
            words = line.split("\t")[1]
            shown |= {"vex"} if re.match(r"v[a-z]", words) else set()
            shown |= {register for register in ("ymm", "zmm") if f"%{register}" in words}
            shown |= {"mask"} if re.search(r"%k[1-7]\b", words) else set()
            shown |= {"high"} if re.search(r"mm(1[6-9]|[23]\d)\b", words) else set()
    return found


def of(*namespaces: str) -> dict[str, set[str]]:
    """The functions of these namespaces of kd, lambdas and templates over their types among them."""
    return {name: shown for name, shown in registers_and_codings().items() if any(f"kd::{space}::" in name for space in namespaces)}


@pytest.mark.parametrize("namespace", KERNELS)
def test_every_set_of_kernels_is_there_and_has_its_registers(namespace: str) -> None:
    kernels = of(namespace)
    # A stripped library would have no names, and then nothing below would be seen.
    assert any("gradient" in name for name in kernels) and any("map_forward" in name for name in kernels)
    assert set().union(*kernels.values()) >= KERNELS[namespace]


def test_what_runs_everywhere_has_no_instructions_of_some_processors() -> None:
    chosen = of("avx2", "avx512")
    everywhere = {name: shown for name, shown in registers_and_codings().items() if name not in chosen}
    assert len(everywhere) > 100
    assert {name: shown for name, shown in everywhere.items() if shown} == {}


def test_kernels_for_avx2_have_nothing_of_avx512() -> None:
    assert {name: shown for name, shown in of("avx2").items() if shown & {"zmm", "mask", "high"}} == {}
