"""What a comparison of methods consists of: its arenas, its runs in their order, and what identifies a finished one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdkernels import recipes
from kdkernels.models import DetectorSpec
from kdkernels.recipes import Comparison
from kdkernels.report.comparison import BASELINE, label

#: Parts of a recipe that say nothing about a single run, or that its hash has by themselves.
APART = ("teacher_steps", "student_steps", "losses", "aid_alpha", "timing_rounds")


@dataclass(frozen=True)
class Arena:
    """A kind of detector with a teacher and students of its own; those with a distribution are for the methods that need one."""

    detector: str
    distribution: bool = False

    @property
    def name(self) -> str:
        return f"{self.detector}, distribution" if self.distribution else self.detector


@dataclass(frozen=True)
class Job:
    """A student to train."""

    arena: Arena
    method: str
    aid: bool
    seed: int

    @property
    def label(self) -> str:
        return label(self.method, self.aid)

    @property
    def title(self) -> str:
        return f"{self.arena.name}: {self.label}, seed {self.seed}"

    def losses(self) -> dict[str, dict[str, Any]]:
        """The descriptions of its losses."""
        return recipes.method_entries(self.method, self.arena.detector, self.aid) if self.method else {}


@dataclass(frozen=True)
class Plan:
    """Everything that a comparison is to have rows for."""

    detectors: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    aid: bool

    def arenas(self) -> list[Arena]:
        """Those of the methods that need no distribution first."""
        kinds = dict.fromkeys(sorted(map(needs_distribution, self.methods)))
        return [Arena(detector, kind) for kind in kinds for detector in self.detectors]

    def jobs(self) -> list[Job]:
        """Seed by seed, so that wherever it stops every method has about as many: baselines, the methods, the methods with AID."""
        found = []
        for seed in range(self.seeds):
            found += [Job(arena, BASELINE, False, seed) for arena in self.arenas()]
            for aid in (False, True) if self.aid else (False,):
                found += [
                    Job(Arena(detector, needs_distribution(method)), method, aid, seed)
                    for method in self.methods
                    for detector in self.detectors
                ]
        return found

    def joined(self, other: Plan) -> Plan:
        """What either asks for."""
        detectors = tuple(dict.fromkeys((*self.detectors, *other.detectors)))
        methods = tuple(dict.fromkeys((*self.methods, *other.methods)))
        return Plan(detectors, methods, max(self.seeds, other.seeds), self.aid or other.aid)


def slug(text: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())


def needs_distribution(method: str) -> bool:
    return any(part in recipes.DISTRIBUTIONS for part in method.split("+"))


def digest(recipe: Comparison, spec: DetectorSpec, steps: int, seed: int, losses: Mapping[str, Any], *more: str) -> str:
    """SHA-256 of what a run's numbers depend on besides the code, whose commit stands in its row."""
    own = {key: value for key, value in asdict(recipe).items() if key not in APART}
    values = [own, spec.to_dict(), steps, seed, dict(losses), torch.__version__, *more]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
