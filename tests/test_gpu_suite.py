"""scripts/gpu_suite.sh: runs through without a GPU and without optional packages, and says what became of every part."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import run as kernels_run
from benchmarks import traffic
from benchmarks.choose import run as choose_run
from benchmarks.codegen import run as codegen_run
from benchmarks.registry import ENTRIES
from benchmarks.report import speed_of_light
from benchmarks.steps import run as steps_run
from benchmarks.tune import run as tune_run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_suite  # noqa: E402
from suite_runner import Part, Suite  # noqa: E402


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path, tmp_path / "scratch", "quick", 60)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def running(process: int) -> bool:
    """Whether it exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def statuses(suite: Suite) -> dict[str, str]:
    return {part["name"]: part["status"] for part in suite.report["parts"]}


def test_a_failed_part_does_not_stop_the_others(suite: Suite, tmp_path: Path) -> None:
    suite.run(Part("bad", python("import sys; print('cries'); sys.exit(3)"), 20))
    suite.run(Part("good", python("print('table')"), 20, output="table.md"))
    assert suite.finish() == 1
    assert statuses(suite) == {"bad": "failed", "good": "passed"}
    assert json.loads((tmp_path / "suite.json").read_text()) == suite.report
    assert suite.report["parts"][0]["reason"].startswith("exit code 3") and not suite.report["passed"]
    assert (tmp_path / "table.md").read_text() == "table\n"
    assert "cries" in (tmp_path / "suite.log").read_text()


