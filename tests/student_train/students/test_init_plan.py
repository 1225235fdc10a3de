"""`--init` as text: what it means, and what is refused."""

from __future__ import annotations

import pytest

from student_train.students.init_plan import parse_init
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "layers"),
    [("auto", (2, 4, 6)), ("teacher:uniform", (2, 4, 6)), ("teacher:last", (4, 5, 6)), ("teacher:6,1,1", (6, 1, 1))],
)
def test_each_student_layer_has_a_teacher_layer(text: str, layers: tuple[int, ...]) -> None:
    assert parse_init(text, from_folder=None, teacher_layers=6).layers_for(3, 6) == layers


@pytest.mark.parametrize("text", ["", "autos", "teacher", "teacher:", "teacher:2,", "teacher:a", "no/such/folder"])
def test_unreadable_plans_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="auto, random, embeddings") as caught:
        parse_init(text, from_folder=None, teacher_layers=4)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("mapping", ["uniform+last", "uniform-cons", "last1", "skip", "emd", "alp"])
def test_mappings_that_name_several_layers_or_none_are_refused(mapping: str) -> None:
    with pytest.raises(SettingsError, match="give teacher:uniform or teacher:last, or name the layers"):
        parse_init(f"teacher:{mapping}", from_folder=None, teacher_layers=4)
