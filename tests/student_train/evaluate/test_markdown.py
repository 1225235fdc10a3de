"""Names of anybody's in Markdown: shown, never obeyed."""

from __future__ import annotations

from student_train.evaluate.markdown import code_lines, markdown_table, plain


def test_names_are_shown_as_they_are() -> None:
    assert plain("<img src=x> `a` [b](c) \x1b[31m") == "&lt;img src=x> \\`a\\` [b\\](c) \\x1b[31m"
    assert plain("a __init__ *x* ~~b~~") == "a \\_\\_init\\_\\_ \\*x\\* \\~\\~b\\~\\~"
    assert plain("bits_per_byte ~ 3 (x_)") == "bits_per_byte ~ 3 (x\\_)"
    assert markdown_table(("a|b", "n"), [("x", "1")], words=1) == "| a\\|b | n |\n| :-- | --: |\n| x | 1 |"


def test_code_cannot_end_its_block() -> None:
    assert code_lines(["a", "```", "b"], "sh") == "````sh\na\n```\nb\n````"
