"""Tables and pictures of what was measured. The pictures need matplotlib and are in modules of their own."""

from .tables import Table, demo_table, metrics_table, run_table, to_markdown, to_rich

__all__ = ["Table", "demo_table", "metrics_table", "run_table", "to_markdown", "to_rich"]
