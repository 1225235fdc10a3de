"""Prints the table of families as it stands in student_train/students/README.md: `python -m tests.families`."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from tests.conftest import TINY_WORDS
from tests.families.contract import ALL, HEADING, try_family


def write_corpus(path: Path) -> None:
    """Eighty lines of words that the tiny tokenizer knows."""
    draw = random.Random(0)
    path.write_text("".join(" ".join(draw.choices(TINY_WORDS, k=draw.randint(4, 60))) + "\n" for _ in range(80)))


def main() -> None:
    """One row for each family named, or for all; what was refused in which words goes to standard error."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "text.txt"
        write_corpus(corpus)
        for family in sys.argv[1:] or ALL:
            outcome = try_family(family, corpus, Path(folder) / family)
            rows.append(outcome.row())
            for what, why in outcome.refused.items():
                print(f"{family}: {what}: {why}", file=sys.stderr, flush=True)
    # libraries print to standard output while they work
    print(HEADING, *rows, sep="\n")


if __name__ == "__main__":
    main()
