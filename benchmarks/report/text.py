"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping

from kdkernels.report.tables import Table


def number(value: float | None, suffix: str = "") -> str:
    """Three significant digits, no exponents between 0.001 and a million; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return text + suffix


def between(quantiles: Mapping[str, float] | None) -> str:
    """ "p20 to p80"."""
    return f"{number(quantiles['p20'])} to {number(quantiles['p80'])}" if quantiles else ""


def without_empty_columns(table: Table) -> Table:
    """The table without the columns in which nothing stands; the first stays."""
    kept = [i for i in range(len(table.columns)) if i == 0 or any(row[i] for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.title, [table.columns[i] for i in kept], rows, table.notes)


def reason(status: str, who: str, text: str) -> str:
    """A note on who has no time, as one paragraph of Markdown whatever an exception's text holds."""
    plain = " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return f"{status}: {who}: {plain}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
