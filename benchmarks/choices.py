"""Types of options: comma lists of known values, and numbers that are refused in words."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from .compare import statistics


def choices(known: Sequence[Any]) -> Callable[[str], list[Any]]:
    """An argparse type: "a,b" -> [a, b], each one of `known` and of its type; anything else is refused with the choices named."""
    by_text = {str(value): value for value in known}

    def parse(text: str) -> list[Any]:
        words = list(dict.fromkeys(word.strip() for word in text.split(",")))
        unknown = [word for word in words if word not in by_text]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(map(repr, unknown))}; choose from {', '.join(by_text)}")
        return [by_text[word] for word in words]

    return parse


def seconds(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, a number above 0; got {text!r}")
    return value


def whole(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more; got {text!r}")
    return value


def rounds(text: str) -> int:
    """An argparse type: so many paired rounds that they can decide anything."""
    value = whole(text)
    if value < statistics.FIRST:
        raise argparse.ArgumentTypeError(f"fewer than {statistics.FIRST} rounds decide nothing")
    return value
