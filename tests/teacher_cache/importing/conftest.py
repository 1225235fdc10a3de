"""A small trained decoder and what it says of some rows, computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import Sample, make_sample

TEXT = """The king of the north rode out in the morning with his men.
She said that the little house by the river was not for sale any more.
Water boils at one hundred degrees, and freezes at zero.
There was once a dog who could not bark.
In the year of our war the city had two gates and a wall.
He went home.
The first of the three books is about the sea and those who live by it.
Nobody knew why the old man had left his garden to the children of the village.
A train that leaves at seven arrives at nine, if there is no snow.
Music was played until the lights went out.
"""


@pytest.fixture(scope="session")
def sample(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Rows of a trained Llama of 4 layers of 128, 1,024 ids. Read only."""
    folder = tmp_path_factory.mktemp("sample")
    text = folder / "text.txt"
    text.write_text(TEXT)
    return make_sample(shared_data / "causal-tiny", text, folder)


@pytest.fixture
def asked(sample: Sample, tmp_path: Path) -> Callable[..., ImportSettings]:
    """Settings of an import into a new folder of the test, in blocks of 4 rows."""

    def make(*sources: Path, **changes: Any) -> ImportSettings:
        values: dict[str, Any] = {
            "source": tuple(map(str, sources)), "tokenizer": str(sample.teacher), "out": str(tmp_path / "out.zarr"),
            "block_rows": 4, "precision": "float16",
        }  # fmt: skip
        return ImportSettings(**{**values, **changes})

    return make
