"""Every example runs as a user would run it, shortened."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_examples_are_run() -> None:
    tested = {"raw_loop.py", "torchvision_fcos.py", "torchvision_faster_rcnn.py", "aid_self_distillation.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested | {"common.py"}


def test_raw_loop() -> None:
    steps = re.findall(r"task (\S+), GKD (\S+)", run("raw_loop.py"))
    assert len(steps) == 3 and all(float(kd) > 0 for _, kd in steps)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("torchvision_fcos.py", ("classification", "kd_gkd", "kd_bmfi")),
        ("torchvision_faster_rcnn.py", ("loss_classifier", "kd_gkd", "kd_bmfi")),
        ("aid_self_distillation.py", ("classification", "kd_aid")),
    ],
)
def test_torchvision_examples(name: str, terms: tuple[str, ...]) -> None:
    lines = run(name, "--steps", "2", "--size", "96").splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1"]
    for term in terms:
        values = [float(re.search(rf"\b{term} (\S+?)(,|$)", line).group(1)) for line in lines]
        # A student that starts as its teacher has nothing to learn from it in the first step.
        assert all(value >= 0 for value in values) and values[1] > 0, (term, values)
