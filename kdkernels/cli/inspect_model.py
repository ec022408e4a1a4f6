"""`kdkernels inspect`: which module paths of a model can be tapped."""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from .console import console, escape, note
from .errors import UserError, checking_input, guarded, need
from .options import parse_size

if TYPE_CHECKING:
    from torch import nn

DEFAULT_SIZE = (256, 256)


class Tappable(NamedTuple):
    """A module path as `FeatureTap` takes it, and its levels: name -> (channels, height, width)."""

    path: str
    levels: OrderedDict[str, tuple[int, int, int]]


@guarded
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder or checkpoint; a detector, a backbone or both (fcos, slim-student, retinanet/resnet50); or module:callable "
            "that returns a model.",
            show_default=False,
        ),
    ],
    size: Annotated[str | None, typer.Option("--size", help="Shorter and longer side of the image sent through, such as 256x512.")] = None,
) -> None:
    """Print the module paths of a model that give or take multi-scale features, with their levels, channels and strides.

    These are what FeatureTap, Distiller(student_tap=..., teacher_tap=...) and train.student_tap in the configuration take.
    """
    need("torchvision", "PIL")
    network, (height, width) = find_model(model, parse_size(size))
    paths, frame, default = tappable(network, height, width)
    if not paths:
        raise UserError(f"no module of {model} gives or takes several feature maps of different sizes; tap single modules by their paths")
    table = Table("", "module path", "levels", "channels", "strides")
    for path, levels in paths:
        names, channels = ", ".join(levels), ", ".join(str(c) for c, _, _ in levels.values())
        strides = ", ".join(f"{frame[0] / h:.3g}" for _, h, _ in levels.values())
        table.add_row(*map(escape, ("default" if path == default else "", path, names, channels, strides)))
    note(f"{type(network).__name__}, an image of {frame[0]} x {frame[1]} pixels sent through")
    console().print(table)


def find_model(name: str, size: tuple[int | None, int | None]) -> tuple[nn.Module, tuple[int, int]]:
    """The model that an argument means, and the (height, width) of the image to send through. Raises UserError."""
    from torch import nn

    from kdkernels.models import BACKBONES, DETECTORS, DetectorSpec, build_detector, load_detector

    short, long = size
    with checking_input():
        if ":" in name and not Path(name).exists():
            network = _call(name)
            if not isinstance(network, nn.Module):
                raise UserError(f"{name} gave a {type(network).__name__}, should give a torch.nn.Module")
            return network, (short, long) if short and long else DEFAULT_SIZE
        parts = name.split("/")
        if not Path(name).exists() and all(part in (*DETECTORS, *BACKBONES) for part in parts) and len(parts) <= 2:
            spec = DetectorSpec(**_spec_parts(parts, DETECTORS), min_size=short or DEFAULT_SIZE[0], max_size=long or DEFAULT_SIZE[1])
            return build_detector(spec, pretrained=False), (spec.min_size, spec.max_size)
        if not Path(name).exists():
            raise UserError(
                f"{name} is no file, no folder, no module:callable and no detector or backbone "
                f"(detectors: {', '.join(DETECTORS)}; backbones: {', '.join(BACKBONES)})"
            )
        network, spec, _ = load_detector(name)
        return network, (short or spec.min_size, long or spec.max_size)


def _spec_parts(parts: list[str], detectors: tuple[str, ...]) -> dict[str, Any]:
    found = {"detector" if part in detectors else "backbone": part for part in parts}
    if found.get("detector") == "ssdlite":
        found.setdefault("backbone", "mobilenet_v3_small")
    return found


def _call(name: str) -> Any:
    """What `module:callable` returns; modules in the current folder are found."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise UserError(f"{name}: the module {module} has no {attribute!r}") from error
    finally:
        sys.path.pop(0)
    return function()


def tappable(model: nn.Module, height: int, width: int) -> tuple[list[Tappable], tuple[int, int], str | None]:
    """One forward pass of a (height, width) image with hooks on every module that has parameters.

    Returns the paths whose output or input has levels of different sizes, the (H, W) of the batch that the features cover, and the
    default tap of the model's detector family (None when no adapter knows it).
    """
    import torch

    from kdkernels.integrations import find_adapter
    from kdkernels.tap import as_features

    found: dict[str, Tappable] = {}
    frames: list[tuple[int, int]] = []

    def keep(path: str, value: Any) -> None:
        features = as_features(value)
        if features is not None and len({x.shape[-2:] for x in features.values()}) > 1:
            levels = OrderedDict((key, (x.shape[1], x.shape[2], x.shape[3])) for key, x in features.items())
            found.setdefault(path, Tappable(path, levels))

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            frames.extend((v.shape[-2], v.shape[-1]) for v in values if isinstance(v, torch.Tensor) and v.dim() == 4 and v.shape[1] == 3)
            first = next((v for v in values if as_features(v) is not None), None)
            keep(f"{name}:input", first)

        return hook

    handles = []
    for name, module in model.named_modules():
        if name and any(True for _ in module.parameters()):
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda m, args, output, name=name: keep(name, output)))
    try:
        default = find_adapter(model).default_tap
    except TypeError:
        default = None
    modes = {module: module.training for module in model.modules()}
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        model.eval()
        with torch.no_grad():
            model([image]) if default is not None else model(image[None])
    except Exception as error:  # whatever the user's model raises on an image that does not suit it
        raise UserError(
            f"{type(model).__name__} cannot take an image of {height} x {width} pixels: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    order = sorted(found.values(), key=lambda entry: entry.path != default)
    return order, frames[0] if frames else (height, width), default
