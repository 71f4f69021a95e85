"""A report as one HTML file: a template, its own style and script, and the charts' data.

The file needs nothing else. Everything that comes from a run is escaped, by Jinja2 or as JSON; the
page's content policy lets only its own script run, which writes text and never HTML.
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
from fedprompt.reports.charts import Chart, by_name
from fedprompt.reports.format import MISSING, percent

SCRIPT, STYLE = "charts.js", "report.css"


def render(template: str, charts: Sequence[Chart], content: Mapping[str, Any]) -> str:
    """The page that the template makes of `content` and of the charts."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(asset(f"reports/assets/{template}").parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count, "unbroken": unbroken}
    script = asset(f"reports/assets/{SCRIPT}").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        charts=charts,
        charts_json=_json(by_name(charts)),
        style=Markup(asset(f"reports/assets/{STYLE}").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _json(value: Any) -> Markup:
    """JSON without a character that could end its element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def unbroken(text: str) -> str:
    """No-break spaces, so that a narrow cell breaks before `±` and nowhere else."""
    return text.replace("± ", "±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def count(number: int | None) -> str:
    """`2,048`, or a dash."""
    return MISSING if number is None else f"{number:,}"
