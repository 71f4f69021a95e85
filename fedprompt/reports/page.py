"""Renders a report as one HTML file: a template, its style and script, and the figures' data.

The file needs no other file and no network. Everything that comes from a run is escaped, by Jinja2
or as JSON. The page's content security policy allows only its own script, which writes text and
never HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fedprompt.files import asset
from fedprompt.reports.figure import Figure
from fedprompt.reports.format import MISSING, percent

MARKS = (b'<meta name="generator" content="fedprompt">', b"script-src 'sha256-")
"""What tells our pages from those of the user; those of older versions have the second only."""
SCRIPT, STYLE = "charts.js", "report.css"


def page_environment() -> jinja2.Environment:
    """Jinja2 for the templates in `assets/`, with everything escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(asset(f"reports/assets/{STYLE}").parent),
        autoescape=True,
        # A name that is missing in the content is an error rather than an empty place in the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, figures: Sequence[Figure], content: Mapping[str, Any]) -> str:
    """Fill the template of a page.

    Args:
        template: The name of a file in `assets/`.
        figures: What the page's script draws, in order.
        content: Values for the other names in the template.

    Returns:
        The HTML of the page.
    """
    environment = page_environment()
    environment.filters |= {"percent": percent, "count": count, "unbroken": unbroken}
    script = asset(f"reports/assets/{SCRIPT}").read_text(encoding="utf-8")
    # The content security policy names, by its digest, the one script that may run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        figures=figures,
        figures_json=_json({figure.name: figure.spec() for figure in figures}),
        style=Markup(asset(f"reports/assets/{STYLE}").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def is_whole(path: Path) -> bool:
    """Whether a page exists and was written to its end."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - 100))
            return stream.read().rstrip().endswith(b"</html>")
    except OSError:
        return False


def _json(value: Any) -> Markup:
    """Serialise a value as JSON without characters that could end the HTML element around it."""
    # NaN is not JSON: the page's script could not parse it, so it must fail here.
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def unbroken(text: str) -> str:
    """Insert no-break spaces, so that a narrow table cell breaks before `±` and nowhere else."""
    return text.replace("± ", "±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def count(number: int | None) -> str:
    """Format a count as `2,048`, or as a dash if it is None."""
    return MISSING if number is None else f"{number:,}"
