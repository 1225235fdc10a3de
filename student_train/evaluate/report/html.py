"""HTML of a report, by hand: a page in one file that needs no network, no script and no font of its own.

In: strings, which are escaped here unless they are `Html`. Out: `Html`. Pictures come as data URIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NewType

from teacher_cache.outside import visible

Html = NewType("Html", str)
"""Text that is HTML already."""

_STYLE = """
:root { --ink: #1d232b; --soft: #5f6670; --line: #e3e6ea; --paper: #fff; --wash: #f6f7f9; --blue: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 52px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 8px 0; max-width: 76ch; }
.soft, figcaption, .note { color: var(--soft); font-size: 13.5px; }
nav { margin: 18px 0 0; font-size: 13.5px; }
nav a { margin-right: 16px; }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 26px 0 0; }
.fact { flex: 1 1 140px; background: var(--wash); border-radius: 8px; padding: 12px 14px; }
.fact b { display: block; font-size: 19px; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.fact span { color: var(--soft); font-size: 12.5px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; padding-left: 14px; white-space: nowrap; }
td { overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
figure { margin: 14px 0; }
figure img { max-width: 100%; height: auto; display: block; }
pre { background: var(--wash); border-radius: 8px; padding: 12px 14px; margin: 8px 0; font: 12.5px/1.5 ui-monospace,
  SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.missing { border-left: 3px solid var(--line); padding: 4px 0 4px 14px; color: var(--soft); }
@media print {
main { padding: 0; max-width: none; }
h2, h3 { break-after: avoid; }
figure, tr { break-inside: avoid; }
.scroll { overflow-x: visible; }
table { font-size: 11px; }
th, td { padding: 3px 8px 3px 0; }
td.number, th.number { padding-left: 8px; }
}
""".strip()


def _text(text: str) -> str:
    """In one line, with nothing in it that acts in HTML or steers how other text looks."""
    return escape(visible(text))


def page(title: str, body: Sequence[Html]) -> Html:
    """A whole document."""
    return Html(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, parts: Sequence[Html]) -> Html:
    """A part of the page under a heading."""
    return Html(f'<section id="{anchor}">\n<h2>{_text(title)}</h2>\n' + "\n".join(parts) + "\n</section>")


def heading_one(text: str) -> Html:
    """The name of the page."""
    return Html(f"<h1>{_text(text)}</h1>")


def heading(text: str) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{_text(text)}</h3>")


def contents(titles: Sequence[tuple[str, str]]) -> Html:
    """Links to sections, given as anchor and title."""
    return Html("<nav>" + "".join(f'<a href="#{anchor}">{_text(title)}</a>' for anchor, title in titles) + "</nav>")


def facts(entries: Sequence[tuple[str, str]]) -> Html:
    """Tiles: what something is called, and what it is."""
    tiles = (f'<div class="fact"><span>{_text(name)}</span><b>{_text(value)}</b></div>' for name, value in entries)
    return Html('<div class="facts">' + "".join(tiles) + "</div>")


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph; `kind` is a class of the style sheet."""
    return Html(f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>")


def missing(reason: str, command: str | None = None) -> Html:
    """Where a section has nothing to show: why, and the command that makes it if there is one."""
    code = "" if command is None else code_block(command)
    return Html(f'<div class="missing"><p>{_text(reason)}</p>{code}</div>')


def code_block(text: str) -> Html:
    """Commands, as they are typed, one a line."""
    return Html("<pre>" + "\n".join(map(_text, text.split("\n"))) + "</pre>")


def picture(uri: str, description: str, caption: str = "") -> Html:
    """A picture that the page carries itself; `description` is for those who do not see it."""
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return Html(f'<figure><img src="{_text(uri)}" alt="{_text(description)}">{below}</figure>')


def table(columns: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> Html:
    """A table whose first `words` columns are words and the others numbers."""

    def cell(tag: str, place: int, text: str) -> str:
        return f"<{tag}>{_text(text)}</{tag}>" if place < words else f'<{tag} class="number">{_text(text)}</{tag}>'

    head = "".join(cell("th", place, text) for place, text in enumerate(columns))
    rows = ("<tr>" + "".join(cell("td", place, text) for place, text in enumerate(line)) + "</tr>" for line in lines)
    start = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return Html(f'<div class="scroll"><table>{start}<tbody>' + "".join(rows) + "</tbody></table></div>")
