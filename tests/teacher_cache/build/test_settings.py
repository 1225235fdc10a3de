"""What `kdcache build` refuses before a teacher or a text is opened."""

from __future__ import annotations

from typing import Any

import pytest

from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": "unifrom+last"}, "--layers 'unifrom\\+last' cannot be read at 'unifrom': did you mean uniform"),
        ({"layers": "uniform:0"}, "--layers 'uniform:0' asks for a student of 0 layers"),
        ({"attention_layer": 0}, "--attention-layer 0 is too small"),
        ({"targets": "hiden"}, "--targets 'hiden' names 'hiden'.*did you mean hidden"),
        ({"targets": ","}, "--targets ',' names ''.*give one or more of logits, hidden, attention"),
        ({"precision": "int5"}, "--precision 'int5' is unknown.*did you mean int8 or int4"),
        ({"precision": "nmse:2"}, "--precision 'nmse:2' is unknown"),
        ({"part": "3/2"}, "--part '3/2' names no part"),
        ({"part": "1"}, "--part '1' names no part"),
        ({"max_rows": 0}, "--max-rows 0 is too small"),
        ({"k": 0}, "--k 0 is too small"),
        ({"views": 0}, "--views 0 is too small"),
        ({"block_rows": 0}, "--block-rows 0 is too small"),
        ({"batch_size": 0}, "--batch-size 0 is too small"),
        ({"seq_len": 2}, "--seq-len 2 is too small"),
        ({"relations": "matrix", "relation_heads": 0}, "--relation-heads 0 is too small"),
        ({"relation_heads": 4}, "--relation-heads 4 would change nothing"),
        ({"k": 256, "logits": "sample"}, "--k 256 draws a position cannot be kept"),
        ({"mlm_probability": 1.0}, "--mlm-probability 1.0 is not between 0 and 1"),
        ({"mix_alpha": 1.5}, "--mix-alpha 1.5 would favour"),
        ({"temperature": float("nan")}, "--temperature nan cannot divide logits"),
        ({"seed": -1}, "--seed -1 is negative"),
    ],
)
def test_values_that_cannot_be_are_refused_by_flag(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        BuildSettings(teacher="teacher", **wrong)
