"""Preparing a run: what settings and manifest rule out is told before a row is read or a student is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from student_train.settings import TrainSettings
from student_train.train.prepare import check_run, open_cache, prepare_run
from teacher_cache.errors import DamagedStoreError, DistillationError, SettingsError, TargetsError


def without_rows(store: Path) -> str:
    """Take everything out of a store that was committed by block."""
    for commit in (store / "commits").glob("*.json"):
        for shard in json.loads(commit.read_text())["shards"]:
            (store / shard).unlink()
    return str(store)


@pytest.fixture(scope="module")
def unreadable(make_tiny_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of layers 2 and 4, logits as draws and attention 3, of which no row can be read."""
    out = tmp_path_factory.mktemp("unreadable") / "cache.zarr"
    make_tiny_store(out, layers="2,4", logits="sample", max_rows=24, block_rows=8)
    return without_rows(out)


@pytest.fixture(scope="module")
def unreadable_matrices(make_tiny_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with relations of 4 heads in place of attention vectors."""
    out = tmp_path_factory.mktemp("matrices") / "cache.zarr"
    make_tiny_store(out, targets="attention", relations="matrix", relation_heads=4, max_rows=24, block_rows=8)
    return without_rows(out)


def asked(cache: str, **values: Any) -> TrainSettings:
    """By default a student that is sliced from its teacher, which reads rows."""
    given = {"method": "hs", "mapping": "uniform", "student": "2x16", "steps": 1, "device": "cpu", **values}
    return TrainSettings(cache=(cache,), **given)


@pytest.mark.parametrize("method", ["hs", "mha", "direct", "od", "mlm"])
def test_reading_a_row_of_this_cache_would_be_noticed(unreadable: str, method: str) -> None:
    settings = asked(unreadable, method=method)
    check_run(settings, open_cache(settings))
    with pytest.raises(DamagedStoreError):
        prepare_run(settings)


@pytest.mark.parametrize(
    "wrong, error, told",
    [
        ({"mapping": "1:9"}, SettingsError, "--mapping '1:9' names layer 9 of the teacher"),
        ({"mapping": "1:3"}, TargetsError, "lacks hidden 3"),
        ({"mapping": "alp"}, TargetsError, "lacks hidden 1, hidden 3.*`--layers all` names them"),
        ({"method": "direct+hs", "mapping": "1:9"}, SettingsError, "--mapping '1:9' names layer 9"),
        ({"method": "mha", "attention_layer": "2:9"}, SettingsError, "--attention-layer '2:9' names layer 9"),
        ({"method": "direct", "attention_layer": "1"}, TargetsError, "lacks attention 1"),
        ({"method": "direct+mha", "relation_heads": 5}, SettingsError, "--relation-heads 5 does not divide"),
        ({"method": "direct+od", "topk_loss": "renormalise"}, SettingsError, "--topk-loss 'renormalise' does not fit"),
        ({"student": "5x32"}, SettingsError, "has 5 layers, the teacher 4"),
        ({"init": "teacher:1,9"}, SettingsError, "--init 'teacher:1,9' names layer 9"),
        ({"student": "2x64", "init": "teacher:last"}, SettingsError, "a wider student than the teacher"),
        ({"init": "embeddings"}, SettingsError, "the teacher's embeddings do not fit"),
        ({"valid_share": 0.99}, SettingsError, "no row is left to train on"),
        ({"micro_batch_size": 7}, SettingsError, "--micro-batch-size 7 does not divide"),
        ({"dtype": "float16"}, SettingsError, "--dtype 'float16' on a CPU"),
    ],
)
def test_what_cannot_be_is_told_before_a_row_is_read(
    unreadable: str, wrong: dict[str, Any], error: type[DistillationError], told: str
) -> None:
    settings = asked(unreadable, **wrong)
    with pytest.raises(error, match=told) as single:
        prepare_run(settings)
    with pytest.raises(error) as checked:
        check_run(settings, open_cache(settings))
    assert str(checked.value) == str(single.value)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (
            {"method": "mha+direct"},
            "--method direct learns queries, keys and values, and the cache holds attention 3 as",
        ),
        (
            {"method": "mha", "relation_heads": 2},
            "--relation-heads 2: the cache holds relations as matrices of 4 heads",
        ),
        ({"method": "mha", "student": "2x18:3"}, "4 heads, which do not divide the student's width 18"),
        ({"method": "mlm"}, "lacks masked views"),
    ],
)
def test_what_matrices_cannot_give_is_told_before_a_row_is_read(
    unreadable_matrices: str, wrong: dict[str, Any], told: str
) -> None:
    settings = asked(unreadable_matrices, **wrong)
    for refused in (prepare_run, lambda settings: check_run(settings, open_cache(settings))):
        with pytest.raises(DistillationError, match=told):
            refused(settings)


def test_a_folder_that_does_not_fit_is_told_before_a_row_is_read(unreadable: str, tiny_teacher: Any) -> None:
    for folder, told in (
        (tiny_teacher("bert", vocab_size=210), "210 vocabulary entries, the teacher 200"),
        (tiny_teacher("bert", max_position_embeddings=20), "reads at most 20 positions, the rows of the cache have 24"),
    ):
        settings = asked(unreadable, method="direct", student=str(folder))
        for refused in (prepare_run, lambda settings: check_run(settings, open_cache(settings))):
            with pytest.raises(DistillationError, match=told):
                refused(settings)
