"""Detector families: one adapter each, found by the model's type or passed by the user."""

from kdkernels.integrations.protocol import DetectorAdapter, TaskLosses, find_adapter

__all__ = ["DetectorAdapter", "TaskLosses", "find_adapter"]
