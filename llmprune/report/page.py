"""A report on one page: self-contained, no scripts, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader


def write_page(path: Path, report: dict[str, Any], measured: list[dict[str, Any]]) -> None:
    """Write the report of a run as HTML. `measured`: rows of name, perplexity, its protocol, and a sample text."""
    # everything that comes from outside (model names, generated text) is escaped
    pages = Environment(loader=PackageLoader("llmprune.report", "."), autoescape=True)
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False)
    worst = max((row["error"] or 0.0 for row in report["tensors"]), default=0.0)
    html = pages.get_template("page.html").render(report=report, measured=measured, recipe=recipe, worst=worst or 1.0)
    path.write_text(html, encoding="utf-8")
