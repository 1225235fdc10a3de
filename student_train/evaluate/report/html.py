"""HTML of a report: a page in one file that needs no network, no script and no font of its own.

In: strings, all of which Jinja escapes unless they are `Html`. Out: `Html`. Pictures come as data URIs. Each function
here is a macro of `_PIECES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from teacher_cache.outside import visible

Html = Markup
"""Text that is HTML already."""
LACKING = "–"
"""What stands in a table where there is nothing."""

_STYLE = """
:root { --ink: #1d232b; --soft: #5f6670; --line: #e3e6ea; --paper: #fff; --wash: #f6f7f9; --blue: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 28px 80px; overflow-wrap: anywhere; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 15px; margin: 30px 0 0; }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 8px 0; max-width: 76ch; }
.soft, figcaption, .note { color: var(--soft); font-size: 13.5px; }
dl { margin: 26px 0 0; padding: 6px 20px 12px; border-left: 4px solid var(--blue); background: var(--wash); }
dt { color: var(--soft); font-size: 12.5px; margin: 10px 0 0; }
dd { margin: 0; font-size: 16px; max-width: 76ch; }
details { border-top: 1px solid var(--line); }
details[open] { padding-bottom: 26px; }
summary { cursor: pointer; font-size: 17px; font-weight: 600; padding: 13px 0; }
summary:hover { color: var(--blue); }
section:first-of-type { margin-top: 40px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 10px 0 0; }
.fact { flex: 1 1 140px; background: var(--wash); border-radius: 8px; padding: 12px 14px; }
.fact b { display: block; font-size: 17px; font-weight: 600; line-height: 1.3; }
.fact span { color: var(--soft); font-size: 12.5px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; padding-left: 14px; white-space: nowrap; }
td { min-width: 10ch; }
td:first-child, td.number { min-width: 0; white-space: nowrap; }
figure { margin: 14px 0; overflow-x: auto; }
figure img { max-width: 100%; height: auto; display: block; }
pre { background: var(--wash); border-radius: 8px; padding: 12px 14px; margin: 8px 0; font: 12.5px/1.5 ui-monospace,
  SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.missing { border-left: 3px solid var(--line); padding: 4px 0 4px 14px; color: var(--soft); }
@media (max-width: 640px) {
main { padding: 22px 16px 60px; }
h1 { font-size: 25px; }
dl { padding: 4px 14px 10px; }
dd { font-size: 15px; }
/* words in pictures stay readable: a picture moves within its own box, not the page */
figure img { max-width: none; width: 640px; }
.fact { flex-basis: 120px; }
}
@media print {
details::details-content { content-visibility: visible; }
main { padding: 0; max-width: none; }
h2, h3 { break-after: avoid; }
figure, tr { break-inside: avoid; }
.scroll { overflow-x: visible; }
table { font-size: 11px; }
th, td { padding: 3px 8px 3px 0; }
td.number, th.number { padding-left: 8px; }
}
""".strip()
_PIECES = """
{% macro page(title, style, body) %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style }}
</style>
</head>
<body>
<main>
{% for piece in body %}
{{ piece }}
{% endfor %}
</main>
</body>
</html>
{% endmacro %}

{% macro section(anchor, title, parts) %}
<section id="{{ anchor }}">
<details>
<summary>{{ title }}</summary>
{% for part in parts %}
{{ part }}
{% endfor %}
</details>
</section>
{% endmacro %}

{% macro said(entries) -%}
<dl>{% for label, text in entries %}<dt>{{ label }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
{%- endmacro %}

{% macro facts(title, entries) -%}
<h2>{{ title }}</h2><div class="facts">
{%- for name, value in entries %}<div class="fact"><span>{{ name }}</span><b>{{ value }}</b></div>{% endfor -%}
</div>
{%- endmacro %}

{% macro simple(tag, text, kind) -%}
<{{ tag }}{% if kind %} class="{{ kind }}"{% endif %}>{{ text }}</{{ tag }}>
{%- endmacro %}

{% macro code(lines) -%}
<pre>{% for line in lines %}{{ line }}{% if not loop.last %}{{ line_break }}{% endif %}{% endfor %}</pre>
{%- endmacro %}

{% macro missing(reason, lines) -%}
<div class="missing"><p>{{ reason }}</p>{% if lines %}{{ code(lines) }}{% endif %}</div>
{%- endmacro %}

{% macro picture(uri, description, caption) -%}
<figure><img src="{{ uri }}" alt="{{ description }}">
{%- if caption %}<figcaption>{{ caption }}</figcaption>{% endif %}</figure>
{%- endmacro %}

{% macro cell(tag, place, text, words) -%}
<{{ tag }}{% if place >= words %} class="number"{% endif %}>{{ text }}</{{ tag }}>
{%- endmacro %}

{% macro table(columns, lines, words) -%}
<div class="scroll"><table>
{%- if columns | select | first is defined %}<thead><tr>
{%- for text in columns %}{{ cell("th", loop.index0, text, words) }}{% endfor %}</tr></thead>{% endif -%}
<tbody>
{%- for line in lines %}<tr>
{%- for text in line %}{{ cell("td", loop.index0, text, words) }}{% endfor %}</tr>{% endfor -%}
</tbody></table></div>
{%- endmacro %}
"""


def _shown(value: Any) -> Any:
    """In one line, with nothing in it that steers how other text looks; Jinja escapes it."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_environment = Environment(
    autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_environment.globals["line_break"] = Markup("\n")
_pieces: Any = _environment.from_string(_PIECES).module


def page(title: str, body: Sequence[Html]) -> str:
    """A whole document."""
    return str(_pieces.page(title, Html(_STYLE), body)).lstrip()


def section(anchor: str, title: str, parts: Sequence[Html]) -> Html:
    """A part of the page under a heading, which unfolds it."""
    return Html(_pieces.section(anchor, title, parts).strip())


def heading_one(text: str) -> Html:
    """The name of the page."""
    return Html(_pieces.simple("h1", text, ""))


def heading(text: str) -> Html:
    """A heading within a section."""
    return Html(_pieces.simple("h3", text, ""))


def said(entries: Sequence[tuple[str, str]]) -> Html:
    """Sentences under short labels."""
    return Html(_pieces.said(entries))


def facts(title: str, entries: Sequence[tuple[str, str]]) -> Html:
    """Tiles: what something is called, and what it is."""
    return Html(_pieces.facts(title, entries))


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph; `kind` is a class of the style sheet."""
    return Html(_pieces.simple("p", text, kind))


def missing(reason: str, command: str | None = None) -> Html:
    """Where a section has nothing to show: why, and the command that makes it if there is one."""
    return Html(_pieces.missing(reason, [] if command is None else command.split("\n")))


def code_block(text: str) -> Html:
    """Commands, as they are typed, one a line."""
    return Html(_pieces.code(text.split("\n")))


def picture(uri: str, description: str, caption: str = "") -> Html:
    """A picture that the page carries itself; `description` is for those who do not see it."""
    return Html(_pieces.picture(uri, description, caption))


def table(columns: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> Html:
    """A table whose first `words` columns are words and the others numbers."""
    return Html(_pieces.table(columns, lines, words))
