"""HTML of a report: everything is escaped, elements are closed, and a page needs nothing but itself."""

from __future__ import annotations

from student_train.evaluate.report.html import (
    Html,
    code_block,
    facts,
    heading,
    heading_one,
    missing,
    page,
    paragraph,
    picture,
    said,
    section,
    table,
)
from tests.student_train.evaluate.report.pages import Page

NASTY = "<b> & \"x\" 'y'"
ESCAPED = "&lt;b&gt; &amp; &#34;x&#34; &#39;y&#39;"


def test_whatever_is_said_is_text() -> None:
    pieces = [
        paragraph(NASTY),
        paragraph(NASTY, "note"),
        heading(NASTY),
        heading_one(NASTY),
        code_block(NASTY),
        said([(NASTY, NASTY)]),
        section("a", NASTY, []),
        missing(NASTY, NASTY),
        facts(NASTY, [(NASTY, NASTY)]),
        table([NASTY], [[NASTY]]),
        picture(NASTY, NASTY, NASTY),
    ]
    for piece in pieces:
        assert ESCAPED in piece and NASTY not in piece


def test_what_steers_a_terminal_or_ends_a_line_is_written_out() -> None:
    assert paragraph("a\n\x1b[31mb\u202e") == "<p>a\\n\\x1b[31mb\\u202e</p>"
    assert code_block("kdtrain\nkdeval \x07") == "<pre>kdtrain\nkdeval \\x07</pre>"


def test_what_is_html_already_stays() -> None:
    assert "<p>x</p>" in section("a", "Title", [Html("<p>x</p>")])
    assert Page(page("title", [section("a", "Title", [paragraph(NASTY)])])).text["a"].strip().endswith(NASTY)


def test_a_page_carries_everything_itself() -> None:
    text = page(NASTY, [section("part", "A part", [paragraph("words"), picture("data:,", "nothing")])])
    assert text.startswith("<!DOCTYPE html>") and f"<title>{ESCAPED}</title>" in text
    for foreign in ("http", "@import", "<script", "<link", "url("):
        assert foreign not in text
    read = Page(text)
    assert read.addresses == ["data:,"] and "A part" in read.text["part"]


def test_tables_have_words_first_and_then_numbers() -> None:
    found = table(["name", "where", "value"], [["a", "b", "1"]], words=2)
    assert '<th>name</th><th>where</th><th class="number">value</th>' in found
    assert '<td>a</td><td>b</td><td class="number">1</td>' in found
    # a table of facts has no heads of columns
    assert "<thead>" not in table(["", ""], [["a", "b"]], words=2)


def test_what_is_missing_names_its_command_if_there_is_one() -> None:
    assert missing("Nothing.", "kdeval latency") == (
        '<div class="missing"><p>Nothing.</p><pre>kdeval latency</pre></div>'
    )
    assert missing("Nothing.") == '<div class="missing"><p>Nothing.</p></div>'
    assert "<figcaption>" not in picture("data:,", "x") and 'alt="x"' in picture("data:,", "x")
