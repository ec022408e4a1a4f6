"""Training, with or without distillation, on Accelerate."""

from .config import TrainConfig, load_config
from .ema import Ema
from .initialise import init_student
from .result import TrainingDiverged, TrainingInterrupted, TrainResult
from .train import train

__all__ = ["Ema", "TrainConfig", "TrainResult", "TrainingDiverged", "TrainingInterrupted", "init_student", "load_config", "train"]
