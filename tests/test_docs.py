"""The documents keep their word: snippets run, tables are those of the result files, links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from tables import DOCUMENTS, filled  # noqa: E402

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
SNIPPETS = [(page, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[f"{page.name}-{n}" for n, (page, _) in enumerate(SNIPPETS)])
def test_snippets_run(page: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, page.name, "exec"), {"__name__": "snippet"})
    if page.name == "README.md":
        assert "kd_gkd" in capsys.readouterr().out


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_come_from_the_result_files(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "<!-- table:" in text
    assert filled(text) == text, "run: python benchmarks/tables.py"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_starts_with_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text().split("## ")[0]
    assert "make demo" in first and "make test" in first
