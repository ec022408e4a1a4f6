"""Everything that depends on where training runs: device, processes, precision. The only file that knows Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn

from kdkernels.data import DetectionDataset
from kdkernels.losses import DistillationLoss

from .config import TrainConfig
from .ema import Ema
from .feed import Batch


class Machine:
    """An Accelerator, asked for no more than a detection loop needs."""

    def __init__(self, config: TrainConfig) -> None:
        if config.mixed_precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
            raise ValueError("mixed_precision 'fp16' needs a GPU; on a CPU use 'bf16' or 'no'")
        self.config = config
        cpu = config.device == "cpu" or not torch.cuda.is_available()
        _forget_other_settings(cpu, config.mixed_precision)
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation,
        )
        self.device = self._accelerator.device
        self.rank, self.processes = self._accelerator.process_index, self._accelerator.num_processes
        self.main = self._accelerator.is_main_process

    @property
    def scales(self) -> bool:
        """Whether a GradScaler looks after non-finite gradients."""
        return self._accelerator.scaler is not None

    def seed_everything(self) -> None:
        """Seed the global generators; every process gets numbers of its own."""
        set_seed(self.config.seed, device_specific=True)

    def place(self, model: nn.Module) -> None:
        """Move the model to its device and memory format, in place."""
        model.to(self.device)
        if self.config.channels_last:
            # torch's stubs have this overload for tensors only.
            cast(Any, model).to(memory_format=torch.channels_last)

    def ema(self, model: nn.Module) -> Ema | None:
        return Ema(model, self.config.ema_decay) if self.config.ema_decay else None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, in DistributedDataParallel when there are several processes."""
        wrapped = self._accelerator.prepare_model(model)
        # Accelerate puts autocast into model.forward, which would follow the model into evaluation and copies; `autocast` does it here.
        model.__dict__.pop("_original_forward", None)
        model.__dict__.pop("forward", None)
        return wrapped

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimiser as Accelerate wraps it (accumulation, loss scale)."""
        return self._accelerator.prepare_optimizer(optimizer)

    def distiller(
        self, student: nn.Module, teacher: Any, losses: Mapping[str, DistillationLoss] | None, sample: Callable[[], Batch]
    ) -> Any:
        """The Distiller with its trainable parts built and wrapped, or None when there are no losses."""
        if not losses:
            return None
        from kdkernels.distiller import Distiller
        from kdkernels.multi_teacher import MultiTeacherDistiller

        config, teachers = self.config, as_teachers(teacher)
        for one in teachers:
            self.place(getattr(one, "model", one))
        options = {key: getattr(config, key) for key in ("student_tap", "teacher_tap", "levels", "mode")}
        distiller: Any
        if len(teachers) == 1:
            distiller = Distiller(student, teachers[0], losses, **options)
        else:
            distiller = MultiTeacherDistiller(student, teachers, losses, config.teacher_weights, **options)
        with self.autocast():
            distiller.build(*self.to_device(*sample()))
        distiller.prepare()
        return distiller

    def to_device(self, images: list[Tensor], targets: list[dict[str, Any]]) -> Batch:
        moved = [{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in t.items()} for t in targets]
        return [image.to(self.device, non_blocking=True) for image in images], moved

    def autocast(self) -> AbstractContextManager[Any]:
        return self._accelerator.autocast()

    def step_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients are exchanged between processes in the last batch of a step only."""
        return self._accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """The norm of the gradient before it is clipped; waits for the device."""
        return float(self._accelerator.clip_grad_norm_(parameters, limit or float("inf")))

    def average(self, values: dict[str, Tensor], flag: bool) -> tuple[dict[str, float], bool]:
        """Means over the processes, and whether any of them raised the flag."""
        together = torch.stack([v.to(self.device, torch.float32) for v in (*values.values(), torch.tensor(float(flag)))])
        *numbers, flags = self._accelerator.reduce(together, reduction="mean").tolist()
        return dict(zip(values, numbers, strict=True)), flags > 0

    def coco(self, model: nn.Module, dataset: DetectionDataset) -> dict[str, float]:
        """COCO AP on this process."""
        from kdkernels.evaluation import evaluate_detector

        return evaluate_detector(model, dataset, batch_size=self.config.eval_batch_size, device=self.device)

    def on_main(self, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What the main process computes, given to all."""
        found = [compute() if self.main else None]
        return broadcast_object_list(found)[0]

    def gather(self, value: Any) -> list[Any]:
        """One value per process."""
        return gather_object([value])

    def scaler_state(self) -> dict[str, Any] | None:
        return self._accelerator.scaler.state_dict() if self.scales else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        if self.scales and state is not None:
            self._accelerator.scaler.load_state_dict(state)


def as_teachers(teacher: Any) -> list[Any]:
    """One teacher or several as a list."""
    return list(teacher) if isinstance(teacher, list | tuple) else [teacher]


def _forget_other_settings(cpu: bool, precision: str) -> None:
    """Accelerate keeps the settings of its first Accelerator for the whole process and refuses others; a process may hold many runs."""
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        other_device = cpu and state.device.type != "cpu"
        if other_device or state.mixed_precision != precision:
            AcceleratorState._reset_state(reset_partial_state=state.num_processes == 1)
