"""Checkpoints: plain tensors, numbers and strings, written so that an interrupted write leaves the old file."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import TrainConfig

LAST = Path("checkpoints") / "last.pt"
BEST = Path("best.pt")
#: What may differ between a run and its continuation: none of it changes what the steps compute.
FREE_KEYS = {"run_dir", "resume", "workers", "eval_every", "eval_batch_size", "nonfinite_patience"}


def save(state: dict[str, Any], path: Path) -> None:
    """`torch.save` into a temporary file beside `path` that then replaces it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, read with `weights_only=True`. Raises FileNotFoundError or ValueError with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path} to resume from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


def check_same_run(state: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raises ValueError naming the values that differ from those the checkpoint was made with."""
    then, now = state["config"], config.to_dict()
    different = [f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in now if k not in FREE_KEYS and then.get(k) != now[k]]
    if different:
        raise ValueError(f"{path} belongs to a run with another configuration: {'; '.join(different)}")


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the global generators of torch (CPU and `device`), numpy and random."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = numpy_state
    version, numbers, cached = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(numbers), cached],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The way back from `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, cached = state["python"]
    random.setstate((version, tuple(numbers), cached))
