"""`model.json` and the weights beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from .detectors import build_detector
from .spec import DetectorSpec

MODEL_FILE = "model.json"


def write_model_json(path: Path, spec: DetectorSpec, classes: list[str]) -> None:
    """Writes what `load_detector` needs; `classes` are the names of labels 1, 2, ... (without the background)."""
    text = json.dumps({"spec": spec.resolved().to_dict(), "classes": list(classes)}, indent=2) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_model_json(path: Path) -> tuple[DetectorSpec, list[str]]:
    """The spec and the class names; raises FileNotFoundError or ValueError with the path."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return DetectorSpec.from_dict(values["spec"]), list(values["classes"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: it says what detector the weights belong to") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def find_weights(path: str | Path) -> Path:
    """The file of weights that a run folder means: `best.pt`, or `checkpoints/last.pt` where training has not got that far.

    A file means itself. Raises FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "best.pt", path / "checkpoints" / "last.pt"]
        found = [p for p in candidates if p.is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has neither best.pt nor checkpoints/last.pt")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    return path


def read_spec(path: str | Path) -> tuple[DetectorSpec, list[str]]:
    """The spec and the class names of the detector that a run folder or a checkpoint in one holds."""
    return read_model_json(_model_json(find_weights(path)))


def load_detector(path: str | Path) -> tuple[nn.Module, DetectorSpec, list[str]]:
    """A detector in eval mode from a run folder, its `best.pt`, or a file in its `checkpoints/` (see `find_weights`).

    Of a training checkpoint the EMA is taken when there is one, as in evaluation. Returns the detector, its spec and the class names.
    """
    path = find_weights(path)
    spec, classes = read_spec(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "optimizer" in state and isinstance(state.get("model"), dict):
        state = state["ema"] or state["model"]
    model = build_detector(spec, pretrained=False)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the detector in {_model_json(path)}: {error}") from error
    return model.eval(), spec, classes


def _model_json(weights: Path) -> Path:
    return (weights.parent if (weights.parent / MODEL_FILE).is_file() else weights.parent.parent) / MODEL_FILE
