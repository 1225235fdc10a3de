"""What `kdcache build` may be asked for, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_powers_that_mix_nothing_are_refused(alpha: float) -> None:
    with pytest.raises(SettingsError, match="--mix-alpha .* give a power from 0"):
        BuildSettings(teacher="teacher", mix_alpha=alpha)


def settings(**flags: Any) -> BuildSettings:
    return BuildSettings(teacher="teacher", **flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"max_rows": 0}, "--max-rows 0 is too small: it must be at least 1"),
        ({"k": 0}, "--k 0 is too small"),
        ({"views": 0}, "--views 0 is too small"),
        ({"block_rows": -1}, "--block-rows -1 is too small"),
        ({"batch_size": 0}, "--batch-size 0 is too small"),
        ({"seq_len": 2}, "--seq-len 2 is too small: it must be at least 3"),
        ({"logits": "sample", "k": 256}, "--k 256 draws a position .* 1 to 255"),
        ({"relation_heads": 4}, "--relation-heads 4 would change nothing"),
        ({"relation_heads": 4, "relations": "qkv"}, "--relation-heads 4 would change nothing"),
        ({"relation_heads": 0, "relations": "matrix"}, "--relation-heads 0 is too small"),
        ({"mlm_probability": 0.0}, "--mlm-probability 0.0 is not between 0 and 1"),
        ({"mlm_probability": 1.0}, "--mlm-probability 1.0 is not between"),
        ({"mlm_probability": float("nan")}, "--mlm-probability nan is not between"),
        ({"temperature": 0.0}, "--temperature 0.0 cannot divide logits"),
        ({"temperature": float("inf")}, "--temperature inf cannot divide"),
        ({"temperature": float("nan")}, "--temperature nan cannot divide"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"precision": "float8"}, "--precision 'float8' is unknown"),
        ({"targets": "logits,smell"}, "--targets 'logits,smell' names 'smell'"),
        ({"targets": " , "}, "--targets ' , ' names ''"),
        ({"max_memory": "cpu:1GB"}, "--max-memory 'cpu:1GB' would limit nothing"),
        ({"device_map": "auto", "device": "cuda:1"}, "--device 'cuda:1' and --device-map 'auto' contradict"),
        ({"tensor_parallel": True, "device": "cuda:1"}, "--device 'cuda:1' and --tensor-parallel contradict"),
        ({"tensor_parallel": True, "device_map": "auto"}, "--device-map auto and --tensor-parallel are two ways"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(**flags)


@given(parts=st.integers(1, 50), data=st.data())
def test_every_part_of_a_whole_can_be_named(parts: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, parts))
    assert settings(part=f"{number}/{parts}").part_numbers() == (number, parts)


@pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "-1/2", "1/0", "1/2/3", "a/b", "1.0/2", " 1/2", "²/3"])
def test_no_other_part_can_be_named(part: str) -> None:
    with pytest.raises(SettingsError, match="names no part: .* give i/n with i from 1 to n, such as 2/8"):
        settings(part=part)


def test_defaults_that_depend_on_one_another() -> None:
    assert settings().part_numbers() is None and settings().target_names() is None
    assert [settings(logits=form).entries(causal=False) for form in ("topk", "sample")] == [64, 50]
    assert [settings(logits=form).entries(causal=True) for form in ("topk", "sample")] == [64, 24]
    assert [settings().logits_form(causal=causal) for causal in (False, True)] == ["topk", "sample"]
    assert settings(logits="sample", k=255).entries(causal=False) == 255
    assert settings(relations="matrix", relation_heads=4).relation_heads == 4


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
