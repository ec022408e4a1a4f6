"""The comparison as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

from . import statistics
from .rounds import Result
from .worktrees import Tree

#: What needs a look comes first.
ORDER = ("broken", "slower", "undecided", "removed", "new", "faster", "same")
COLUMNS = ("verdict", "entry", "mode", "provider", "case", "base ms", "head ms", "head / base", "95 % interval", "rounds")


def markdown(results: Sequence[Result], base: Tree, head: Tree, machine: Mapping[str, Any], threshold: float) -> str:
    """One table, what needs a look first, and below it what it takes to read it."""
    shown = sorted((result for result in results if result.verdict != "absent"), key=lambda result: ORDER.index(result.verdict))
    counts = [f"{sum(r.verdict == verdict for r in shown)} {verdict}" for verdict in ORDER if any(r.verdict == verdict for r in shown)]
    lines = [f"### {head.name} against {base.name}: {', '.join(counts) or 'nothing could be compared'}", ""]
    if shown:
        lines += [_line(COLUMNS), "|" + " --- |" * 5 + " ---: |" * 5, *(_line(_row(result)) for result in shown), ""]
    lines += [f"- {note}" for note in _notes(results, base, head, machine, threshold)]
    return "\n".join(lines) + "\n"


def document(
    results: Sequence[Result], base: Tree, head: Tree, provenance: Sequence[Mapping[str, Any]], threshold: float, rounds: int
) -> dict[str, Any]:
    """All of it, every ratio included."""
    return {
        "schema": 1,
        "kind": "compare",
        "base": {**base.as_dict(), "provenance": provenance[0]},
        "head": {**head.as_dict(), "provenance": provenance[1]},
        "rule": {
            "threshold": threshold,
            "confidence": statistics.CONFIDENCE,
            "false_alarms": statistics.ALARMS,
            "first_round": statistics.FIRST,
            "most_rounds": rounds,
        },
        "cells": [_cell(result) for result in results],
    }


def _cell(result: Result) -> dict[str, Any]:
    found = result.judgement
    return {
        **result.wanted.as_dict(),
        "control": result.wanted.control,
        "verdict": result.verdict,
        "reason": result.reason,
        "ratio": None if found is None else found.ratio,
        "interval": None if found is None else [found.low, found.high],
        "ratios": [exp(x) for x in result.logs],
        "base_ms": [base for base, _ in result.ms],
        "head_ms": [head for _, head in result.ms],
    }


def _row(result: Result) -> list[str]:
    wanted, found = result.wanted, result.judgement
    provider = f"{wanted.provider} (control)" if wanted.control else wanted.provider
    verdict = f"**{result.verdict}**" if result.verdict in ORDER[:3] else result.verdict
    row = [verdict, wanted.entry, wanted.mode, provider, wanted.case.name]
    if found is None:
        return [*row, "", "", "", "", str(len(result.logs))]
    times = [f"{sorted(ms)[len(ms) // 2]:.4g}" for ms in zip(*result.ms, strict=True)]
    return [*row, *times, f"{found.ratio:.3f}", f"{found.low:.3f} to {found.high:.3f}", str(len(result.logs))]


def _notes(results: Sequence[Result], base: Tree, head: Tree, machine: Mapping[str, Any], threshold: float) -> list[str]:
    percent = f"{100 * threshold:g} %"
    notes = [
        f"Slower or faster: the bootstrap interval of the median ratio lies wholly beyond {percent}, and so many rounds do that equal "
        f"versions get there in less than {100 * statistics.ALARMS:g} % of all comparisons, whatever the noise. Same: the interval lies "
        f"within {percent}. A round is a fresh pair of processes that take turns.",
    ]
    if machine:
        versions = machine["versions"]
        notes.append(f"Measured on {machine['device']} ({machine['cpu']}, {machine['threads']} threads), torch {versions['torch']}.")
    told: dict[str, list[str]] = {}
    for result in results:
        if result.reason and result.verdict != "absent":
            told.setdefault(f"{result.verdict}: {_plain(result.reason)}", []).append(result.wanted.name)
    notes += [f"{why} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})" for why, names in told.items()]
    absent = {result.wanted.provider: _plain(result.reason) for result in results if result.verdict == "absent"}
    notes += [f"Not compared, absent from both: {name} ({reason})." for name, reason in absent.items()]
    notes += [f"{tree.name}: {_plain(tree.build)}" for tree in (base, head) if tree.build]
    if any(result.wanted.control and result.verdict in ("slower", "faster") for result in results):
        notes.append(
            "**A control differs**: its code is the same in both versions, so this machine is too restless for the other verdicts."
        )
    return notes


def _plain(text: str) -> str:
    return " ".join(text.split())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
