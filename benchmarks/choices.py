"""Options that take a comma list of known values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


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
