"""Self-contained HTML pages: one file, no script or style from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2530 }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem; color: #1f4e8c }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; border-bottom: 1px solid #dde3ea; text-align: left;
vertical-align: top } td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f7fa; padding: .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
font: 14px/1.45 ui-monospace, monospace }
.good { color: #2a7a2a } .bad { color: #b03a2e } .quiet { color: #66707c }
"""


def page(title: str, body: Sequence[str], *, style: str = "") -> str:
    """A whole page; `body` is HTML already, `title` is text."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width">'
    return f"{head}{view}<style>{STYLE}{style}</style>\n" + "\n".join(body) + "</html>\n"
