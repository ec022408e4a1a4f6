"""`kdkernels bench native-codegen`: what is told of compiled CUDA kernels is true, and the committed file is of the library built here."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from toolchain import NVCC, needs_nvcc

from benchmarks.cli import main
from benchmarks.codegen.disassembly import counted
from benchmarks.codegen.native import library, run
from benchmarks.codegen.native.ceilings import WITHOUT_SPILLS, broken, streams
from benchmarks.codegen.native.names import arguments, kernel_name
from benchmarks.codegen.native.occupancy import SHARED, occupancy
from benchmarks.codegen.native.table import page, table
from kdkernels import native

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "native-codegen.json"
REMEDY = "run: kdkernels bench native-codegen --output benchmarks/results/native-codegen.json && python -m benchmarks.report.tables"
#: Registers that another nvcc may take more: two of the units in which a warp gets them.
LITTLE = 16

USAGE = """
Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0

Fatbin elf code:
================
arch = sm_90
compressed

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN2kd3runINS_6ReduceIN3c108BFloat16EEEEEvT_:
  REG:56 STACK:8 SHARED:9472 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN2kd3runINS_8SumPartsEEEvT_:
  REG:22 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """
Fatbin elf code:
================
arch = sm_90

.nv.info
	<0x1>
	Attribute:	EIATTR_CUDA_API_VERSION

Fatbin elf code:
================
arch = sm_90
   17   1e4c     b4  0  4                    CUDA_INFO        0    3        0 .nv.info._ZN2kd3runINS_8SumPartsEEEvT_

.section .note.nv.tkinfo
	Toolkit Version 2
	Tool Name: ptxas
	Tool Version: Cuda compilation tools, release 13.0, V13.0.88
	Tool Branch: Build cuda_13.0.r13.0/compiler.36424714_0


.nv.info._ZN2kd3runINS_6ReduceIN3c108BFloat16EEEEEvT_
	<0x9>
	Attribute:	EIATTR_EXIT_INSTR_OFFSETS
	Format:	EIFMT_SVAL
	Value:	0xa10 
	<0x10>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1 
	<0x11>
	Attribute:	EIATTR_CRS_STACK_SIZE
	Format:	EIFMT_SVAL
	Value:	0x0 


.nv.info._ZN2kd3runINS_8SumPartsEEEvT_
	<0x1>
	Attribute:	EIATTR_CUDA_API_VERSION
	Format:	EIFMT_SVAL
	Value:	0x82 

.nv.shared._ZN2kd3runINS_8SumPartsEEEvT_
"""
SASS = """
Fatbin elf code:
================
arch = sm_90

	code for sm_90

Fatbin elf code:
================
arch = sm_90

	code for sm_90
		Function : _ZN2kd3runINS_8SumPartsEEEvT_
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe40000000800 */
        /*0010*/              @!P0 LDG.E R0, desc[UR4][R2.64] ;        /* 0x0000000402008981 */
        /*0020*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5 ;
        /*0030*/                   STG.E desc[UR4][R2.64], R0 ;
		Function : _ZN2kd3runINS_6ReduceIN3c108BFloat16EEEEEvT_
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.U16 R0, desc[UR4][R2.64] ;
        /*0030*/                   STL.64 [R1], R4 ;
        /*0040*/                   LDL.64 R4, [R1] ;
        /*0050*/                   EXIT ;
"""
RECORDED = library.Dump(USAGE, ELF, SASS)


def test_the_kernels_of_a_dump_are_found() -> None:
    reduce, sums = library.kernels(90, RECORDED)
    assert (reduce.threads, reduce.registers, reduce.stack, reduce.local, reduce.shared) == (256, 56, 8, 0, 8448)
    assert (reduce.instructions.loads, reduce.instructions.stores) == ({2: 1, 16: 1}, {})
    assert (reduce.instructions.local_loads, reduce.instructions.local_stores) == (1, 1)
    assert (sums.threads, sums.registers, sums.shared) == (0, 22, 0)
    assert (sums.instructions.loads, sums.instructions.stores, sums.instructions.counters) == ({4: 1}, {4: 1}, 1)
    assert library.release(RECORDED) == "13.0.88"


def test_shared_memory_is_what_the_kernel_declares() -> None:
    """cuobjdump says 1040 of a kernel that declares 16 bytes from sm_90 on, and 16 before."""
    assert [library.declared(shared, chip) for shared, chip in ((16, 80), (1040, 90), (1040, 100), (0, 90))] == [16, 16, 16, 0]


