"""A report as one HTML page that needs nothing else.

The page's parts lie beside this file. The text of prompt and answer is anybody's: it goes in as JSON in which
no character can end a script, the page shows it as text nodes only, and its policy lets no other script run.
"""

import base64
import hashlib
from pathlib import Path

from cluster.trace.report import Report

_PARTS = Path(__file__).parent
# Written as escapes in JSON strings; outside of strings JSON has none of them.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(report: Report) -> str:
    """The page."""
    style, script = _read("page.css"), _read("page.js")
    page = _read("page.html")
    # The data comes last: nothing in it is taken for a placeholder.
    for name, text in (
        ("STYLE_HASH", _digest(style)),
        ("SCRIPT_HASH", _digest(script)),
        ("STYLE", style),
        ("SCRIPT", script),
        ("DATA", embed(report.to_json())),
    ):
        page = page.replace("{{" + name + "}}", text)
    return page


def embed(text: str) -> str:
    """JSON that may stand in a script element, whatever its strings say."""
    return text.translate(_ESCAPES)


def _read(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
