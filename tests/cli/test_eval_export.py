"""`kdeval export`: folders that load in pipelines, uploads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel, AutoModelForMaskedLM, pipeline

from cli.kdeval import main
from tests.hub_server import TOKEN, HubServer
from tests.student_train.evaluate.causal_models import make_causal


def test_masked_words_are_filled(tiny_teacher_copy: Callable[..., Path], tmp_path: Path) -> None:
    student = tiny_teacher_copy("roberta", num_hidden_layers=1)
    assert main(["export", str(student), "--out", str(tmp_path / "out")]) == 0
    fill = pipeline("fill-mask", model=str(tmp_path / "out"), top_k=1)
    (found,) = fill(f"babo {fill.tokenizer.mask_token} bada")
    ids = fill.tokenizer(f"babo {fill.tokenizer.mask_token} bada", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForMaskedLM.from_pretrained(student)(ids).logits
    assert found["token"] == logits[ids == fill.tokenizer.mask_token_id].argmax()


def test_a_name_that_looks_like_markup(
    tiny_teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(tiny_teacher("bert", num_hidden_layers=1)), "--out", "o[v2]"]) == 0
    assert "o[v2]: fill-mask" in capsys.readouterr().out


def test_a_decoder_generates(tmp_path: Path) -> None:
    student = make_causal(tmp_path / "student", "llama")
    assert main(["export", str(student), "--out", str(tmp_path / "out")]) == 0
    generate = pipeline("text-generation", model=str(tmp_path / "out"))
    assert generate("the cat", max_new_tokens=4)[0]["generated_text"].startswith("the cat")
    assert "generation_config.json" in {file.name for file in (tmp_path / "out").iterdir()}
    assert generate.tokenizer.model_max_length == 64


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on loopback, and the environment that leads to it."""
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose servers are others than the hub itself
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def test_push(hub: HubServer, tiny_teacher_copy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, out = tiny_teacher_copy("bert", num_hidden_layers=1), tmp_path / "out"
    flags = ["--out", str(out), "--push-to-hub", "me/my-student", "--private"]
    assert main(["export", str(student), *flags]) == 0
    assert "uploaded to" in capsys.readouterr().out
    assert hub.private == {"me/my-student": True} and hub.tokens == {f"Bearer {TOKEN}"}
    ours = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert hub.repositories["me/my-student"] == ours
    assert "model='me/my-student'" in ours["README.md"].decode()


def test_a_hub_that_refuses_leaves_the_folder(
    hub: HubServer, tiny_teacher_copy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = 403
    student, out = tiny_teacher_copy("bert", num_hidden_layers=1), tmp_path / "out"
    assert main(["export", str(student), "--out", str(out), "--push-to-hub", "other/name"]) == 1
    said = capsys.readouterr().err
    assert "--push-to-hub 'other/name'" in said and f"hf upload other/name {out}" in said
    assert AutoModel.from_pretrained(out).config.num_hidden_layers == 1


def test_without_a_network_or_a_token(
    tiny_teacher_copy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = str(tiny_teacher_copy("bert", num_hidden_layers=1)), tmp_path / "out"
    monkeypatch.setattr("student_train.evaluate.export.push.get_token", lambda: None)
    flags = ["export", student, "--out", str(out), "--push-to-hub", "me/it"]
    assert main(flags) == 1
    assert "there is none: log in with `hf auth login`" in capsys.readouterr().err and not out.exists()
    monkeypatch.setattr("student_train.evaluate.export.push.get_token", lambda: TOKEN)
    assert main(flags) == 1  # the tests are offline
    assert "offline" in (said := capsys.readouterr().err).lower() and "hf upload me/it" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--int8 static", "--int8 'static' needs --cache"),
        ("--onnx-output hidden", "no"),
        ("--rows 0 --int8 dynamic", "--rows 0"),
        ("--language English", "--language 'English'"),
        ("--push-to-hub a/b/c", "--push-to-hub 'a/b/c'"),
        ("--private", "--private is about --push-to-hub"),
        ("--teacher nobody/nothing", "--teacher 'nobody/nothing' is no folder"),
        ("--teacher .", "has no modules.json"),
        ("--dev-file x.tsv --int8 dynamic --seconds 0.1", "--dev-file 'x.tsv' is for"),
    ],
)
def test_refusals(
    flags: str, message: str, tiny_teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(tiny_teacher("bert", num_hidden_layers=1)), "--out", str(out), *flags.split()]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_places_and_students_that_are_refused(
    tiny_teacher_copy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny_teacher_copy("bert", num_hidden_layers=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for out, message in (
        (tmp_path / "taken", "exists and is no empty folder"),
        (tmp_path / "taken" / "file", "exists and is no empty folder"),
        (student / "out", "lies inside the student"),
        (student, "lies inside the student"),
    ):
        assert main(["export", str(student), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert "there is no student directory" in capsys.readouterr().err
    (student / "model.safetensors").unlink()
    assert main(["export", str(student), "--out", str(tmp_path / "out")]) == 1
    assert "has no weights (model.safetensors)" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_family_that_cannot_be_exported_to_onnx(
    tiny_teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = str(tiny_teacher("longformer", num_hidden_layers=1, attention_window=8))
    assert main(["export", student, "--out", str(tmp_path / "out"), "--onnx"]) == 1
    said = capsys.readouterr().err
    assert "'longformer' cannot be exported to ONNX" in said and "export it without --onnx" in said
    assert not list(tmp_path.iterdir())
