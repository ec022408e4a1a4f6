"""Time of a training step with GKD-BMFI, inline against explicit, and without distillation: interleaved in one process, medians, ratios.

`python benchmarks/inline_explicit.py [--rounds 20]` writes benchmarks/results/cpu/inline-explicit.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kdkernels import Distiller
from kdkernels.data import collate, load_dataset
from kdkernels.data.synthetic import render_dataset
from kdkernels.models import build_detector
from kdkernels.recipes import demo_losses, student_spec, teacher_spec

RESULT = Path(__file__).resolve().parent / "results" / "cpu" / "inline-explicit.json"
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        render_dataset(folder, BATCH, 0)
        images, targets = collate(list(load_dataset(folder)))
    student, teacher = build_detector(student_spec()).train(), build_detector(teacher_spec())
    steps: dict[str, Callable[[], Any]] = {}
    for mode in ("inline", "explicit"):
        steps[mode] = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), demo_losses("student + GKD-BMFI"), mode=mode)
    models = {"plain": student, **{mode: distiller.student for mode, distiller in steps.items()}}
    steps["plain"] = student
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-4) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            sum(step(images, targets).values()).backward()
            optimizers[name].step()
            times[name].append(time.perf_counter() - start)
    times = {name: values[2:] for name, values in times.items()}  # the first two rounds allocate
    ratios = {
        f"{a} / {b}": median(x / y for x, y in zip(times[a], times[b], strict=True))
        for a, b in (("inline", "explicit"), ("inline", "plain"), ("explicit", "plain"))
    }
    result = {
        "median_ms": {name: 1e3 * median(values) for name, values in times.items()},
        "median_of_paired_ratios": ratios,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