@pytest.mark.parametrize(
    ("instruction", "counts"),
    [
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU", {"atomics": 1}),
        ("@!P0 ATOM.E.ADD.F16x2.RN.STRONG.GPU", {"atomics": 1}),
        ("RED.E.ADD.F64.RN.STRONG.GPU", {"atomics": 1, "fp64": 1}),
        ("ATOMS.CAST.SPIN", {"atomics": 1}),
        ("ATOMG.E.CAS.STRONG.GPU", {"atomics": 1}),
        ("ATOMG.E.MAX.S32.STRONG.GPU", {"atomics": 1}),
        ("ATOMG.E.ADD.STRONG.GPU", {"atomics": 1, "counters": 1}),
        ("ATOM.E.INC.STRONG.GPU", {"atomics": 1, "counters": 1}),
        ("ATOMS.POPC.INC.32", {"atomics": 1, "counters": 1}),
        ("REDUX.SUM", {}),
        ("DFMA", {"fp64": 1}),
        ("F2F.F64.F32", {"fp64": 1}),
        ("I2F.U64.RP", {}),
        ("UBLKCP.S.G", {"bulk": 1}),
        ("STL.128", {"local_stores": 1}),
        ("LDG.E.ENL2.256", {"loads": {32: 1}}),
        ("LDGSTS.E.BYPASS.128", {"loads": {16: 1}}),
        ("ST.E", {"stores": {4: 1}}),
        ("STG.E.EF.128", {"stores": {16: 1}}),
    ],
)
def test_instructions_are_what_they_are(instruction: str, counts: dict[str, Any]) -> None:
    nothing = counted("        /*0000*/                   EXIT ;\n")
    assert nothing is not None
    assert counted(f"        /*0000*/                   {instruction} R4, R5 ;\n") == replace(nothing, **counts)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN2kd3runINS_6ReduceIN3c108BFloat16EEEEEvT_", "Reduce<bf16>"),
        ("_ZN2kd3runINS_6ReduceIN3c108BFloat16ENS2_4HalfEEEEEvT_", "Reduce<bf16, fp16>"),
        ("_ZN2kd3runINS_6ReduceI13__nv_bfloat16S2_EEEEvT_", "Reduce<bf16, bf16>"),
        ("_ZN2kd3runINS_6ReduceIf6__halfEEEEvT_", "Reduce<fp32, fp16>"),
        ("_ZN2kd3runINS_8GradientINS_3AnyEEEEEvT_", "Gradient<Any>"),
        ("_ZN2kd3runINS_8SumPartsEEEvT_", "SumParts"),
        ("_ZN2kd3runINS_5SpillILb1ELi3EEEEEvT_", "Spill<true, 3>"),
        ("_ZN2kd3runINS_4KindILm8ELNS_4SumsE1EEEEEvT_", "Kind<8, (Sums)1>"),
        ("_ZN2kd3runINS_5OuterINS_5InnerIfEELi2EEEEEvT_", "Outer<Inner<fp32>, 2>"),
        ("_ZN2kd54_GLOBAL__N__def2f601_15_channel_mean_cu_00237855_121358gradientENS0_4WorkE", "gradient"),
    ],
)
def test_kernels_have_the_names_of_their_sources(symbol: str, name: str) -> None:
    assert kernel_name(symbol) == name


def test_what_is_no_symbol_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        kernel_name("a kernel")
    assert str(refused.value) == "no symbol of C++: a kernel"


def test_template_arguments_are_found_at_any_depth() -> None:
    assert arguments("Outer<Inner<fp32>, 2>") == {"Inner", "fp32", "2"} and arguments("SumParts") == set()


@pytest.mark.parametrize(
    ("kernel", "blocks", "warps", "limits"),
    [
        ((80, 256, 32, 0), 8, 100, ("registers", "threads")),
        ((80, 128, 24, 0), 16, 100, ("threads",)),
        ((90, 256, 129, 0), 1, 12.5, ("registers",)),
        ((90, 256, 128, 0), 2, 25, ("registers",)),
        ((80, 256, 32, 48 * 1024), 3, 37.5, ("shared memory",)),
        ((90, 256, 32, 48 * 1024), 4, 50, ("shared memory",)),
        ((100, 32, 16, 0), 32, 50, ("blocks",)),
        ((80, 1024, 96, 0), 0, 0, ("registers",)),
    ],
)
def test_blocks_that_fit(kernel: tuple[int, int, int, int], blocks: int, warps: float, limits: tuple[str, ...]) -> None:
    found = occupancy(*kernel)
    assert (found.blocks, found.warps, found.limits) == (blocks, warps, limits)


