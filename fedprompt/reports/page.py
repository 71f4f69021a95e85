"""A report as one HTML file: a template, its own style and script, and the figures' data.

The file needs no other file and no network. Everything that comes from a run is escaped, by Jinja2
or as JSON. The page's content policy allows only its own script, which writes text, never HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from fedprompt.files import asset
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import MISSING, percent

SCRIPT, STYLE = "charts.js", "report.css"


def render(template: str, figures: Sequence[Figure], content: Mapping[str, Any]) -> str:
    """Fill a page's template.

    Args:
        template: Name of a file in `assets/`.
        figures: What the page's script draws, in order.
        content: Values of the template's other names.

    Returns:
        The page's HTML.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(asset(f"reports/assets/{template}").parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count, "unbroken": unbroken}
    script = asset(f"reports/assets/{SCRIPT}").read_text(encoding="utf-8")
    # The content policy names the one script that may run by its digest.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        figures=figures,
        figures_json=_json({figure.name: figure.spec() for figure in figures}),
        style=Markup(asset(f"reports/assets/{STYLE}").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _json(value: Any) -> Markup:
    """JSON without any character that could end the element which holds it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def unbroken(text: str) -> str:
    """The text with no-break spaces, so that a narrow cell breaks before `±` and nowhere else."""
    return text.replace("± ", "±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def count(number: int | None) -> str:
    """A count as `2,048`, or a dash where it is None."""
    return MISSING if number is None else f"{number:,}"
