"""What an import cannot be asked for: told by the settings alone, or by what the source holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import DistillationError, SettingsError, SourceError
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import Sample, vllm_records, write_jsonl

Asked = Callable[..., ImportSettings]


SETTINGS: dict[str, tuple[dict[str, Any], type[DistillationError], str]] = {
    "long rows": ({"seq_len": 9}, SourceError, r"line \d+: \d+ tokens are more than --seq-len 9: .* --long-rows cut"),
    "more ids than listed": ({"k": 50}, SettingsError, "--k 50 is more than the 9? ?8? ids that any place"),
    "entries of prompts": ({"entries": "this"}, SettingsError, "--entries this would change nothing"),
    "a block of too many": ({"block_rows": 5000}, SettingsError, "--block-rows 5000 is more than the 10 rows"),
    "no tokenizer": ({"tokenizer": "nowhere"}, SettingsError, "--tokenizer 'nowhere' is no folder"),
    "no configuration": ({"teacher_config": "/"}, SettingsError, "--teacher-config '/' holds no config.json"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_cannot_be_asked_for(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    changes, kind, told = SETTINGS[name]
    settings = asked(write_jsonl(tmp_path / "a.jsonl", vllm_records(sample)), **changes)
    with pytest.raises(kind, match=told):
        import_store(settings)
    assert not Path(settings.out).exists()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"k": 0}, "--k 0 is too small"),
        ({"seq_len": 1}, "--seq-len 1 is too small"),
        ({"long_rows": "cut"}, "--long-rows cut would change nothing"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"precision": "int9"}, "--precision 'int9' is unknown"),
        ({"source": ()}, "no SOURCE is given"),
    ],
)
def test_settings_that_cannot_be(asked: Asked, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        asked(Path("a.jsonl"), **changes)
