"""Pieces of a self-contained HTML page: readable on a phone, in light and dark, in any script, without a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light; --ink: #1c2530; --quiet: #66707c; --line: #dde3ea; --soft: #f5f7fa; --accent: #1f4e8c }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, "Hiragino Sans", "Noto Sans CJK JP", "Noto Sans JP", "Yu Gothic", sans-serif;
  max-width: 62rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; color: var(--ink); background: #fff }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; color: var(--accent) }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch }
table { border-collapse: collapse; font-size: .94rem }
td, th { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { background: var(--soft); border-radius: 6px; padding: .7rem .9rem; font-size: .84rem; line-height: 1.5; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere }
img { width: 100%; height: auto; display: block }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .8rem 1.4rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1rem 0 }
.card { background: var(--soft); border-radius: 6px; padding: .6rem .8rem }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums }
.split { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; background: var(--line) }
.split span { min-width: 2px } .key { display: inline-block; width: .8em; height: .8em; border-radius: 2px }
.answer { border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; margin: .7rem 0 }
:where(.answer dt) { color: var(--quiet); font-size: .84rem } .answer dd { margin: 0 0 .5rem; overflow-wrap: anywhere }
.answer dd pre { padding: .4rem .6rem }
.good { color: #23702a } .bad { color: #b03a2e } .quiet, small { color: var(--quiet) }
.alarm { border-left: 4px solid #b03a2e; background: #fbefed; padding: .7rem .9rem; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Cell:
    """A table's cell that is more than text."""

    text: str
    style: str = ""
    """Classes of the page's style, like `number good`."""
    title: str = ""
    """Shown when pointed at."""
    note: str = ""
    """Small, below the text."""
    note_style: str = ""


def number(text: str, style: str = "", **more: str) -> Cell:
    """A cell aligned as numbers are; `more` are further fields."""
    return Cell(text, f"number {style}".strip(), **more)


def page(title: str, body: Iterable[str], *, style: str = "") -> str:
    """A whole document; pieces of `body` are HTML, `style` is added to the style that all pages share."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{viewport}<title>{escape(title)}</title>'
    return f"{head}<style>{_STYLE}{style}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def table(rows: Iterable[Sequence[str | Cell]], head: Sequence[str | Cell] = ()) -> str:
    """Rows of text or cells; wide tables scroll by themselves."""
    lines = ["<tr>" + "".join(_cell(one, "th") for one in head) + "</tr>"] if head else []
    lines += ["<tr>" + "".join(_cell(one, "td") for one in row) + "</tr>" for row in rows]
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def _cell(cell: str | Cell, tag: str) -> str:
    one = cell if isinstance(cell, Cell) else Cell(cell)
    style = f' class="{one.style}"' if one.style else ""
    title = f' title="{escape(one.title)}"' if one.title else ""
    note = f'<br><small class="{one.note_style}">{escape(one.note)}</small>' if one.note else ""
    return f"<{tag}{style}{title}>{escape(one.text)}{note}</{tag}>"


def picture(png: bytes, alt: str) -> str:
    """A PNG within the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def verbatim(text: str) -> str:
    """Text as it stands, long lines broken."""
    return f"<pre>{escape(text)}</pre>"


def paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def cards(facts: Iterable[tuple[str, str]]) -> str:
    """A few large numbers, each with what it is."""
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{escape(value)}</b><small>{escape(name)}</small></div>' for name, value in facts
        )
        + "</div>"
    )


def split(parts: Sequence[tuple[str, float, str]]) -> str:
    """A bar of shares: name, size, size in words; and its legend."""
    colours = ("#9bb8d9", "#1f4e8c", "#c8502d", "#c9d0d8")
    total = sum(size for _, size, _ in parts) or 1.0
    pieces, legend = [], []
    for (name, size, words), colour in zip(parts, colours, strict=False):
        pieces.append(f'<span style="width:{size / total:.2%};background:{colour}" title="{escape(name)}"></span>')
        legend.append(f'<span class="key" style="background:{colour}"></span> {escape(name)} {escape(words)}')
    return f'<div class="split">{"".join(pieces)}</div><p>{"&ensp; ".join(legend)}</p>'
