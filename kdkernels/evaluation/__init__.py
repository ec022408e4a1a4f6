"""COCO average precision of a detector on a dataset."""

from .coco import evaluate_detections, evaluate_detector, predict

__all__ = ["evaluate_detections", "evaluate_detector", "predict"]