def test_time_is_up_for_a_part_and_for_what_it_started(suite: Suite, tmp_path: Path) -> None:
    # Ctrl-C first, so that what was measured is kept; a child that ignores it is killed.
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    program = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / "kernels.jsonl")!r}).write_text("{{}}")
"""
    begin = time.monotonic()
    suite.run(Part("slow", python(program), 2, result="kernels.jsonl"))
    assert time.monotonic() - begin < 8
    assert statuses(suite) == {"slow": "cut short"} and suite.finish() == 0
    child_id = int((tmp_path / "child").read_text())
    while time.monotonic() - begin < 20 and running(child_id):
        time.sleep(0.05)
    assert not running(child_id)


def test_results_of_an_earlier_suite_or_part_are_not_taken_for_those_of_this_one(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "kernels.jsonl").write_text("of an earlier part\n")
    suite.run(Part("slow", python("import time; time.sleep(60)"), 1, result="kernels.jsonl"))
    assert statuses(suite) == {"slow": "timeout"}
    Suite(tmp_path, tmp_path / "scratch", "quick", 60).log.close()
    assert not (tmp_path / "kernels.jsonl").exists()


def test_nothing_measured_in_time_is_a_failure_and_no_time_left_as_well(suite: Suite) -> None:
    suite.run(Part("slow", python("import time; time.sleep(60)"), 1, result="kernels.jsonl"))
    suite.end = 0.0
    suite.run(Part("late", python(""), 20))
    assert statuses(suite) == {"slow": "timeout", "late": "skipped"} and suite.finish() == 1
    assert not suite.report["complete"]


def test_tools_that_are_not_here_or_cannot_work_are_no_failure(suite: Suite) -> None:
    suite.run(Part("no tool", ["no-such-tool"], 20, found=99))
    suite.run(Part("no right", python("import sys; sys.exit(1)"), 20, found=99))
    suite.run(Part("no GPU", python(""), 20, absent="there is no GPU"))
    suite.run(Part("optional", python("import sys; sys.exit(1)"), 20, required=False))
    assert list(statuses(suite).values()) == ["unable", "unable", "absent", "failed"]
    assert suite.finish() == 0 and not suite.report["complete"]
    suite.log = (suite.out / "suite.log").open("ab")
    suite.run(Part("found something", python("import sys; sys.exit(99)"), 20, found=99))
    assert suite.finish() == 1


def test_only_what_is_not_here_leaves_a_suite_complete(suite: Suite) -> None:
    suite.run(Part("no tool", [], 20, absent="it is not installed", found=99))
    suite.run(Part("good", python(""), 20))
    assert suite.finish() == 0 and suite.report["complete"]


@pytest.mark.parametrize(
    ("program", "status", "tests"),
    [
        ("def test_one(): pass\ndef test_two(): pass", "passed", {"ran": 2, "failed": 0, "skipped": 0}),
        ("def test_one(): pass\ndef test_two(): assert False", "unable", {"ran": 2, "failed": 1, "skipped": 0}),
        ('import pytest\n@pytest.mark.skip("needs a GPU")\ndef test_one(): pass', "unable", {"ran": 0, "failed": 0, "skipped": 1}),
        ("", "unable", {"ran": 0, "failed": 0, "skipped": 0}),
        ("import os; os._exit(0)", "unable", None),
    ],
)
def test_a_tool_has_passed_when_tests_ran_under_it_and_the_report_says_how_many(
    program: str, status: str, tests: dict[str, int] | None, suite: Suite, tmp_path: Path
) -> None:
    file, junit = tmp_path / "test_small.py", tmp_path / "left.xml"
    file.write_text(program)
    command = [*gpu_suite.PYTEST, "-c", "/dev/null", str(file), f"--junitxml={junit}"]
    suite.run(Part("a tool", command, 60, found=99, junit=junit))
    (part,) = suite.report["parts"]
    assert (part["status"], part.get("tests")) == (status, tests)
    assert suite.finish() == 0 and suite.report["complete"] == (status == "passed")


def test_tables_that_a_part_fills_elsewhere_are_copied_also_when_its_time_is_up(suite: Suite, tmp_path: Path) -> None:
    table = tmp_path / "elsewhere" / "choices" / "sm_90.json"
    table.parent.mkdir(parents=True)
    suite.out = tmp_path / "out"
    suite.out.mkdir()
    writes = f"import pathlib, time; pathlib.Path({str(table)!r}).write_text('{{}}'); time.sleep(60)"
    suite.run(Part("choice", python(writes), 2, result=str(table)), Part("nothing", python("pass"), 20, result=str(table.with_name("no"))))
    assert statuses(suite) == {"choice": "cut short", "nothing": "passed"}
    assert [path.name for path in suite.out.glob("*sm_*")] == ["choices-sm_90.json"]


def test_parts_side_by_side_end_each_for_itself(suite: Suite, tmp_path: Path) -> None:
    slow = "import time\nprint('first', flush=True); time.sleep(60)"
    waits = "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)\nprint('second')"
    makes = f"import pathlib\npathlib.Path({str(tmp_path / 'sign')!r}).touch(); print('third')"
    begin = time.monotonic()
    suite.run(
        Part("slow", python(slow), 2, found=99),
        # Only with the next one at work too does it end.
        Part("waiting", python(waits.format(tmp_path / "sign")), 20),
        Part("making", python(makes), 20),
        Part("no GPU", python(""), 20, absent="there is no GPU"),
        Part("no tool", ["no-such-tool"], 20, found=99),
        Part("bad", python("import sys; sys.exit(99)"), 20, found=99),
    )
    assert time.monotonic() - begin < 12
    wanted = {"slow": "unable", "waiting": "passed", "making": "passed", "no GPU": "absent", "no tool": "unable", "bad": "failed"}
    assert statuses(suite) == wanted and suite.finish() == 1
    seconds = {part["name"]: part["seconds"] for part in suite.report["parts"]}
    assert seconds["making"] < 2 <= seconds["slow"]
    log = (tmp_path / "suite.log").read_text()
    for name, printed in (("slow", "first"), ("waiting", "second"), ("making", "third")):
        lines = log[log.index(f"== {name}: {sys.executable}") : log.index(f"== {name}: {wanted[name]}")]
        assert f"\n{printed}\n" in lines and "\n== " not in lines, "what a part printed is in one place"


def test_an_interrupt_ends_all_parts_that_are_at_work(suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numbers = [tmp_path / name for name in ("one", "two")]
    programs = [f"import os, pathlib, time; pathlib.Path({str(path)!r}).write_text(str(os.getpid())); time.sleep(60)" for path in numbers]

    def interrupt(seconds: float) -> None:
        if all(path.exists() and path.read_text() for path in numbers):
            raise KeyboardInterrupt

    monkeypatch.setattr("suite_runner.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        suite.run(*(Part("slow", python(program), 20) for program in programs))
    assert not any(running(int(path.read_text())) for path in numbers)


@pytest.fixture(params=[True, False], ids=["xdist", "no xdist"])
def xdist(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether pytest-xdist seems to be installed."""
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: request.param or None)
    return request.param


FILES = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "find_tool", lambda name: None)


@pytest.fixture
def all_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "find_tool", lambda name: f"/tools/{name}")


def test_limits_of_the_quick_form_leave_time_for_every_part(tmp_path: Path, xdist: bool) -> None:
    parts = [
        *gpu_suite.native_library("quick", [9, 0]),
        *gpu_suite.tests(tmp_path, "quick", FILES),
        *gpu_suite.measurements(tmp_path, "quick", "cuda"),
    ]
    # The sanitizers have what is left.
    assert sum(part.limit for part in parts) + 60 + 50 <= gpu_suite.SECONDS["quick"] < 540


