"""`kdkernels bench codegen`: what is told of compiled kernels is true, ceilings are noticed, and the committed page is that of its file."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.cli import main
from benchmarks.codegen import run, worker
from benchmarks.codegen.capture import Launch, recorded, variants
from benchmarks.codegen.ceilings import broken
from benchmarks.codegen.merge import Unmergeable, merged
from benchmarks.codegen.ptx import Program
from benchmarks.codegen.rows import record
from benchmarks.codegen.table import page, tables
from benchmarks.registry import Case
from kdkernels.triton import launch as launch_parameters

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "codegen.json"
REMEDY = (
    "run: kdkernels bench codegen --output benchmarks/results/codegen.json && python -m benchmarks.report.tables; where only some "
    "operators have changed, --operator NAMES --merge benchmarks/results/codegen.json instead of --output"
)


def _scaled(x, out, ends, sizes, factor, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    """Two levels; whole 16-byte vectors where a level's size is a multiple of 4."""
    program = tl.program_id(0)
    source, target, size, first = x[0], out[0], sizes[0], 0
    if program >= ends[0]:
        source, target, size, first = x[1], out[1], sizes[1], ends[0]
    start = (program - first) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if size % 4 == 0:
        size = size // 4 * 4
        value = tl.load(source + offset, offset < size, 0.0)
        tl.store(target + offset, value * factor, offset < size)
    else:
        exact = tl.load(source + offset, offset < size, 0.0).to(tl.float64 if DOUBLE else tl.float32)
        tl.store(target + offset, (exact * exact * exact * factor).to(tl.float32), offset < size)


