"""The flags of `kdeval finetune`: what they mean, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from student_train.evaluate.finetune.settings import FinetuneSettings
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    "options, said",
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"lr": "5e-5,fast"}, "--lr '5e-5,fast'"),
        ({"lr": "5e-5,5e-5"}, "different ones"),
        ({"epochs": float("nan")}, "--epochs nan"),
        ({"dev_file": None}, "--train-file is given without --dev-file"),
        ({"test_files": ("x.tsv",)}, "no name"),
        ({"test_files": ("a=x", "a=y")}, "'a'"),
        ({"test_files": ("dev=x",)}, "'dev'"),
        ({"language": "de"}, "--language de"),
        ({"train_file": None, "dev_file": None, "test_languages": "de"}, "--test-languages de"),
        ({"task": "xnli", "test_languages": "de"}, "--test-languages de.*hub"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        FinetuneSettings(**{"task": "sst2", "train_file": "a", "dev_file": "b", **options})
