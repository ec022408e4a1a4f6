"""Build, test and measure on a machine with a GPU: `scripts/gpu_suite.sh OUT [--full | --smoke | --part NAME,NAME,...]`.

Runs every part whatever becomes of the others. The quick form ends within nine minutes; --full measures every entry and takes hours;
--smoke shows, with or without a GPU, that the suite itself works (the tests that need no GPU are collected only). --part runs those of
`PARTS` that are named, in their order, within nine and a half minutes. Leaves in OUT:

    suite.json                     every part's status and seconds, the machine, the tests that ran and those that were left out and why
    suite.log                      what the parts printed
    junit-gpu.xml                  the tests marked `gpu`;   junit-gpu-alone.xml: those of them that need the GPU for themselves
    junit-cpu.xml                  the tests of primitives and of the harness
    kernels.jsonl, steps.jsonl     measurements
    speed-of-light.md              how far they are from the copy bandwidth, and what was predicted of them
    ncu-*.csv, traffic-*.md        memory traffic by Nsight Compute, where it can run
    choices-*.json, tables-*.json  copies of the tables that `choose` and `tune` have filled in kdkernels
    codegen.json                   what the compiler makes of the Triton kernels (--full)

What compute-sanitizer finds is in the log. Exit code: 0 when all that is required passed, 1 when not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from suite_runner import ROOT, Part, Suite, find_tool

SECONDS = {"quick": 535.0, "parts": 570.0, "smoke": 300.0, "full": 24 * 3600.0}
#: In the order in which they run. Those that write tables into kdkernels, or are in what `kernels` measures, run only when they are named.
PARTS = ("build", "tests", "kernels", "figures", "traffic", "choose", "tune", "sanitizers")
USUAL = {"quick": ("build", "tests", "kernels", "sanitizers"), "smoke": ("build", "tests", "kernels", "traffic", "sanitizers")}
USUAL["full"] = USUAL["smoke"]
#: compute-sanitizer's exit code for what it found in the code, as against being unable to work.
FOUND = 99
#: Its tools: accesses out of bounds, hazards in shared memory, reads of what was never written.
SANITIZERS = ("memcheck", "racecheck", "initcheck")
#: Tests that measure times or fill the memory: nothing else may use the GPU meanwhile.
ALONE = ("test_bench_measure.py", "test_choice.py", "test_gpu_large.py", "test_tune.py")
#: For the other GPU tests, most of whose time goes into compiling some 800 versions of Triton kernels.
PROCESSES = min(16, os.cpu_count() or 1)
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "--continue-on-collection-errors"]
BENCH = [sys.executable, "-m", "benchmarks"]
#: As in a training step of eight images.
STEP = ["--case", "fcos", "--batch", "8", "--dtype", "bf16"]

ENVIRONMENT = """
import json, platform
from importlib import metadata
import torch
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
cuda = torch.cuda.is_available()
print(json.dumps({
    "python": platform.python_version(), "platform": platform.platform(), "cuda": torch.version.cuda,
    "device": torch.cuda.get_device_name() if cuda else None,
    "capability": list(torch.cuda.get_device_capability()) if cuda else None,
    **{name: version(name) for name in ("torch", "torchvision", "triton", "numpy", "pytest", "hypothesis")},
}))
"""

#: Modules that tests may need and a GPU machine may lack.
OPTIONAL = [
    *("accelerate", "build", "hypothesis", "jinja2", "matplotlib", "PIL"),
    *("pybind11", "pycocotools", "rich", "setuptools", "typer", "yaml"),
]

#: Imports each test file and says which need an optional package that is not here. Any other error is left to pytest, which fails with it.
LEFT_OUT = """
import importlib.util, json, pathlib, sys
root, optional = pathlib.Path(sys.argv[1]), sys.argv[2:]
sys.path[:0] = [str(root / "tests"), str(root)]
found = {}
for path in sorted((root / "tests").glob("test_*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in optional:
            found[path.name] = "needs " + error.name
    except BaseException:
        pass
print(json.dumps(found))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description="Build, test and measure on a machine with a GPU.")
    parser.add_argument("out", type=Path, help="folder for the results")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--full", dest="form", action="store_const", const="full", default="quick", help="every entry: hours")
    form.add_argument("--smoke", dest="form", action="store_const", const="smoke", help="shows that the suite works, with or without a GPU")
    form.add_argument("--part", dest="names", type=named, metavar="NAME", help=f"comma list of {', '.join(PARTS)}")
    arguments = parser.parse_args(argv)
    names, shape = (arguments.names, "parts") if arguments.names else (USUAL[arguments.form], arguments.form)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # A job that a shell started in the background ignores it, and so would the parts, which are ended by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        suite = Suite(out, Path(scratch), shape, SECONDS[shape])
        gpu = look_around(suite, shape)
        capability = suite.report["environment"].get("capability")
        device, small = "cuda" if gpu else "cpu", shape == "smoke" or not gpu
        made: dict[str, Callable[[], list[Part]]] = {
            "build": lambda: native_library(shape, capability),
            "tests": lambda: tests(out, shape, find_tests(suite)),
            "kernels": lambda: measurements(out, "smoke" if small else shape, device),
            "figures": lambda: figures(out, gpu),
            "traffic": lambda: memory_traffic(out, gpu),
            "choose": lambda: choices(capability),
            "tune": lambda: tuning(capability),
        }
        for name in made:
            for part in made[name]() if name in names else ():
                suite.run(part)
        if "sanitizers" in names:
            # Side by side: they measure nothing, and most of their time is the start of Python under the tool.
            suite.run(*sanitizers(shape, gpu, Path(scratch)))
        return suite.finish()


def named(text: str) -> list[str]:
    """An argparse type: names of parts with commas between them."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    return names


def longer(form: str, quick: float) -> float:
    """Seconds of a part that in the quick form, where all parts have to end in time, has `quick` of them."""
    return {"full": 1800.0, "parts": 2 * quick}.get(form, quick)


def look_around(suite: Suite, form: str) -> bool:
    """Records the machine; whether it has a GPU that torch can use."""
    begin = time.monotonic()
    found = suite.ask(ENVIRONMENT, limit=60)
    suite.report["environment"] = found
    reason = found.get("error", "" if found.get("device") else "torch finds no CUDA device: nothing below is about a GPU")
    bad = "error" in found or (bool(reason) and form != "smoke")
    suite.record("environment", "failed" if bad else "passed", reason, time.monotonic() - begin, required=True)
    return bool(found.get("device"))


def native_library(form: str, capability: list[int] | None) -> list[Part]:
    """Built by name, because `auto` leaves out what fails to compile: on a GPU its kernels too, for that GPU only.

    capability: of the GPU; None where there is none
    """
    sources = [path for pattern in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(pattern)]
    absent = "" if sources else "csrc has no sources"
    if not absent and importlib.util.find_spec("setuptools") is None:
        absent = "setuptools is not installed"
    command, no_nvcc = [sys.executable, "setup.py", "build_ext", "--inplace"], without_nvcc()
    environment = {"KDKERNELS_BUILD": "cpu"}
    if capability and not no_nvcc:
        here = ".".join(map(str, capability))
        environment = {"KDKERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or here}
    parts = [Part("native library", command, 1800 if form == "smoke" else longer(form, 110), absent=absent, environment=environment)]
    return [*parts, *([Part("native library's CUDA kernels", [], 0, absent=no_nvcc)] if capability and no_nvcc else [])]


def without_nvcc() -> str:
    """Why there are no native kernels on this machine's GPU; "" when they can be compiled."""
    return "" if find_tool("nvcc") else "nvcc, CUDA's compiler, is not installed"


def find_tests(suite: Suite) -> list[Path]:
    """The test files whose packages are here; the others are recorded."""
    begin = time.monotonic()
    left_out: dict[str, Any] = suite.ask(LEFT_OUT, str(ROOT), *OPTIONAL, limit=90)
    suite.report["tests_left_out"] = left_out
    reason = "; ".join(f"{name} left out: {why}" for name, why in left_out.items())
    suite.record("test files", "failed" if "error" in left_out else "passed", reason, time.monotonic() - begin, required=True)
    return [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in left_out]


def tests(out: Path, form: str, files: list[Path]) -> list[Part]:
    """The tests that need a GPU, and those that may find something on another machine: of the primitives and of how is measured."""
    primitives = {f"test_{path.stem}.py" for path in (ROOT / "kdkernels" / "ops").glob("*.py")}
    instruments = {"test_bench_gate.py", "test_bench_measure.py", "test_registry.py"}
    measured = [path for path in files if path.name in primitives | instruments]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    alone = [path for path in files if path.name in ALONE]
    # Each kernel by itself, with all its options; marked in what they import.
    marks = "from triton_support import DEVICES", "from all_kernels import"
    kernels = [path for path in files if any(mark in texts[path] for mark in marks)]
    whole = [path for path in files if "mark.gpu" in texts[path] and path not in (*alone, *kernels)]
    parallel = importlib.util.find_spec("xdist") is not None
    absent = "" if parallel or form != "quick" else "pytest-xdist is not installed, and one process takes minutes: --full runs them"
    # Named, as plugins may be told not to load by themselves.
    spread = ["-p", "xdist", "-n", str(PROCESSES)] if parallel and form != "smoke" else []
    collect = ["--collect-only", "-q"] if form == "smoke" else []

    def part(name: str, limit: float, chosen: list[Path], junit: str, *options: str) -> Part:
        missing = "" if chosen else "all of them need packages that are not here"
        left = out / f"{junit}.xml"
        command = [*PYTEST, *options, f"--junitxml={left}", *map(str, chosen)]
        return Part(name, command, longer(form, limit), absent=missing, junit=left)

    gpu = whole if absent else [*whole, *kernels]
    parts = [
        part("GPU tests", 110, gpu, "junit-gpu", "-m", "gpu", *spread),
        part("GPU tests that run alone", 55, alone, "junit-gpu-alone", "-m", "gpu"),
        part("primitive and harness tests", 30, measured, "junit-cpu", "-m", "not gpu", *spread, *collect),
    ]
    return [*parts, *([Part("tests of single Triton kernels", [], 0, absent=absent)] if absent else [])]


def measurements(out: Path, form: str, device: str) -> list[Part]:
    kernels, steps = out / "kernels.jsonl", out / "steps.jsonl"
    on = ["--device", device]
    if form == "full":
        runs = [("kernels", ["--full", "--batch", "8", "--channels", "256", "--boxes", "20"], 20 * 3600.0)]
        step, limit = ["--pair", "fcos-r101-r50,fcos-r101-r18,frcnn-r101-r50,frcnn-r101-r18", "--batch", "8", "--amp", "bf16"], 2 * 3600.0
    elif form in ("quick", "parts"):
        # torch.compile needs most of the time: it has its turn with the whole call at the size that is quoted, the others with everything.
        # compile-max, which needs minutes, is for the full form.
        quoted = ["--entry", "gkd_bmfi", "--case", "fcos", "--batch", "8", "--dtype", "bf16", "--mode", "backward,inline"]
        who = ["--provider", "paper,eager,compile,reference,triton,native"]
        without_compiler = ["--provider", "paper,eager,reference,triton,native"]
        runs = [
            ("kernels, whole call", [*quoted, *who, "--seconds", "0.5"], 55),
            ("kernels, quick grid", ["--quick", "--mode", "forward,backward", *without_compiler, "--seconds", "0.1"], 30),
        ]
        step, limit = ["--pair", "fcos-r101-r50", "--batch", "8", "--amp", "bf16", "--loss", "gkd_bmfi", "--rounds", "3"], 25
        step += ["--provider", "eager,reference,triton,native"]
    else:
        tiny = ["--case", "tiny", "--batch", "1", "--channels", "64", "--mode", "backward", "--seconds", "0.1"]
        runs = [("kernels", ["--entry", "feature_imitation", "--provider", "eager,reference", *tiny], 60)]
        step, limit = ["--pair", "fcos-small", "--batch", "1", "--loss", "bmfi", "--provider", "reference", "--rounds", "1"], 60
    code = Part("compiled code", [*BENCH, "codegen", "--output", str(out / "codegen.json")], limit=1800)
    return [
        *(Part(name, [*BENCH, *options, *on, "--output", str(kernels)], limit, result=kernels.name) for name, options, limit in runs),
        speed_of_light(kernels),
        Part("training steps", [*BENCH, "step", *step, *on, "--output", str(steps)], limit, result=steps.name),
        *([code] if form == "full" else []),
    ]


def speed_of_light(kernels: Path) -> Part:
    return Part("speed of light", [*BENCH, "speed-of-light", "--input", str(kernels)], limit=10, output="speed-of-light.md")


def figures(out: Path, gpu: bool) -> list[Part]:
    """What docs/cuda.md asks for, at the size that it is asked for; torch.compile, which compiles for minutes, comes last."""
    kernels, absent = out / "kernels.jsonl", "" if gpu else "there is no GPU"
    ours, modes = ["--provider", "triton,native"], ["--mode", "backward,inline"]
    runs = [
        # One process, as each asks first what an import takes; the one launch last, as what fails on a GPU takes what follows with it.
        ("kernels", ["--entry", "feature_imitation,gkd_bmfi,terms_persistent", *modes, *STEP, *ours], 130),
        ("host time at tiny", ["--case", "tiny", *modes, *ours], 40),
        ("torch.compile", [*modes, *STEP, "--provider", "compile,native"], 75),
        ("torch.compile with autotuning", [*modes, *STEP, "--provider", "compile-max,native"], 110),
    ]
    parts = [
        Part(f"figures, {name}", [*BENCH, *options, "--output", str(kernels)], limit, absent=absent, result=kernels.name)
        for name, options, limit in runs
    ]
    return [*parts, replace(speed_of_light(kernels), limit=20, absent=absent)]


def memory_traffic(out: Path, gpu: bool) -> list[Part]:
    """The profiler over a call of GKD + BMFI, by passes and in one launch, of the native kernels: what has to fall from 7 units to 5."""
    program = find_tool("ncu")
    absent = "" if gpu else "there is no GPU"
    absent = absent or ("" if program else "ncu is not installed") or without_nvcc()
    metrics = "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum"
    # The clocks stay as they are: bytes do not depend on them, and to set them takes rights.
    options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--print-units", "base", "--metrics", metrics]
    parts = []
    for name, entry in (("passes", "gkd_bmfi"), ("one launch", "terms_persistent")):
        log, call = out / f"ncu-{entry}.csv", [*BENCH, "traffic", "--entry", entry, *STEP]
        counting = [program or "ncu", *options, "--log-file", str(log), *call]
        parts += [
            Part(f"memory traffic, {name}", counting, 60, required=False, absent=absent, found=FOUND),
            Part(
                f"memory traffic, table of {name}",
                [*call, "--input", str(log)],
                20,
                required=False,
                absent=absent,
                output=f"traffic-{entry}.md",
                found=FOUND,
            ),
        ]
    return parts


def choices(capability: list[int] | None) -> list[Part]:
    """`kdkernels bench choose` where most depends on it: GKD + BMFI at real sizes, then the other primitives. What is there is kept."""
    usual = ["--dtype", "bf16,fp32", "--layout", "contiguous"]
    runs = [
        ("passes", ["--primitive", "terms,terms_vjp", "--case", "fcos,frcnn", *usual], 240),
        ("one launch", ["--primitive", "terms_persistent", "--case", "fcos", *usual], 200),
        ("the others", usual, 480),
    ]
    return [filling(f"choice, {name}", ["choose", *options], limit, "choices", capability) for name, options, limit in runs]


def tuning(capability: list[int] | None) -> list[Part]:
    """`kdkernels bench tune` for the sizes of a training step. What is there is kept."""
    options = ["--dtype", "bf16,fp32", "--layout", "contiguous", "--case", "frcnn,fcos"]
    return [filling("launch parameters", ["tune", *options], 540, "triton/tables", capability)]


def filling(name: str, command: list[str], limit: float, folder: str, capability: list[int] | None) -> Part:
    """A part that fills the table of the GPU that is there in this folder of kdkernels."""
    absent = "" if capability else "there is no GPU"
    table = ROOT / "kdkernels" / folder / f"sm_{''.join(map(str, capability or []))}.json"
    return Part(name, [*BENCH, *command], limit, absent=absent, result=str(table))


def small_tests(backend: str) -> list[str]:
    """The smallest of the GPU tests on the kernels of a backend: every primitive, and a call of the losses."""
    files = (str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_gpu_kernels.py"))
    return [*PYTEST, "-m", "gpu", "-k", f"small and {backend}", *files]


def sanitizers(form: str, gpu: bool, scratch: Path) -> list[Part]:
    """Every tool of compute-sanitizer over the small tests on each backend; unless in the full form, on Triton's kernels only the first.

    They come last and have all the time that is left.
    """
    program = find_tool("compute-sanitizer")
    absent = "" if gpu else "there is no GPU"
    absent = absent or ("" if program else "compute-sanitizer is not installed")

    def part(tool: str, backend: str) -> Part:
        later = "in the full form only" if form != "full" and backend == "triton" and tool != "memcheck" else ""
        why = absent or later or (without_nvcc() if backend == "native" else "")
        # What a driver's function returns is no error of a kernel: torch asks for what may be missing.
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
        # In torch's cached blocks no access would be out of bounds, and what an earlier tensor held would pass for written.
        environment = {} if tool == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        junit = scratch / f"{tool}-{backend}.xml"
        command = [program or "compute-sanitizer", *options, *small_tests(backend), f"--junitxml={junit}"]
        return Part(f"{tool}, {backend}", command, 1800, absent=why, found=FOUND, junit=junit, environment=environment)

    return [part(tool, backend) for backend in ("native", "triton") for tool in SANITIZERS]


if __name__ == "__main__":
    sys.exit(main())
