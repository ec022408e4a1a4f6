"""Optimiser and schedules: functions of the step alone, so that a resumed run continues them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .config import TrainConfig

FINAL_RATE = 0.01


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9, over the parameters that require gradients."""
    trained = [p for p in parameters if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=config.peak_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(trained, lr=config.peak_rate, momentum=0.9, weight_decay=config.weight_decay)


def rate_factor(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate over its peak in optimiser step `step` (from 0) of `total`."""
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if config.decay == "step":
        return 0.1 ** sum(step >= total * twelfths // 12 for twelfths in (8, 11))
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_rate(config: TrainConfig, optimizer: torch.optim.Optimizer, step: int, total: int) -> float:
    """Give the optimiser the learning rate of step `step` (from 0) of `total`; returns it."""
    rate = config.peak_rate * rate_factor(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def kd_factor(config: TrainConfig, step: int, total: int) -> float:
    """What the distillation losses are multiplied with in step `step` (from 0) of `total`."""
    if step < config.kd_warmup_steps:
        return (step + 1) / config.kd_warmup_steps
    progress = (step - config.kd_warmup_steps) / max(1, total - 1 - config.kd_warmup_steps)
    if config.kd_schedule == "linear":
        return 1 - progress
    if config.kd_schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0
