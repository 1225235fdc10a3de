"""The model's own files: weights as they are, pickled ones written anew, no place of a machine, a full tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from student_train.evaluate.export.folder import UNBOUNDED, check_loads, write_model
from student_train.evaluate.export.source import read_source
from teacher_cache.errors import StudentError


@pytest.fixture
def student(tiny_teacher_copy: Callable[..., Path]) -> Path:
    return tiny_teacher_copy("bert", num_hidden_layers=1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_places_are_left_out_and_named(student: Path, out: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    places = {"_name_or_path": "/data/me/teacher", "table": "/data/me/table.json", "home": "~/a/b", "kept": "a/b"}
    (student / "config.json").write_text(json.dumps({**config, **places}))
    notes = write_model(read_source(str(student)), out)
    assert json.loads((out / "config.json").read_text()) == {**config, "kept": "a/b"}
    assert [note for note in notes if "config.json" in note] == [
        f"config.json: {name!r} named a place on this machine and was left out"
        for name in ("_name_or_path", "table", "home")
    ]


def test_places_deep_within_and_with_spaces(student: Path, out: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    places = {"table": "/my data/a table.json", "maps": {"one": "C:\\data\\x", "two": "a/b"}, "list": ["/a/b", "/"]}
    words = {"id2label": {"0": "/a/b", "1": "x"}, "label2id": {"/a/b": 0, "x": 1}, "note": "/think or /no_think"}
    (student / "config.json").write_text(json.dumps({**config, **places, **words}))
    notes = write_model(read_source(str(student)), out)
    kept = {"maps": {"two": "a/b"}, "list": ["/"]}
    assert json.loads((out / "config.json").read_text()) == {**config, **kept, **words}
    assert [note for note in notes if "config.json" in note] == [
        f"config.json: {name!r} named a place on this machine and was left out"
        for name in ("table", "maps.one", "list.0")
    ]


def test_pickled_weights_become_safetensors(student: Path, out: Path) -> None:
    weights = load_file(student / "model.safetensors")
    (student / "model.safetensors").unlink()
    torch.save(AutoModelForMaskedLM.from_config(read_config(student)).half().state_dict(), student / "x.bin")
    torch.save({name: value.half() for name, value in weights.items()}, student / "pytorch_model.bin")
    source = read_source(str(student))
    write_model(source, out)
    assert {file.name for file in out.iterdir() if file.suffix in (".bin", ".safetensors")} == {"model.safetensors"}
    check_loads(source, out)
    written = load_file(out / "model.safetensors")
    assert all(written[name].float().equal(value.half().float()) for name, value in weights.items())


def read_config(folder: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_shards_of_an_index_and_no_others(student: Path, out: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(student)
    (student / "model.safetensors").unlink()
    model.save_pretrained(student, max_shard_size="40KB")
    named = {file.name for file in student.glob("model-*.safetensors")}
    assert len(named) > 1
    (student / "model-00009-of-00009.safetensors").write_bytes(b"of another time")
    source = read_source(str(student))
    write_model(source, out)
    assert {file.name for file in out.glob("model*")} == {*named, "model.safetensors.index.json"}
    check_loads(source, out)
    (student / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(StudentError, match=r"index\.json' cannot be read"):
        write_model(source, out)


def test_how_a_tokenizer_was_last_called_is_not_inherited(student: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.backend_tokenizer.enable_truncation(max_length=7)
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(student)
    write_model(read_source(str(student)), out)
    told = json.loads((out / "tokenizer_config.json").read_text())
    assert told["model_max_length"] == 64 and not {"max_length", "truncation_strategy", "is_local"} & told.keys()
    written = AutoTokenizer.from_pretrained(out)
    assert len(written(" ".join(["babo"] * 99), truncation=True)["input_ids"]) == 64
    assert len(written(" ".join(["babo"] * 20))["input_ids"]) == 22


def test_what_nothing_limits_reads_anything(tiny_teacher: Callable[..., Path], out: Path, monkeypatch) -> None:
    monkeypatch.setattr("student_train.evaluate.export.source.position_limit", lambda model: None)
    write_model(read_source(str(tiny_teacher("bert", num_hidden_layers=1))), out)
    assert AutoTokenizer.from_pretrained(out).model_max_length == UNBOUNDED


def test_a_student_without_its_tokenizer(student: Path, out: Path) -> None:
    for file in student.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(StudentError, match="the tokenizer in .* cannot be used"):
        write_model(read_source(str(student)), out)
