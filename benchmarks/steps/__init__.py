"""Whole training steps of real torchvision detectors: what the teacher costs, and what distillation costs on top of it."""
