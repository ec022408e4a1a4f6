"""Detectors with torchvision's classes, described by a `DetectorSpec` that can be saved next to their weights."""

from .detectors import build_detector
from .files import load_detector, read_model_json, read_spec, write_model_json
from .spec import BACKBONES, DETECTORS, DetectorSpec

__all__ = ["BACKBONES", "DETECTORS", "DetectorSpec", "build_detector", "load_detector", "read_model_json", "read_spec", "write_model_json"]