def _summed(x, out, size, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(out + offset, tl.load(x + offset, offset < size, 0.0) + size)


# Not by triton.jit, which makes a kernel that is interpreted where the tests run without a GPU.
scaled, summed, free = JITFunction(_scaled), JITFunction(_summed), JITFunction(_summed, do_not_specialize=["size"])


def launch_scaled(sizes: tuple[int, int] = (4000, 1001), double: bool = False) -> list[Tensor]:
    """Levels (1, 1, 1, size) times 2, in one launch of 1024 elements a program."""
    x = [torch.empty(1, 1, 1, size) for size in sizes]
    out = [torch.empty_like(level) for level in x]
    first = -(-sizes[0] // 1024)
    ends = (first, first - (-sizes[1] // 1024))
    scaled[(ends[1],)](tuple(x), tuple(out), ends, sizes, 2.0, BLOCK=1024, DOUBLE=double, num_warps=4)
    return out


def captured(capability: int = 90, double: bool = False) -> Launch:
    with recorded(capability) as launches:
        launch_scaled(double=double)
    (launch,) = launches
    return launch


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Every kernel, those that read features in one type, for one chip. By the launchers of kdkernels, in a process of its own.

    All types and chips take twenty minutes; they are in the committed file, whose ceilings are checked too.
    """
    return run.compiled([90], dtypes=["bf16"])


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_launch_is_compiled_for_a_gpu_that_is_not_there(capability: int) -> None:
    launch = captured(capability)
    assert (launch.kernel, launch.grid, launch.constants) == ("test_codegen.scaled", (5,), {"BLOCK": 1024, "DOUBLE": False})
    assert launch.seconds > 0 and launch.compiled is not None and launch.compiled.metadata.target.arch == capability


def test_widths_are_those_of_the_body_that_a_level_takes() -> None:
    """1024 elements of 128 threads: two vectors of 16 bytes a thread, or eight elements."""
    found = record(captured(), 90, "contiguous")
    wide, narrow = found["levels"]
    assert (wide["shape"], wide["loads"], wide["stores"]) == ([1, 1, 1, 4000], {"16": 2}, {"16": 2})
    assert (narrow["shape"], narrow["loads"], narrow["stores"]) == ([1, 1, 1, 1001], {"4": 8}, {"4": 8})
    assert found["machine"] == found["text"] == {"loads": {"4": 8, "16": 2}, "stores": {"4": 8, "16": 2}}
    assert (found["local"], found["fp64"], found["atomics"], found["unknown"], found["axes"]) == (0, 0, 0, 0, 0)
    assert 8 < found["registers"] < 64 and (found["dtype"], found["layout"]) == ("fp32", "contiguous")


def test_fp64_and_spills_are_seen() -> None:
    launch = captured(double=True)
    assert record(launch, 90, "contiguous")["fp64"] > 0
    with recorded(90) as launches:
        summed[(1,)](torch.empty(8192), torch.empty(8192), 5000, BLOCK=8192, num_warps=1, maxnreg=24)
    found = record(launches[0], 90, "contiguous")
    assert found["local"] > 0 and found["registers"] <= 24


def test_a_version_is_compiled_once_and_variants_compile_none() -> None:
    with recorded(90) as launches:
        launch_scaled()
        launch_scaled()
    assert launches[0].compiled is launches[1].compiled and launches[1].seconds == 0.0 and launches[0].key == launches[1].key
    x = torch.empty(4096)
    calls = [lambda size=size, kernel=kernel: kernel[(1,)](x, x, size, BLOCK=1024) for kernel in (summed, free) for size in (1, 16, 17, 35)]
    assert [len(variants(some)["test_codegen.summed"]) for some in (calls[:4], calls[4:])] == [3, 1]
    with recorded(90, lambda kernel: False) as launches:
        launch_scaled()
    assert launches[0].compiled is None


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2
)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b32 	%r1, [kernel_param_2];
	mov.u32 	%r2, %ctaid.x;
	mov.u32 	%r3, %tid.x;
	setp.eq.b32 	%p1, %r2, 7;
	selp.b64 	%rd3, %rd2, %rd1, %p1;
	mad.wide.s32 	%rd4, %r3, 4, %rd3;
	rem.s32 	%r4, %r1, 4;
	setp.ne.b32 	%p2, %r4, 0;
	setp.lt.s32 	%p3, %r3, %r1;
	mov.b32 	%r9, 0;
	@%p2 bra 	$L__BB0_2;
$L__BB0_1:                              // the loop's number of turns is known to nobody here
	@%p3 ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd4 + 0 ];
	add.s32 	%r9, %r9, 1;
	setp.lt.s32 	%p4, %r9, %r5;
	@%p4 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_3;
$L__BB0_2:
	@!%p2 ld.global.b16 { %rs1 }, [ %rd4 + 0 ];
	ld.global.b32 	%r5, [%rd4+4];
$L__BB0_3:
	setp.gt.s32 	%p5, %r9, 100;
	@%p5 st.global.v2.b64 [ %rd2 + 16 ], { %rd4, %rd4 };
	ret;
}
"""


@pytest.mark.parametrize(
    ("size", "program", "wanted"),
    [
        (16, 0, {(False, 16, 0): 1, (True, 16, 1): 1}),
        (16, 7, {(False, 16, 1): 1, (True, 16, 1): 1}),
        (-3, 0, {(False, 4, 0): 1}),
    ],
)
def test_only_what_the_arguments_let_a_program_reach_is_counted(size: int, program: int, wanted: dict[tuple[bool, int, int], int]) -> None:
    """Behind the loop its counter is unknown, so the store may happen; without the loop it is 0, so it does not."""
    found = Program(PTX).accesses([frozenset({0}), frozenset({1}), size], program)
    assert Counter((access.store, access.bytes, *access.arguments) for access in found) == wanted


def test_everything_in_the_text_is_counted() -> None:
    assert sorted(access.bytes for access in Program(PTX).all_accesses()) == [2, 4, 16, 16]


@pytest.mark.parametrize(("size", "index", "wanted"), [(-1, "%r10", {16}), (1, "%r10", set()), (1, "%r3", {4, 16})])
def test_a_table_of_jumps_is_followed(size: int, index: str, wanted: set[int]) -> None:
    """To the loop, to the end, or, where the thread decides, to everything."""
    table = "$L_brx_0: .branchtargets\n\t$L__BB0_1,\n\t$L__BB0_2,\n\t$L__BB0_3;\n"
    jump = f"{table}\tadd.s32 \t%r10, %r1, 1;\n\tbrx.idx \t{index}, $L_brx_0;\n"
    found = Program(PTX.replace("\t@%p2 bra \t$L__BB0_2;\n", jump)).accesses([frozenset({0}), frozenset({1}), size], 0)
    assert {access.bytes for access in found} == wanted


def results(compiled: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The results with one field of every kernel or operator changed."""
    found = copy.deepcopy(compiled)
    for part in (*found["kernels"], *found["operators"]):
        part.update({name: value for name, value in changes.items() if name in part})
    return found


def test_every_kernel_keeps_within_the_ceilings(compiled: dict[str, Any]) -> None:
    committed = json.loads(COMMITTED.read_text())
    known = [{kernel["kernel"] for kernel in one["kernels"] if kernel["capability"] == 90} for one in (compiled, committed)]
    assert known[0] == known[1], REMEDY
    assert broken(results(compiled, seconds=0.0)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"local": 8}, "8 bytes of spilled registers"),
        ({"fp64": 1}, "1 instructions in fp64"),
        ({"atomics": 2}, "2 atomic instructions"),
        ({"unknown": 3}, "3 accesses to an unknown address"),
        ({"axes": 1}, "1 axes of the grid besides x"),
        ({"registers": 255}, "255 registers a thread"),
        ({"machine": {"loads": {"8": 9}, "stores": {"16": 9}}}, "the assembler has split loads of 16 bytes"),
        ({"variants": 99}, "99 compiled versions, more than"),
        ({"variants": 3}, "3 compiled versions over all sizes and batches, but 2 for one"),
        ({"seconds": 99.0}, "s to compile"),
    ],
)
def test_every_ceiling_is_noticed(compiled: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    problems = broken(results(compiled, **changes))
    assert problems and any(said in problem for problem in problems)


def test_narrow_accesses_are_noticed_where_wide_ones_are_possible(compiled: dict[str, Any]) -> None:
    """fcos levels of 16800, 4200, 1050, 273 and 77 pixels, 256 channels, bf16."""
    found = results(compiled, seconds=0.0, variants=1)
    for kernel in found["kernels"]:
        for level in kernel["levels"] if kernel["dtype"] else ():
            level.update(loads={"2": 8}, stores={"2": 8})
    problems = Counter(problem.split()[0] for problem in broken(found) if "of 2 bytes" in problem)
    reads = [
        len(kernel["levels"]) if kernel["layout"] == "channels_last" else 2
        for kernel in found["kernels"]
        if kernel["kernel"] == "reduce.reduce"
    ]
    writes = [2 * len(kernel["levels"]) for kernel in found["kernels"] if kernel["kernel"] == "gradient.kernel"]
    assert problems == {"reduce.reduce": sum(reads), "gradient.kernel": sum(writes)}


def test_the_exit_code_tells(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "compiled", lambda *_: results(compiled, seconds=0.0))
    file = tmp_path / "new" / "codegen.json"
    assert main(["codegen", "--output", str(file)]) == 0
    assert json.loads(file.read_text()) == results(compiled, seconds=0.0) and "**gradient.kernel" in capsys.readouterr().out
    monkeypatch.setattr(run, "compiled", lambda *_: results(compiled, local=8))
    assert main(["codegen"]) == 1
    assert "bytes of spilled registers" in capsys.readouterr().err
    monkeypatch.setattr(run, "compiled", lambda *_: {**compiled, "kernels": [], "operators": []})
    assert main(["codegen", "--kernel", "nothing"]) == 2


def test_what_cannot_be_compiled_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codegen", "--capability", "7", "--operator", "weighted_channel_sum", "--dtype", "fp32"]) == 1
    assert "Error" in capsys.readouterr().err


def test_kernels_are_compiled_with_the_parameters_of_every_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each size of inputs has its own; where a table has none for a type, the heuristic's are compiled."""
    chosen = {"num_warps": 4, "BLOCK": 64}
    of_sizes = {size: chosen if size == "large" else None for size in launch_parameters.SIZES}
    entries = {f"reduce bf16 contiguous {size}": {"parameters": of_size, "run": 0} for size, of_size in of_sizes.items()}
    table = {"schema": launch_parameters.SCHEMA, "capability": [9, 0], "runs": [{}], "entries": entries}
    monkeypatch.setattr(launch_parameters, "TABLES", tmp_path)
    launch_parameters.path((9, 0)).write_text(json.dumps(table))
    assert worker.tabulated(90, Case(dtype="bf16")) == [{}, {"reduce": chosen}]
    assert worker.tabulated(90, Case(dtype="fp32")) == worker.tabulated(80, Case(dtype="bf16")) == [{}]


def known(kernel: dict[str, Any]) -> str:
    return json.dumps(
        [kernel[name] for name in ("kernel", "capability", "dtype", "layout", "given", "flags", "parameters")], sort_keys=True
    )


def test_the_committed_numbers_are_those_of_this_code(compiled: dict[str, Any]) -> None:
    """Compiled anew by the same Triton they are the same; by another they may differ, within the ceilings."""
    committed = json.loads(COMMITTED.read_text())
    mine = {known(kernel): kernel for kernel in committed["kernels"]}
    fresh = {known(kernel): kernel for kernel in compiled["kernels"]}
    assert fresh.keys() <= mine.keys(), REMEDY
    if committed["versions"]["triton"] == compiled["versions"]["triton"]:
        for key, kernel in fresh.items():
            assert {**kernel, "seconds": 0} == {**mine[key], "seconds": 0}, REMEDY


def test_the_committed_numbers_are_of_these_sources() -> None:
    """Of all chips and types, also where compiling for one chip and one type shows nothing."""
    assert json.loads(COMMITTED.read_text())["sources"] == run.sources(), REMEDY


def test_sources_are_names_and_contents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "KERNELS", tmp_path)
    found = []
    for name, text in (("a.py", "1"), ("b.py", ""), ("a.py", "2"), ("c.txt", "no source")):
        (tmp_path / name).write_text(text)
        found.append(run.sources())
    (tmp_path / "b.py").rename(tmp_path / "d.py")
    assert len({*found, run.sources()}) == 4 and found[2] == found[3]


def results_of(sources: str, **operators: list[dict[str, Any]]) -> dict[str, Any]:
    """Operators, each with one call that launches these kernels."""
    kernels: list[dict[str, Any]] = []
    for kernel in (kernel for some in operators.values() for kernel in some):
        kernels += [kernel] if kernel not in kernels else []
    fields = {"options": "", "capability": 90, "dtype": "", "layout": "", "variants": None}
    calls = [{"operator": name, **fields, "kernels": [*map(kernels.index, some)]} for name, some in operators.items()]
    return {"versions": {"triton": "3.6.0"}, "cpu": f"of {sources}", "sources": sources, "kernels": kernels, "operators": calls}


def one_kernel(name: str, registers: int = 8, seconds: float = 1.0) -> dict[str, Any]:
    known = {"kernel": name, "capability": 90, "dtype": "", "layout": "", "given": [], "flags": {}, "parameters": {}}
    return {**known, "registers": registers, "seconds": seconds}


def test_some_operators_compiled_anew_take_the_place_of_the_old() -> None:
    a, b, c, d, shared = (one_kernel(name) for name in ("a", "b", "c", "d", "shared"))
    whole = results_of("old", one=[shared, a], two=[shared, b, c], three=[d])
    renewed = one_kernel("b", registers=9)
    part = results_of("new", two=[one_kernel("new"), {**shared, "seconds": 5.0}, renewed], four=[one_kernel("last")])
    found = merged(whole, part)
    assert (found["sources"], found["cpu"]) == ("new", "of old")
    assert [call["operator"] for call in found["operators"]] == ["one", "two", "three", "four"]
    # Not c, which nobody launches; what is the same is as it was.
    assert found["kernels"] == [shared, a, d, one_kernel("new"), renewed, one_kernel("last")]
    assert [call["kernels"] for call in found["operators"]] == [[0, 1], [0, 3, 4], [2], [5]]
    committed = json.loads(COMMITTED.read_text())
    of = [call for call in committed["operators"] if call["operator"] == "shared_read"]
    places = sorted({place for call in of for place in call["kernels"]})
    calls = [{**call, "kernels": [places.index(place) for place in call["kernels"]]} for call in of]
    again = {**committed, "kernels": [committed["kernels"][place] for place in places], "operators": calls}
    assert merged(committed, again) == committed


def test_what_concerns_other_operators_too_is_not_merged() -> None:
    whole = results_of("old", one=[one_kernel("shared")], two=[one_kernel("shared")])
    part = results_of("new", two=[one_kernel("shared", registers=9)])
    with pytest.raises(Unmergeable, match="other operators launch shared too, which has changed: name them as well"):
        merged(whole, part)
    with pytest.raises(Unmergeable, match=r"the rest is by Triton 3.6.0, this by 4: compile all of it"):
        merged(whole, {**part, "versions": {"triton": "4"}})


def test_merging_takes_whole_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, committed = tmp_path / "codegen.json", json.loads(COMMITTED.read_text())
    file.write_text(run.to_json({**committed, "sources": "old"}))
    monkeypatch.setattr(run, "compiled", lambda *_: {**committed, "sources": "new"})
    for wanted in ([], ["--operator", "gkd", "--dtype", "bf16"], ["--operator", "gkd", "--capability", "90"]):
        assert main(["codegen", *wanted, "--merge", str(file)]) == 2
    assert json.loads(file.read_text())["sources"] == "old" and "name them by --operator" in capsys.readouterr().err
    assert main(["codegen", "--operator", "gkd", "--merge", str(file)]) == 0
    assert file.read_text() == run.to_json({**committed, "sources": "new"})
    monkeypatch.setattr(run, "compiled", lambda *_: {**committed, "versions": {"triton": "4"}})
    assert main(["codegen", "--operator", "gkd", "--merge", str(file)]) == 1
    assert "compile all of it" in capsys.readouterr().err


def test_the_committed_numbers_keep_within_the_ceilings() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert broken(committed) == []
    assert {kernel["capability"] for kernel in committed["kernels"]} == set(run.CAPABILITIES)


def test_the_page_is_that_of_the_committed_file() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert (ROOT / "docs" / "benchmarks" / "codegen.md").read_text() == page(committed), REMEDY
    rows = sum(len(table.rows) for table in tables(committed)[:-1])
    assert rows * len(run.CAPABILITIES) >= len(committed["kernels"])
