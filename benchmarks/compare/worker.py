"""A process that measures one version of kdkernels: one JSON request a line on stdin, one JSON answer a line on stdout.

It says first whether it can work at all: {"status": "ready", "provenance": {...}} or {"status": "failed", "reason"}. Then:

    {"do": "open", "cell": {...}, "verify": bool} -> {"status": "ready" | "absent" | "rejected" | "failed", "reason"}
    {"do": "burst", "calls": n}                   -> {"status": "ready", "ms": [...]} | {"status": "failed", "reason"}
    {"do": "close"}                               -> {"status": "ready"}

A new cell replaces the one before, so that only one is in memory. The end of stdin ends the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..measure.cell import Cell

Answer = dict[str, Any]


class OwnModules:
    """A finder for sys.meta_path: kdkernels from where its package lies or not at all.

    An editable install offers its own submodules in place of those that an older version lacks.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "kdkernels":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


class Session:
    """Everything that needs kdkernels: imported here, so that a version that cannot be imported is an answer and not a crash."""

    def __init__(self, tree: Path, device: str, threads: int | None, seed: int, unbuilt: str, describe: bool) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        import kdkernels

        found = Path(str(kdkernels.__file__)).resolve()
        if not found.is_relative_to(tree.resolve()):
            raise RuntimeError(f"kdkernels was imported from {found.parent} and not from the version to be measured")
        from .. import registry
        from ..measure.cell import Cell
        from ..measure.provenance import provenance
        from ..providers import absent, providers

        self._make, self._absent, self._providers, self._registry = Cell, absent, providers(), registry
        self._device, self._seed, self._unbuilt = torch.device(device), seed, unbuilt
        self._cell: Cell | None = None
        self._provider = ""
        self.provenance = provenance(self._device, seed) if describe else {}

    def answer(self, request: dict[str, Any]) -> Answer:
        """What the request asks for; an exception is an answer too."""
        try:
            if request["do"] == "open":
                self._cell = None
                return self._open(request["cell"], request["verify"])
            if request["do"] == "burst":
                if self._cell is None:
                    raise RuntimeError("no cell is open")
                return {"status": "ready", "ms": self._cell.burst(self._provider, request["calls"])}
            self._cell = None
            return {"status": "ready"}
        except Exception as error:
            return {"status": "failed", "reason": said(error)}

    def _open(self, wanted: dict[str, Any], verify: bool) -> Answer:
        provider, case = self._providers[wanted["provider"]], self._registry.Case(**wanted["case"])
        entry = self._registry.ENTRIES.get(wanted["entry"])
        why = self._absent(provider, self._device, entry, case)
        if why:
            # A library that has sources and does not build is not absent on purpose.
            failed = self._unbuilt and provider.backend == "native"
            return {"status": "failed", "reason": self._unbuilt} if failed else {"status": "absent", "reason": why}
        if entry is None:
            unusable = self._registry.UNUSABLE
            return {"status": "failed", "reason": unusable.get(wanted["entry"]) or "; ".join(unusable.values()) or "no such entry"}
        cell = self._make(entry, case, wanted["mode"], self._device, self._seed)
        reason = cell.admit(provider).reason
        if not reason and verify and provider.name != "eager":
            # The gate's oracle is this version's own reference; whether that is still right, the benchmark's eager form tells.
            reason = cell.admit(self._providers["eager"]).reason
            reason = reason and f"this version's reference disagrees with the benchmark's eager form: {reason}"
        if reason:
            return {"status": "rejected", "reason": reason}
        self._cell, self._provider = cell, provider.name
        return {"status": "ready", "reason": ""}


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> int:
    # Answers go through a copy of stdout that nobody else knows: what a library prints must not look like one.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--unbuilt", default="", help="why this version's native library could not be built")
    parser.add_argument("--describe", action="store_true", help="say the provenance")
    args = parser.parse_args()
    sys.meta_path.insert(0, OwnModules)
    try:
        session = Session(args.tree, args.device, args.threads, args.seed, args.unbuilt, args.describe)
    except Exception as error:
        print(json.dumps({"status": "failed", "reason": said(error)}), file=channel)
        return 1
    print(json.dumps({"status": "ready", "provenance": session.provenance}), file=channel)
    for line in sys.stdin:
        print(json.dumps(session.answer(json.loads(line))), file=channel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
