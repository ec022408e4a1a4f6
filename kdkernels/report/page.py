"""A report as one HTML file that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import jinja2

from .tables import Table

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } pre { background: #f6f6f6; padding: 1em; overflow: auto }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ table.title }}</p>
<table><tr>{% for c in table.columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for note in table.notes %}<p>{{ note }}</p>{% endfor %}
{% for caption, data in pictures.items() %}<h2>{{ caption }}</h2><img alt="{{ caption }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
<h2>Numbers</h2><pre>{{ details }}</pre>
</body></html>
"""


def write_page(out: Path, title: str, table: Table, pictures: Mapping[str, Path], details: str) -> Path:
    """A page with a table, pictures (caption -> PNG file) and `details` as preformatted text."""
    encoded = {caption: base64.b64encode(path.read_bytes()).decode("ascii") for caption, path in pictures.items()}
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    out.write_text(template.render(title=title, table=table, pictures=encoded, details=details), encoding="utf-8")
    return out
