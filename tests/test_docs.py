"""The documents keep their word: snippets run, commands exist, tables and pictures are those of the result files, links lead somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.cli import COMMANDS, RUN
from benchmarks.report import page as device_page
from benchmarks.report.run import fingerprint, load, result_files
from benchmarks.report.tables import DOCUMENTS, PICTURES, RESULTS, filled
from kdkernels.losses.catalogue import METHODS

ROOT = Path(__file__).parent.parent
REMEDY = "run: python -m benchmarks.report.tables"
SOURCES = result_files(RESULTS.parent)
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
COMMAND = re.compile(r"^ *(?:kdkernels bench|python -m benchmarks(?= |$))(.*?)(?: #.*)?$", re.MULTILINE)
BENCH = [
    (page, words)
    for page in PAGES
    for code in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    for words in COMMAND.findall(code)
]
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
    assert filled(text) == text, REMEDY


@pytest.mark.parametrize(("page", "words"), BENCH, ids=[f"{page.name}-{n}" for n, (page, _) in enumerate(BENCH)])
def test_bench_commands_are_understood(page: Path, words: str) -> None:
    command, *options = [*shlex.split(words), ""] if not words.strip().startswith("-") else ["", *shlex.split(words), ""]
    path, _ = COMMANDS[command] if command else RUN
    parser = argparse.ArgumentParser(exit_on_error=False)
    module = import_module(path, "benchmarks")
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    assert parser.parse_args(options[:-1]) is not None and callable(module.main)


@pytest.mark.parametrize("label", SOURCES)
def test_pages_come_from_the_result_files(label: str) -> None:
    images = [path.name for path in PICTURES.glob(f"{label}-*.png")]
    written = PICTURES / f"{label}.md"
    assert written.is_file() and written.read_text() == device_page.page(label, load(SOURCES[label]), images), REMEDY


@pytest.mark.parametrize("label", SOURCES)
def test_pictures_are_drawn_from_the_result_files(label: str) -> None:
    """Each carries the fingerprint of the files that it was drawn from."""
    pictures = sorted(PICTURES.glob(f"{label}-*.png"))
    assert pictures, REMEDY
    for picture in pictures:
        assert fingerprint(SOURCES[label]).encode() in picture.read_bytes(), f"{picture.name}: {REMEDY}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_are_there_and_referenced() -> None:
    """Links to pictures are links, so they lead somewhere; and no picture lies about that no page shows."""
    shown = {(page.parent / target).resolve() for page in PAGES for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())}
    assert all(path.is_file() for path in shown)
    assert {path.resolve() for path in PICTURES.glob("*.png")} <= shown


def test_every_method_has_a_page_with_its_table_and_its_picture() -> None:
    for name, (_, kind) in METHODS.items():
        page = ROOT / "docs" / "methods" / f"{kind.__module__.rpartition('.')[2]}.md"
        assert f"<!-- table: method-{name} -->" in page.read_text()
        assert page.with_suffix(".png").is_file() and f"({page.stem}.png)" in page.read_text()


def test_readme_starts_with_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text().split("## ")[0]
    assert "make demo" in first and "make test" in first