def test_what_can_be_named_ends_in_time_or_can_go_on_from_where_it_was(tmp_path: Path, all_tools: None) -> None:
    together = [
        ["build", *gpu_suite.native_library("parts", [9, 0])],
        ["tests", *gpu_suite.tests(tmp_path, "parts", FILES)],
        ["figures and traffic", *gpu_suite.figures(tmp_path, True), *gpu_suite.memory_traffic(tmp_path, True)],
        ["tune", *gpu_suite.tuning([9, 0])],
    ]
    seconds = {name: sum(part.limit for part in parts) for name, *parts in together}
    assert all(limit <= gpu_suite.SECONDS["parts"] for limit in seconds.values()) and gpu_suite.SECONDS["parts"] < 590, seconds
    tables = {Path(part.result or "") for part in (*gpu_suite.choices([9, 0]), *gpu_suite.tuning([9, 0]))}
    assert tables == {ROOT / "kdkernels" / folder / "sm_90.json" for folder in ("choices", "triton/tables")}
    assert {part.absent for part in (*gpu_suite.choices(None), *gpu_suite.tuning(None))} == {"there is no GPU"}


def test_parts_are_named_and_run_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(Suite, "run", lambda suite, *parts: ran.extend(part.name for part in parts))
    monkeypatch.setattr(Suite, "ask", lambda suite, *arguments, limit: {})
    assert gpu_suite.main([str(tmp_path), "--part", "sanitizers,choose,figures"]) == 1, "there is no GPU"
    assert [ran.index(name) for name in ("figures, kernels", "choice, passes", "memcheck, native")] == [0, 5, 8]
    assert json.loads((tmp_path / "suite.json").read_text())["form"] == "parts"
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main([str(tmp_path), "--part", "choice"])
    assert f"choose from {', '.join(gpu_suite.PARTS)}" in capsys.readouterr().err


