"""What BMFI, GKD's map, GKD's imitation and AID add to a small detector, and why. `python -m benchmarks.studies.gkd_ablation --help`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "gkd-ablation.jsonl"
LONG, SHORT = 600, 300
# Steps that plain training gets in the time of GKD-BMFI: measured by `time`, see docs/gkd-ablation.md.
EQUAL_TIME = 1.85

Losses = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One row of the ablation; `seeds` runs of it."""

    study: str
    name: str
    losses: Losses = dict
    steps: int = SHORT
    teacher: str = "good"
    config: dict[str, Any] = field(default_factory=dict)


def runs() -> list[Run]:
    from kdkernels import AIDLoss, BMFILoss, GKDLoss

    from .ablation_losses import FixedExtremaGKD, LevelWeightedGKD, PlainMSE

    def bmfi() -> BMFILoss:
        return BMFILoss(alpha=1e-3, gamma=0.0, lambda_=0.3, mask="area")

    def imitation(**options: Any) -> GKDLoss:
        return GKDLoss(form="imitation", **options)

    explicit = {"mode": "explicit"}
    rows: list[tuple[str, Losses, float]] = [
        ("plain", dict, 1.0),
        ("plain, equal time", dict, EQUAL_TIME),
        ("BMFI", lambda: {"bmfi": bmfi()}, 1.0),
        ("GKD map", lambda: {"gkd": GKDLoss(weight=0.1)}, 1.0),
        ("GKD imitation", lambda: {"gkd": imitation(weight=60.0, spatial=True)}, 1.0),
        ("GKD-BMFI", lambda: {"gkd": GKDLoss(weight=0.1), "bmfi": bmfi()}, 1.0),
        ("AID-BMFI", lambda: {"aid": AIDLoss(bmfi(), alpha=0.1)}, 1.0),
        ("plain MSE", lambda: {"mse": PlainMSE(weight=20.0)}, 1.0),
    ]
    # As in the demo, and in the configurations released with GKD, all students start with the teacher's neck and head.
    inherited = {"init_student": True}
    long = [Run("long", name, losses, int(LONG * factor), config=inherited) for name, losses, factor in rows]
    maps: list[tuple[str, Losses, dict[str, Any]]] = [
        ("plain", dict, {}),
        ("map, weight 0.1", lambda: {"gkd": GKDLoss(weight=0.1)}, {}),
        ("map, weight 1", lambda: {"gkd": GKDLoss(weight=1.0)}, {}),
        ("map, P3 alone, weight 1", lambda: {"gkd": GKDLoss(weight=1.0)}, {"levels": ["0"]}),
        ("map, levels weighted 1, 0.1, 0.002", lambda: {"gkd": LevelWeightedGKD((1.0, 0.1, 0.002))}, {}),
        ("map, weight 1, decayed to 0", lambda: {"gkd": GKDLoss(weight=1.0)}, {"kd_schedule": "cosine"}),
        ("map, weight 1, extrema constant", lambda: {"gkd": FixedExtremaGKD(weight=1.0)}, {}),
        ("map, weight 1, mse", lambda: {"gkd": GKDLoss(weight=1.0, distance="mse")}, {}),
        ("map, weight 0.1, z-score", lambda: {"gkd": GKDLoss(weight=0.1, normalize="zscore")}, explicit),
        ("map, weight 0.1, second order", lambda: {"gkd": GKDLoss(weight=0.1, grad_mode="second_order")}, explicit),
    ]
    aid = [
        Run("aid", f"{label}, {teacher} teacher", losses, teacher=teacher)
        for teacher in ("upside-down",)
        for label, losses in (
            ("BMFI", lambda: {"bmfi": bmfi()}),
            ("AID-BMFI, alpha 0.1", lambda: {"aid": AIDLoss(bmfi(), alpha=0.1)}),
            ("AID-BMFI, alpha 1", lambda: {"aid": AIDLoss(bmfi(), alpha=1.0)}),
        )
    ]
    return [*long, *(Run("map", name, losses, config=config) for name, losses, config in maps), *aid]


def datasets(folder: Path) -> tuple[Any, Any]:
    from kdkernels.data import load_dataset
    from kdkernels.data.synthetic import render_dataset
    from kdkernels.recipes import DEMO

    for part, images, seed in (("train", DEMO.train_images, DEMO.train_seed), ("val", DEMO.val_images, DEMO.val_seed)):
        if not (folder / part).exists():
            render_dataset(folder / part, images, seed)
    return load_dataset(folder / "train"), load_dataset(folder / "val")


