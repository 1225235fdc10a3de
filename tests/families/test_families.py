"""Every masked-LM family that Transformers has works, or is refused by name; the page says which does what.

A few families that differ most are tried with all other tests, all of them by `make test-families`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.families.contract import ALL, HEADING, SAMPLE, SHAPES, SPECIAL, TARGETS, try_family

PAGE = Path(__file__).resolve().parents[2] / "student_train" / "students" / "README.md"
TRIED = ALL if os.environ.get("KDCACHE_FAMILIES") == "all" else SAMPLE


def table() -> dict[str, str]:
    """The rows of the page's table by family."""
    _, _, after = PAGE.read_text(encoding="utf-8").partition(HEADING + "\n")
    rows = after.partition("\n\n")[0].splitlines()
    return {row.split("|")[1].strip(): row for row in rows}


@pytest.mark.parametrize("family", TRIED)
def test_a_family_does_what_the_page_says(family: str, tiny_corpus: Path, tmp_path: Path) -> None:
    """Whatever is refused is refused by name and with what to do instead; anything else raised is a defect."""
    outcome = try_family(family, tiny_corpus, tmp_path)
    for what, why in outcome.refused.items():
        assert f"family {family!r}" in why, f"{what} is refused without the family's name: {why}"
        assert any(word in why for word in (" use ", " give ", " choose ", " leave ")), f"no way out of {what}: {why}"
    for name in set(TARGETS) - set(outcome.targets):
        assert f"targets {name}" in outcome.refused
    if family in table():
        assert outcome.row() == table()[family], "the page is made by `python -m tests.families`"


def test_the_page_has_every_family_of_the_sample() -> None:
    assert set(SAMPLE) <= table().keys()
    assert all(row.count("|") == 3 + len(SHAPES) for row in table().values())


def test_special_settings_are_those_of_families_that_exist() -> None:
    assert SPECIAL.keys() <= set(ALL)