def test_the_library_is_compiled_for_the_gpu_that_is_there(all_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (build,) = gpu_suite.native_library("quick", [9, 0])
    assert build.environment == {"KDKERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}
    (without,) = gpu_suite.native_library("quick", None)
    assert without.environment == {"KDKERNELS_BUILD": "cpu"}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert gpu_suite.native_library("full", [9, 0])[0].environment["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"


def test_a_gpu_without_nvcc_gets_the_library_for_the_cpu_and_a_reason(no_tools: None) -> None:
    build, kernels = gpu_suite.native_library("quick", [9, 0])
    assert build.environment == {"KDKERNELS_BUILD": "cpu"} and build.required
    assert kernels.absent == "nvcc, CUDA's compiler, is not installed"


@pytest.mark.parametrize("form", ["quick", "full"])
def test_each_sanitizer_checks_the_small_tests_of_each_backend_or_says_why_not(form: str, all_tools: None, tmp_path: Path) -> None:
    parts = {part.name: part for part in gpu_suite.sanitizers(form, True, tmp_path)}
    assert list(parts) == [f"{tool}, {backend}" for backend in ("native", "triton") for tool in ("memcheck", "racecheck", "initcheck")]
    left_out = {name for name, part in parts.items() if part.absent}
    assert left_out == ({"racecheck, triton", "initcheck, triton"} if form == "quick" else set())
    assert all("full form only" in parts[name].absent for name in left_out)
    for name, part in parts.items():
        tool, backend = name.split(", ")
        words = part.command
        assert words[0] == "/tools/compute-sanitizer" and words[words.index("--tool") + 1] == tool
        assert int(words[words.index("--error-exitcode") + 1]) == part.found == gpu_suite.FOUND
        assert words[words.index("-k") + 1] == f"small and {backend}"
        assert words[-1] == f"--junitxml={part.junit}" and part.junit not in [other.junit for other in parts.values() if other is not part]
        # Blocks that torch keeps would hide both from them; shared memory is not torch's.
        assert part.environment == ({} if tool == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def test_what_a_sanitizer_lacks_is_said(no_tools: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {part.absent for part in gpu_suite.sanitizers("full", False, tmp_path)} == {"there is no GPU"}
    assert {part.absent for part in gpu_suite.sanitizers("full", True, tmp_path)} == {"compute-sanitizer is not installed"}
    monkeypatch.setattr(gpu_suite, "find_tool", lambda name: None if name == "nvcc" else name)
    reasons = {part.name: part.absent for part in gpu_suite.sanitizers("full", True, tmp_path)}
    assert "nvcc" in reasons["racecheck, native"] and not reasons["racecheck, triton"]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_sanitizers_find_tests_of_primitives_and_of_losses(backend: str) -> None:
    command = [*gpu_suite.small_tests(backend), "--collect-only", "-q", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    counts = dict(line.split(": ") for line in done.stdout.splitlines() if line.startswith("tests/"))
    assert done.returncode == 0 and set(counts) == {"tests/test_gpu.py", "tests/test_gpu_kernels.py"}
    primitives = [entry for entry in ENTRIES.values() if entry.kind == "primitive"]
    # Two layouts; four types of a call, two of a primitive and of losses in one launch.
    assert [int(count) for count in counts.values()] == [8, 4 * len(primitives) + 4]


@pytest.mark.parametrize("form", ["quick", "full"])
def test_every_file_with_gpu_tests_is_run_once_or_said_to_be_left_out(form: str, tmp_path: Path, xdist: bool) -> None:
    parts = [part for part in gpu_suite.tests(tmp_path, form, FILES) if part.name != "primitive and harness tests"]
    run = [Path(word).name for part in parts for word in part.command if word.endswith(".py")]
    kernels = {path.name for path in FILES if path.name.startswith(("test_triton_", "test_kernels_"))} | {"test_shared_read.py"}
    alone = {"test_bench_measure.py", "test_choice.py", "test_gpu_large.py", "test_tune.py"}
    others = {"test_gpu.py", "test_gpu_kernels.py", "test_bench_gate.py", "test_choice_library.py", *alone}
    left_out = form == "quick" and not xdist
    assert sorted(run) == sorted(others if left_out else others | kernels)
    assert {Path(word).name for word in parts[1].command if word.endswith(".py")} == alone
    assert any("xdist" in part.absent for part in parts) == left_out
    assert ("-n" in parts[0].command) == xdist and "-n" not in parts[1].command


@pytest.mark.parametrize("form", ["quick", "full", "smoke"])
def test_the_benchmarks_know_every_option_that_they_are_given(form: str, tmp_path: Path) -> None:
    modules = {
        **{"step": steps_run, "speed-of-light": speed_of_light, "codegen": codegen_run},
        **{"traffic": traffic, "choose": choose_run, "tune": tune_run},
    }
    named = [*gpu_suite.figures(tmp_path, True), *gpu_suite.memory_traffic(tmp_path, True)]
    named += [*gpu_suite.choices([9, 0]), *gpu_suite.tuning([9, 0])]
    for part in (*gpu_suite.measurements(tmp_path, form, "cuda"), *named):
        words = part.command[next(k for k in range(len(part.command)) if part.command[k : k + 3] == gpu_suite.BENCH) + 3 :]
        parser = argparse.ArgumentParser(exit_on_error=False)
        modules.get(words[0], kernels_run).add_arguments(parser)
        _, unknown = parser.parse_known_args(words[1:] if words[0] in modules else words)
        assert unknown == [], part.name


def test_the_suite_runs_through_with_the_bare_packages_and_nothing_installed(tmp_path: Path) -> None:
    """As on a GPU machine: no kdkernels on the path but the checkout's, no hypothesis, typer, rich ..., no git. Of a copy, as it builds."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "__pycache__", "emulator", "runs"))
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("hypothesis", "typer", "rich", "yaml", "pycocotools", "accelerate", "matplotlib"):
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name={name!r})\n")
    (hidden / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (hidden / "python3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{hidden}:/usr/bin:/bin", "PYTHONPATH": str(hidden), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # hypothesis' own, which is still installed
    out = tmp_path / "out"
    command = ["bash", str(checkout / "scripts" / "gpu_suite.sh"), str(out), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    report = json.loads((out / "suite.json").read_text())
    log = (out / "suite.log").read_text()
    assert done.returncode == 0, done.stdout + log
    assert report["passed"] and report["form"] == "smoke" and report["environment"]["torch"]
    found = {part["name"]: part["status"] for part in report["parts"]}
    assert found["environment"] == found["GPU tests"] == found["kernels"] == found["training steps"] == "passed"
    assert found["native library"] in ("passed", "absent")
    assert {status for name, status in found.items() if "check, " in name or name.startswith("memory traffic")} == {"absent"}
    assert report["tests_left_out"]["test_box_mask.py"] == "needs hypothesis"
    assert "test_gpu.py" not in report["tests_left_out"]
    assert "test_box_mask.py left out: needs hypothesis" in log
    cases = list(ElementTree.parse(out / "junit-gpu.xml").iter("testcase"))
    assert {case.get("classname") for case in cases} >= {"tests.test_gpu", "tests.test_gpu_kernels"}
    assert all(case.find("skipped") is not None for case in cases)
    records = [json.loads(line) for line in (out / "kernels.jsonl").read_text().splitlines()]
    assert {record["provider"] for record in records if record["status"] == "measured"} == {"eager", "reference"}
    assert (out / "steps.jsonl").stat().st_size and (out / "speed-of-light.md").stat().st_size
    files = list(out.rglob("*"))
    assert len(files) <= 8 and max(file.stat().st_size for file in files) < 16e6
