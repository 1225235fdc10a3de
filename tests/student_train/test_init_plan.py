"""`--init` as text: what it means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from student_train.init_plan import read_init
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "layers"),
    [("auto", (2, 4, 6)), ("teacher:uniform", (2, 4, 6)), ("teacher:last", (4, 5, 6)), ("teacher:6,1,1", (6, 1, 1))],
)
def test_each_student_layer_has_a_teacher_layer(text: str, layers: tuple[int, ...]) -> None:
    assert read_init(text, from_folder=None).layers_for(3, 6) == layers


def test_rows_may_choose_the_layers() -> None:
    plan = read_init("teacher:importance", from_folder=None)
    assert plan.by_importance and plan.insists and plan.layers_for(3, 6) == (2, 4, 6)
    assert not any(read_init(text, from_folder=None).by_importance for text in ("auto", "teacher:last", "teacher:2"))


@pytest.mark.parametrize("text", ["", "autos", "teacher", "teacher:", "teacher:2,", "teacher:a", "no/such/folder"])
def test_unreadable_plans_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="auto, random, embeddings") as caught:
        read_init(text, from_folder=None)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("mapping", ["uniform+last", "uniform-cons", "last1", "skip", "emd", "alp"])
def test_mappings_that_name_several_layers_or_none_are_refused(mapping: str) -> None:
    with pytest.raises(SettingsError, match="give teacher:uniform or teacher:last or teacher:importance, or name"):
        read_init(f"teacher:{mapping}", from_folder=None)


@pytest.mark.parametrize(
    ("text", "close"),
    [("teacherr", "teacher:last"), ("randon", "random"), ("teacher:lsat", "teacher:last"), ("embedings", "embeddings")],
)
def test_a_plan_that_is_close_is_offered(text: str, close: str) -> None:
    with pytest.raises(SettingsError, match=f"and there is no such folder: did you mean {close}.*Give auto, random"):
        read_init(text, from_folder=None)


def test_layers_that_do_not_exist_are_named() -> None:
    with pytest.raises(SettingsError, match="'teacher:0,2' names layer 0: the teacher's layers are numbered from 1"):
        read_init("teacher:0,2", from_folder=None)
    with pytest.raises(SettingsError, match="names layer 5, the teacher has layers 1 to 4"):
        read_init("teacher:2,5", from_folder=None).layers_for(2, 4)
    with pytest.raises(SettingsError, match="names 2 teacher layers for a student of 3"):
        read_init("teacher:2,4", from_folder=None).check_student(3)


def test_a_folder_gives_its_weights_and_a_student_from_one_keeps_its_own(tmp_path: Path) -> None:
    assert read_init(str(tmp_path), from_folder=None).folder == tmp_path
    assert read_init("auto", from_folder=tmp_path).folder == tmp_path
    with pytest.raises(SettingsError, match="has its own weights and would lose them"):
        read_init("random", from_folder=tmp_path)