ORACLE = """
#include <climits>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int chip, shared_of_chip, threads, registers, shared;
  while (scanf("%d %d %d %d %d", &chip, &shared_of_chip, &threads, &registers, &shared) == 5) {
    cudaOccDeviceProp device;
    device.computeMajor = chip / 10, device.computeMinor = chip % 10, device.warpSize = 32;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048;
    device.numSms = 1;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.sharedMemPerBlock = 48 * 1024, device.sharedMemPerMultiprocessor = shared_of_chip;
    device.sharedMemPerBlockOptin = shared_of_chip - 1024, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = registers, kernel.sharedSizeBytes = shared;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0) != CUDA_OCC_SUCCESS) return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_nvcc
def test_blocks_that_fit_are_those_of_the_toolkit(tmp_path: Path) -> None:
    source, program = tmp_path / "oracle.cpp", tmp_path / "oracle"
    source.write_text(ORACLE)
    subprocess.run([str(NVCC), "-cudart", "none", str(source), "-o", str(program)], check=True, capture_output=True)
    kernels = list(product(SHARED, (32, 96, 128, 160, 256, 512, 672, 1024), range(8, 256, 5), (0, 16, 1000, 8448, 20000, 48 * 1024)))
    lines = [f"{chip} {SHARED[chip]} {threads} {registers} {shared}\n" for chip, threads, registers, shared in kernels]
    done = subprocess.run([str(program)], input="".join(lines), check=True, capture_output=True, text=True)
    assert [occupancy(*kernel).blocks for kernel in kernels] == list(map(int, done.stdout.split()))


def recorded(**changes: Any) -> dict[str, Any]:
    """Results with one kernel, which keeps within all ceilings but for the changes."""
    kernel = next(iter(library.kernels(90, RECORDED)))
    (made,) = run.records([replace(kernel, stack=0, instructions=replace(kernel.instructions, local_loads=0, local_stores=0))])
    made_by = {"schema": 1, "commit": None, "dirty": None, "time": "2026-01-01", "nvcc": "1.2", "torch": None}
    return {**made_by, "kernels": [{**made, **changes}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"kernel": "SumParts", "loads": {}}, None),
        ({"kernel": "Gradient<bf16>", "stores": {"16": 1}}, None),
        ({"stack": 8}, "8 bytes of stack a thread"),
        ({"local": 4}, "4 bytes of local memory a thread"),
        ({"local_loads": 1, "local_stores": 2}, "3 instructions on local memory"),
        ({"fp64": 1}, "1 instructions in fp64"),
        ({"atomics": 2}, "2 atomic instructions on values"),
        ({"registers": 129}, "129 registers a thread, more than 128"),
        ({"threads": 0, "blocks": None}, "no launch bounds, or a function that was not inlined"),
        ({"blocks": 0}, "a block does not fit a multiprocessor"),
        ({"loads": {"2": 8, "4": 8}}, "no loads of 16 bytes"),
        ({"kernel": "Gradient<bf16>", "stores": {"2": 8}}, "no stores of 16 bytes"),
    ],
)
def test_every_ceiling_is_noticed(changes: dict[str, Any], said: str | None) -> None:
    results = recorded(**changes)
    (name,) = (kernel["kernel"] for kernel in results["kernels"])
    assert broken(results) == ([] if said is None else [f"{name}, sm_90: {said}"])


@pytest.mark.parametrize("chip", SHARED)
def test_spills_count_on_the_chips_that_the_page_names(chip: int) -> None:
    results = recorded(capability=chip, stack=8)
    assert bool(broken(results)) == (f"sm_{chip}" in page(results).partition("no stack and no spills for")[2].partition(";")[0])


def test_what_several_files_have_is_told_once() -> None:
    reduce, sums = library.kernels(90, RECORDED)
    assert [made["kernel"] for made in run.records([sums, reduce, reduce])] == ["Reduce<bf16>", "SumParts"]
    with pytest.raises(ValueError, match="two different kernels are called Reduce<bf16>, sm_90"):
        run.records([reduce, replace(reduce, registers=57)])


def test_chips_stand_side_by_side() -> None:
    results = recorded()
    results["kernels"].append({**results["kernels"][0], "capability": 100, "registers": 48, "limits": ["registers", "threads"]})
    (row,) = table(results).rows
    assert row[:4] == ["`Reduce<bf16>`", "256", "56 / 48", "8448"] and "registers / registers, threads" in row
    assert "| `Reduce<bf16>` | 256 | 56 / 48 |" in page(results) and "sm_90, sm_100, in this order" in page(results)


def test_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "_C_cuda.so", tmp_path / "new" / "native-codegen.json"
    words = ["native-codegen", "--library", str(file)]
    assert main(words) == 2 and "no such file" in capsys.readouterr().err
    file.write_bytes(b"")
    monkeypatch.setattr(run, "inspected", lambda _: recorded())
    assert main([*words, "--output", str(output)]) == 0 and "`Reduce<bf16>`" in capsys.readouterr().out
    assert json.loads(output.read_text()) == recorded()
    monkeypatch.setattr(run, "inspected", lambda _: recorded(fp64=1))
    assert main(words) == 1 and "exceeded: Reduce<bf16>, sm_90: 1 instructions in fp64" in capsys.readouterr().err
    monkeypatch.setattr(run, "inspected", lambda _: {**recorded(), "kernels": []})
    assert main(words) == 2 and "_C_cuda.so has no kernels for sm_80" in capsys.readouterr().err
    monkeypatch.setattr(native, "library", lambda kind: native.Library(None, f"no _C_{kind}"))
    assert main(["native-codegen"]) == 2 and "no _C_cuda" in capsys.readouterr().err


def test_without_cuobjdump_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(library, "find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    (tmp_path / "_C_cuda.so").write_bytes(b"")
    assert main(["native-codegen", "--library", str(tmp_path / "_C_cuda.so")]) == 2
    assert "there is no cuobjdump" in capsys.readouterr().err


def committed() -> dict[str, Any]:
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


def known(results: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(kernel["kernel"], kernel["capability"]): kernel for kernel in results["kernels"]}


def test_the_committed_numbers_keep_within_the_ceilings() -> None:
    results = committed()
    assert broken(results) == []
    names = {kernel["kernel"] for kernel in results["kernels"]}
    assert known(results).keys() == set(product(names, SHARED))
    assert {way for kernel in results["kernels"] for way in streams(kernel)} == {"loads", "stores"}


def test_the_page_is_that_of_the_committed_file() -> None:
    assert (ROOT / "docs" / "benchmarks" / "native-codegen.md").read_text(encoding="utf-8") == page(committed()), REMEDY


def wanted_chips(listed: str) -> set[int]:
    """Those of the table that a build has to have kernels for. listed: what it is asked for, as TORCH_CUDA_ARCH_LIST has it, or nothing."""
    asked = {int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", listed)}
    return asked & SHARED.keys() if asked else set(WITHOUT_SPILLS)


@pytest.mark.parametrize(("listed", "chips"), [("", {80, 90}), ("9.0", {90}), ("8.0;10.0+PTX 12.0", {80, 100}), ("9.0a", {90})])
def test_a_build_may_have_been_asked_for_fewer_chips(listed: str, chips: set[int]) -> None:
    assert wanted_chips(listed) == chips


@needs_nvcc
def test_the_library_that_is_built_here_is_that_of_the_committed_file() -> None:
    """With the same nvcc and torch the numbers are the same; with others they may differ, within the ceilings."""
    file, reason = native.library("cuda")
    assert file is not None, f"nvcc is here, but {reason}"
    mine, theirs = run.inspected(file), committed()
    chips = {kernel["capability"] for kernel in mine["kernels"]}
    missing = wanted_chips(os.environ.get("TORCH_CUDA_ARCH_LIST", "")) - chips
    assert not missing, f"no kernels for {missing}: build again, or set TORCH_CUDA_ARCH_LIST as it was when this was built"
    fresh, old = known(mine), {key: kernel for key, kernel in known(theirs).items() if key[1] in chips}
    assert fresh and fresh.keys() == old.keys(), REMEDY
    assert broken(mine) == []
    same = [(one["nvcc"], str(one["torch"]).partition("+")[0]) for one in (mine, theirs)]
    for key, kernel in fresh.items():
        if same[0] == same[1]:
            assert kernel == old[key], REMEDY
        assert kernel["registers"] <= old[key]["registers"] + LITTLE, f"{key}: many more registers than in the committed file; {REMEDY}"
