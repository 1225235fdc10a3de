"""The ids that the files of a tokenizer name, and the door through which tokenizers are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.models.families import read_config
from teacher_cache.models.token_ids import check_token_ids
from teacher_cache.models.tokenizers import read_tokenizer

FILES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vocab.json": lambda token_id: {"a": 0, "b": token_id},
    "added_tokens.json": lambda token_id: {"<b>": token_id},
    "tokenizer.json": lambda token_id: {"model": {"vocab": {"a": 0, "b": token_id}}},
    "tokenizer_config.json": lambda token_id: {"added_tokens_decoder": {str(token_id): {"content": "<b>"}}},
}


@pytest.mark.parametrize("name", FILES)
def test_ids_from_0_to_the_last_one_pass_and_no_others(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for token_id in (0, 7, 99):
        path.write_text(json.dumps(FILES[name](token_id)))
        check_token_ids([path], 100)
    for token_id in (100, 2**31 - 1, -1, 10**400, 0.5, "x", True, None):
        path.write_text(json.dumps(FILES[name](token_id)))
        with pytest.raises(ValueError, match=rf"^{name} gives .* '<?b>?' the id .*: ids are whole .* from 0 to 99$"):
            check_token_ids([path], 100)


def test_added_tokens_of_a_fast_tokenizer_count_too(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": []}, "added_tokens": [{"id": 3, "content": "<a>"}, {"id": 2**40}]}))
    with pytest.raises(ValueError, match="the added token 'None' the id 1099511627776"):
        check_token_ids([path], 100)


@pytest.mark.parametrize(
    "fields", [[], {}, {"model": None}, {"model": {"vocab": [["a", -1.5]]}}, {"added_tokens": None}, {"model": []}]
)
def test_what_names_no_ids_is_left_to_the_library(tmp_path: Path, fields: Any) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    check_token_ids([path, tmp_path / "vocab.txt"], 100)


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^vocab.json is no JSON"):
        check_token_ids([path], 100)


def test_a_folder_with_an_absurd_id_is_refused_and_one_with_an_added_token_is_read(
    tiny_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_teacher(), tmp_path / "teacher"))
    config, path = read_config(folder), folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    added = {**fields["added_tokens"][-1], "content": "<new>", "id": config.vocab_size}
    path.write_text(json.dumps({**fields, "added_tokens": [*fields["added_tokens"], added]}))
    assert config.vocab_size in read_tokenizer(folder, config).get_vocab().values()
    path.write_text(json.dumps({**fields, "added_tokens": [*fields["added_tokens"], {**added, "id": 2**31 - 1}]}))
    with pytest.raises(ValueError, match="the added token '<new>' the id 2147483647"):
        read_tokenizer(folder, config)
