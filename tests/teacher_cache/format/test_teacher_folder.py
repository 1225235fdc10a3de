"""What of a teacher's folder may be handed to Transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teacher_cache.errors import StoreError
from teacher_cache.format.teacher_folder import check_teacher_folder, only_listed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_text('{"auto_map": "a word like any other here"}')
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    return tmp_path


def test_configuration_weights_and_tokenizer_pass(folder: Path) -> None:
    check_teacher_folder(folder, [path.name for path in folder.iterdir()], 1000, "store")


@pytest.mark.parametrize("name", ["a.py", "A.PY", "a.bin", "a.pt", "a.pkl", "a.so", "a.npy", "a.h5"])
def test_what_could_run_is_refused_by_its_name_before_it_is_opened(folder: Path, name: str) -> None:
    with pytest.raises(StoreError, match=rf"'teacher/{name}' in 'store'.*never decides what code runs"):
        check_teacher_folder(folder, [name, "config.json", "tokenizer.json"], 1000, "store")


@pytest.mark.parametrize("key", ["auto_map", "quantization_config"])
@pytest.mark.parametrize("value, refused", [({"AutoModel": "x"}, True), (None, False), ({}, False)])
def test_keys_that_choose_code(folder: Path, key: str, value: object, refused: bool) -> None:
    (folder / "config.json").write_text(json.dumps({key: value}))
    if refused:
        with pytest.raises(StoreError, match=key):
            check_teacher_folder(folder, ["config.json", "tokenizer.json"], 1000, "store")
    else:
        check_teacher_folder(folder, ["config.json", "tokenizer.json"], 1000, "store")


@pytest.mark.parametrize("value", ["eager", "sdpa", "flash_attention_2", None])
def test_attention_of_transformers_itself_is_no_reason(folder: Path, value: object) -> None:
    (folder / "config.json").write_text(json.dumps({"attn_implementation": value}))
    check_teacher_folder(folder, ["config.json", "tokenizer.json"], 1000, "store")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_json_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match="is no JSON"):
        check_teacher_folder(folder, ["config.json", "tokenizer.json"], 1000, "store")


def test_json_beyond_any_tokenizer_is_not_read(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)  # takes no room on the disk
    with pytest.raises(StoreError, match="1073741824 bytes of JSON"):
        check_teacher_folder(folder, ["config.json", "tokenizer.json"], 1000, "store")


def test_ids_are_those_of_the_vocabulary_and_only_listed_files_count(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    (folder / "added_tokens.json").write_text('{"<one>": 999, "<two>": 1000}')
    check_teacher_folder(folder, names, 1000, "store")
    with pytest.raises(StoreError, match=r"added_tokens.json gives the token '<two>' the id 1000: .* from 0 to 999\."):
        check_teacher_folder(folder, [*names, "added_tokens.json"], 1000, "store")


def test_only_what_is_listed_is_handed_on(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    assert only_listed(folder, names) is None
    (folder / "special_tokens_map.json").write_text("{}")
    listed = only_listed(folder, names)
    assert listed is not None
    assert {path.name: path.read_bytes() for path in Path(listed.name).iterdir()} == {
        name: (folder / name).read_bytes() for name in names
    }
    listed.cleanup()
    assert not Path(listed.name).exists() and all((folder / name).exists() for name in names)


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json"])
def test_a_teacher_that_lacks_what_students_read_rows_with_is_refused(folder: Path, lost: str) -> None:
    names = [path.name for path in folder.iterdir() if path.name != lost]
    with pytest.raises(StoreError, match="lacks its configuration or the vocabulary"):
        check_teacher_folder(folder, names, 1000, "store")
