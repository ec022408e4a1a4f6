"""The command line, `kdkernels bench` and `python -m benchmarks`: the first word chooses what is done, without one it is the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

#: First word -> module with `add_arguments(parser)` and `main(args)`, what it does. Imported only when asked for.
COMMANDS = {
    "compare": (".compare.run", "two git revisions against each other"),
    "report": (".report.run", "tables and plots of results"),
    "speed-of-light": (".report.speed_of_light", "how far everybody is from the time that the ideal bytes take"),
    "scaling": (".scaling", "the cost by number of images and by their size, all sizes in turns"),
    "traffic": (".traffic", "what the kernels of one call move, as Nsight Compute counts it"),
    "step": (".steps.run", "whole training steps of real detectors"),
    "tune": (".tune.run", "launch parameters of the Triton kernels for the GPU that is there"),
    "choose": (".choose.run", "which backend is fastest for each primitive on the GPU that is there"),
    "codegen": (".codegen.run", "what the compiler makes of the Triton kernels, without a GPU"),
    "native-codegen": (".codegen.native.run", "what nvcc has made of the native library's CUDA kernels, without a GPU"),
    "list": (".listing", "entries, cases and providers, and why one cannot run here"),
}
RUN = (".run", "Time every provider on entries and cases; a provider whose results are wrong gets no time.")


def main(argv: Sequence[str] | None = None, prog: str = "kdkernels bench") -> int:
    """Exit code: 0 done, 1 something failed, was rejected or is slower, 2 usage, 130 Ctrl-C; `compare` has others besides."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and not words[0].startswith("-") else None
    if command is not None and command not in COMMANDS:
        print(f"{prog}: unknown command {command!r}; the commands are {', '.join(COMMANDS)}, and options alone measure", file=sys.stderr)
        return 2
    path, text = RUN if command is None else COMMANDS[command]
    module = import_module(path, __package__)
    others = None if command else "other commands: " + "; ".join(f"{name}: {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(f"{prog} {command}" if command else prog, description=text, epilog=others)
    module.add_arguments(parser)
    try:
        args = parser.parse_args(words)
        _check_device(parser, args)
    except SystemExit as end:
        return int(end.code or 0)
    return module.main(args)


def _check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Every command that has --device is told at once that it is not there."""
    if getattr(args, "device", None) is None:
        return
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
