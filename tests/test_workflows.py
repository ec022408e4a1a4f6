"""The CI's files are ones that GitHub takes: its schema, a linter's rules, a security linter's; and a few that those do not know."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.compare import run as compare

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent


def load(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as True.
    return {"on" if key is True else key: value for key, value in yaml.safe_load(path.read_text()).items()}


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_the_three() -> None:
    assert [path.name for path in WORKFLOWS] == ["comment.yml", "cpu.yml", "gpu.yml"]


def test_linters_accept_them() -> None:
    assert run(BIN / "yamllint", "--strict", ".github", ".yamllint.yaml") == ""
    assert "ok" in run(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    # Its report goes to stderr; findings are its exit code, which `run` asserts.
    run(BIN / "zizmor", "--offline", "--quiet", *WORKFLOWS)


def test_linters_would_reject_a_broken_one(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[1].read_text().replace("runs-on:", "run-on:"))
    with pytest.raises(AssertionError, match="run-on"):
        run(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", broken)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_runner_context_is_used_in_steps_only(path: Path) -> None:
    """GitHub knows the runner when the job has one; elsewhere the workflow is refused, which the schema does not say."""
    for job in load(path)["jobs"].values():
        outside = {key: value for key, value in job.items() if key not in ("steps", "runs-on")}
        assert "runner." not in str(outside)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_files_and_make_targets_that_are_run_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for job in load(path)["jobs"].values():
        for step in job["steps"]:
            command = step.get("run", "")
            assert all((ROOT / name).is_file() for name in re.findall(r"\bscripts/\S+", command))
            assert all(f"\n{target}:" in makefile for target in re.findall(r"^make (\w+)$", command, re.MULTILINE))


def test_the_comment_is_for_runs_of_the_gpu_workflow_and_its_artefact() -> None:
    gpu, comment = (load(ROOT / ".github" / "workflows" / name) for name in ("gpu.yml", "comment.yml"))
    assert comment["on"]["workflow_run"]["workflows"] == [gpu["name"]]
    uploaded = [step["with"]["name"] for step in gpu["jobs"]["suite"]["steps"] if "upload-artifact" in step.get("uses", "")]
    downloaded = re.findall(r"--name (\w+)", comment["jobs"]["comment"]["steps"][0]["run"])
    assert len(downloaded) == 1 and downloaded[0] in uploaded
    assert gpu["jobs"]["suite"]["runs-on"] == ["self-hosted", "gpu"]


def test_compare_knows_the_options_that_it_is_given() -> None:
    steps = load(ROOT / ".github" / "workflows" / "gpu.yml")["jobs"]["suite"]["steps"]
    (command,) = [line for step in steps for line in step.get("run", "").splitlines() if "benchmarks compare" in line]
    words = shlex.split(command)
    parser = argparse.ArgumentParser(exit_on_error=False)
    compare.add_arguments(parser)
    parsed = parser.parse_args(words[4 : words.index("||")])
    assert (parsed.base, parsed.head) == ("$BASE", "HEAD") and parsed.markdown.name == "table.md"


def test_a_pull_request_s_code_never_runs_with_the_right_to_write() -> None:
    for path in WORKFLOWS:
        workflow = load(path)
        assert workflow["permissions"] in ({}, {"contents": "read"})
        writes = [job for job in workflow["jobs"].values() if "write" in str(job.get("permissions", ""))]
        assert path.name == "comment.yml" or not writes
        assert not any("uses" in step for job in writes for step in job["steps"]), "nothing is checked out beside that right"