def train_teacher(folder: Path, name: str) -> None:
    import torch

    from kdkernels.models import build_detector
    from kdkernels.recipes import DEMO, teacher_spec, train_config
    from kdkernels.training import train

    path = folder / f"teacher-{name}.pt"
    if path.exists():
        return
    train_set, val_set = datasets(folder)
    if name == "cars-only":
        car = train_set.classes.index("Car") + 1
        train_set = only_label(train_set, car)
    torch.manual_seed(DEMO.teacher_seed)
    model = build_detector(teacher_spec())
    config = train_config(DEMO, DEMO.teacher_steps, DEMO.teacher_seed)
    result = train(model, None, train_set, val_set, config, console=False)
    torch.save({"state": model.state_dict(), "map": result.map, "map50": result.map50, "step_ms": result.step_ms}, path)
    assert result.map is not None, "there is a validation set"
    print(f"teacher {name}: mAP {100 * result.map:.1f}, {result.train_seconds:.0f} s", flush=True)


def only_label(dataset: Any, label: int) -> Any:
    """The same images with the objects of one class; the others are there to be seen, without a label."""
    import copy
    from dataclasses import replace

    kept = copy.copy(dataset)
    kept.items = [replace(i, annotations=[a for a in i.annotations if a.label == label or a.iscrowd]) for i in dataset.items]
    return kept


def one(job: tuple[Run, int, Path, int]) -> dict[str, Any]:
    import torch

    from kdkernels.models import build_detector
    from kdkernels.recipes import DEMO, student_spec, teacher_spec, train_config
    from kdkernels.training import train

    run, seed, folder, threads = job
    torch.set_num_threads(threads)
    train_set, val_set = datasets(folder)
    torch.manual_seed(seed)
    student = build_detector(student_spec())
    losses = run.losses()
    teacher = None
    if losses or run.config.get("init_student"):
        from kdkernels import Teacher

        from .ablation_losses import UpsideDownTeacher

        stored = torch.load(folder / f"teacher-{'cars-only' if run.teacher == 'cars-only' else 'good'}.pt", weights_only=True)
        model = build_detector(teacher_spec())
        model.load_state_dict(stored["state"])
        teacher = UpsideDownTeacher(model) if run.teacher == "upside-down" else Teacher(model)
    config = train_config(DEMO, run.steps, seed, **run.config)
    result = train(student, None, train_set, val_set, config, teacher if losses or run.config else None, losses or None, console=False)
    last = result.history[-1]
    return {
        "study": run.study,
        "name": run.name,
        "seed": seed,
        "steps": result.steps,
        "map": result.map,
        "map50": result.map50,
        "step_ms": result.step_ms,
        "train_seconds": result.train_seconds,
        "threads": threads,
        "initial_weights": result.initial_weights,
        "data_order": result.data_order,
        "kd": {key: value for key, value in last.items() if key.startswith(("kd", "loss", "ratio"))},
    }


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    return record["study"], record["name"], record["seed"]


def run_all(arguments: argparse.Namespace) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    datasets(arguments.folder)
    chosen = [r for r in runs() if arguments.study in (None, r.study) and arguments.only in r.name]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        teachers = ["good", "cars-only"] if any(r.teacher == "cars-only" for r in chosen) else ["good"]
        pool.starmap(train_teacher, [(arguments.folder, name) for name in teachers])
        done = {key(json.loads(line)) for line in RESULTS.read_text().splitlines()} if RESULTS.exists() else set()
        by_name = {(r.study, r.name): r for r in chosen}
        todo = [(r.study, r.name, seed) for seed in range(arguments.seeds) for r in chosen if (r.study, r.name, seed) not in done]
        start = time.monotonic()
        jobs = [(study, name, seed, arguments.folder, arguments.threads) for study, name, seed in todo]
        assert all((study, name) in by_name for study, name, *_ in jobs)
        for count, record in enumerate(pool.imap_unordered(named, jobs), 1):
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            spent = (time.monotonic() - start) / 60
            row = f"{record['study']:5} {record['name']}, seed {record['seed']}: mAP {100 * record['map']:.1f}"
            print(f"{count}/{len(todo)} {spent:5.1f} min  {row}", flush=True)


def named(job: tuple[str, str, int, Path, int]) -> dict[str, Any]:
    """Runs hold closures, which do not cross processes: look the run up by name."""
    study, name, seed, folder, threads = job
    (run,) = [r for r in runs() if (r.study, r.name) == (study, name)]
    return one((run, seed, folder, threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--study", choices=["long", "map", "aid"], help="one of the three questions; all when not given")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ablation", help="rendered data and teachers")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    run_all(arguments)


if __name__ == "__main__":
    main()
