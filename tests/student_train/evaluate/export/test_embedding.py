"""Files of sentence-transformers: what is taken over of the teacher's, at the student's width, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from cli.kdeval import main
from student_train.evaluate.export.embedding import (
    check_embeds,
    compare_embeddings,
    embedding_folder,
    missing_package,
    sentences_of,
    write_embedding,
)
from student_train.evaluate.export.source import Source, read_source
from teacher_cache.errors import StudentError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def embedding_teacher(folder: Path, modules: list[dict[str, Any]], longest: int = 48) -> Path:
    """The files of sentence-transformers in a model's folder."""
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest, "do_lower_case": False}))
    prompts = {"__version__": {"pytorch": "1"}, "prompts": {"query": "query: "}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def teacher(tiny_teacher_copy: Callable[..., Path]) -> Path:
    return embedding_teacher(tiny_teacher_copy("bert", head=False), MODULES)


@pytest.fixture
def source(tiny_teacher: Callable[..., Path]) -> Source:
    """Of half the width."""
    return read_source(str(tiny_teacher("bert", head=False, hidden_size=16, num_hidden_layers=1)))


def test_what_is_taken_over(teacher: Path, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert write_embedding(source, teacher, out) == 48
    assert json.loads((out / "modules.json").read_text()) == MODULES
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert pooling == {**POOLING, "word_embedding_dimension": 16}
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 48
    prompts = json.loads((out / "config_sentence_transformers.json").read_text())
    assert prompts == {"prompts": {"query": "query: "}, "similarity_fn_name": "cosine"}
    # no more than the student reads, however much the teacher does
    (teacher / "sentence_bert_config.json").write_text('{"max_seq_length": 4096}')
    (tmp_path / "other").mkdir()
    assert write_embedding(source, teacher, tmp_path / "other") == 64


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_an_encoder_in_a_folder_of_its_own(name: str, teacher: Path, source: Source, tmp_path: Path) -> None:
    """As older versions of the library wrote it; the student's files lie beside its card."""
    modules = [{**MODULES[0], "path": "0_Transformer"}, MODULES[1]]
    (teacher / "modules.json").write_text(json.dumps(modules))
    (teacher / "0_Transformer").mkdir()
    for file in [file for file in teacher.iterdir() if file.is_file() and "sentence" not in file.name]:
        if file.name != "modules.json":
            file.rename(teacher / "0_Transformer" / file.name)
    (teacher / "sentence_bert_config.json").rename(teacher / "0_Transformer" / name)
    out = tmp_path / "out"
    # where the library is installed, the folder is loaded before it is there
    assert main(["export", str(source.folder), "--out", str(out), "--teacher", str(teacher)]) == 0
    assert json.loads((out / "modules.json").read_text()) == [MODULES[0], MODULES[1]]
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 48
    if not missing_package():
        check_embeds(out)


@pytest.mark.skipif(missing_package(), reason="sentence-transformers is not installed")
def test_a_folder_that_does_not_load_is_not_left(
    teacher: Path, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (teacher / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32, "pooling_mode": "none such"}')
    out = tmp_path / "out"
    assert main(["export", str(source.folder), "--out", str(out), "--teacher", str(teacher)]) == 1
    assert "sentence-transformers cannot embed" in capsys.readouterr().err and not out.exists()


def test_a_dense_layer_must_fit(teacher: Path, source: Source, tmp_path: Path, tiny_teacher: Any) -> None:
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (teacher / "modules.json").write_text(json.dumps([*MODULES, dense]))
    (teacher / "3_Dense").mkdir()
    (teacher / "3_Dense" / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 8}))
    torch.save({"linear.weight": torch.eye(8, 32)}, teacher / "3_Dense" / "pytorch_model.bin")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(StudentError, match="dense layer that reads 32 numbers, and the student has 16"):
        write_embedding(source, teacher, out)
    shutil.rmtree(out)
    out.mkdir()
    write_embedding(read_source(str(tiny_teacher("bert", head=False))), teacher, out)
    assert load_file(out / "3_Dense" / "model.safetensors")["linear.weight"].equal(torch.eye(8, 32))


@pytest.mark.parametrize(
    "modules, message",
    [
        ([{**MODULES[0], "type": "my_code.Reranker"}], "only Transformer, Pooling, Normalize"),
        ([MODULES[0], {**MODULES[1], "path": "../1_Pooling"}], "only Transformer, Pooling, Normalize"),
        (["pooling"], "an entry is 'pooling'"),
        ({"0": 1}, "it holds"),
    ],
)
def test_modules_that_are_refused(modules: Any, message: str, teacher: Path, source: Source, tmp_path: Path) -> None:
    (teacher / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(StudentError, match=message):
        write_embedding(source, teacher, tmp_path)


def test_which_teacher(teacher: Path, tiny_teacher: Any) -> None:
    plain = str(tiny_teacher("bert"))
    assert embedding_folder(None, str(teacher)) == teacher == embedding_folder(str(teacher), None)
    assert embedding_folder(None, plain) is embedding_folder(None, "gone/away") is embedding_folder(None, None) is None
    with pytest.raises(StudentError, match=r"has no modules\.json"):
        embedding_folder(plain, None)


def test_sentences() -> None:
    text = "cut off. This is a whole sentence! So is this one here. Too short. This one is cut"
    assert sentences_of([text, text]) == ["This is a whole sentence!", "So is this one here."]


@pytest.mark.skipif(missing_package(), reason="sentence-transformers is not installed")
def test_the_library_embeds_as_plain_pooling_does(teacher: Path, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(source.folder), "--out", str(out), "--teacher", str(teacher)]) == 0
    texts = ["babo dado fegi", "baha deda", "golu kame lipo nura", "babo babo babo"]
    found = compare_embeddings(out, teacher, texts)
    assert found.sentences == 4 and found.cosine is None  # of other widths
    ours, theirs = (_mean_of_tokens(folder, texts) for folder in (out, teacher))
    upper = np.triu_indices(4, 1)
    pairs = [(each @ each.T)[upper] for each in (ours, theirs)]
    assert found.correlation == pytest.approx(np.corrcoef(*pairs)[0, 1], abs=1e-4)
    assert found.error == pytest.approx(np.abs(pairs[0] - pairs[1]).mean(), abs=1e-4)
    assert compare_embeddings(teacher, teacher, texts).cosine == pytest.approx(1)


def _mean_of_tokens(folder: Path, texts: list[str]) -> Any:
    model, tokenizer = AutoModel.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    means = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=1).numpy()
