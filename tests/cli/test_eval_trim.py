"""`kdeval trim` on real files: what it prints, leaves behind and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from cli.kdcache import main as build
from cli.kdeval import main
from tests.conftest import TINY_WORDS

KEPT_WORDS = TINY_WORDS[10:130]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join([" ".join(KEPT_WORDS), " ".join(KEPT_WORDS[:60])]) + "\n", encoding="utf-8")
    return path


def trim(student: Path, out: Path, text: Path, *flags: str) -> int:
    return main(["trim", "--student", str(student), "--out", str(out), "--text", str(text), *flags])


def test_record(tiny_teacher: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, out = tiny_teacher("roberta"), tmp_path / "trimmed"
    assert trim(student, out, text, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "trim.json").read_text())
    assert (printed["before"]["ids"], printed["after"]["ids"], printed["used"]) == (200, 125, 120)
    assert printed["before"]["embedding"] - printed["after"]["embedding"] == 75 * 32
    assert printed["after"]["bytes"] == sum(
        (out / name).stat().st_size for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
    )
    assert printed["pieces"] == {
        "pieces": 180, "dropped": 0, "others": 0, "unknown": 0, "documents": 0, "all_documents": 2,
    }  # fmt: skip
    kept = json.loads((out / "kept_ids.json").read_text())["kept_ids"]
    before, after = (AutoModelForMaskedLM.from_pretrained(folder).eval() for folder in (student, out))
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (student, out)]
    inputs = [tokenizer(" ".join(KEPT_WORDS[3:20]), return_tensors="pt") for tokenizer in tokenizers]
    with torch.no_grad():
        logits = [model(**each).logits for model, each in zip((before, after), inputs, strict=True)]
    torch.testing.assert_close(logits[1], logits[0][..., kept], rtol=1e-5, atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_table_and_coverage(tiny_teacher: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trimmed"
    out.mkdir()
    assert trim(tiny_teacher("bert"), out, text, "--coverage", "0.667") == 0
    printed = capsys.readouterr().out
    assert "of 180 pieces, 59 (32.78%) are gone" in printed and "59 more are unknown" in printed
    assert "embeddings of ids" in printed


@pytest.fixture(scope="module")
def twice(tiny_teacher: Any, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student that was trimmed two times, and a cache of the teacher of the first; do not write there."""
    folder = tmp_path_factory.mktemp("twice")
    for name, words in (("text", KEPT_WORDS), ("shorter", KEPT_WORDS[30:70])):
        (folder / f"{name}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    teacher = str(tiny_teacher("bert"))
    assert trim(teacher, folder / "first", folder / "text.txt") == 0
    assert trim(folder / "first", folder / "second", folder / "shorter.txt") == 0
    flags = ["--targets", "logits,hidden", "--seq-len", "24", "--max-rows", "24", "--device", "cpu"]
    store = str(folder / "cache.zarr")
    assert build(["build", "--teacher", teacher, "--corpus", str(tiny_corpus), "--out", store, *flags]) == 0
    return folder / "second", folder / "cache.zarr"


def copied(student: Path, folder: Path) -> Path:
    return shutil.copytree(student, folder / "student")


def test_trimmed_twice(twice: tuple[Path, Path], tiny_teacher: Any, tmp_path: Path) -> None:
    """The ids of the second are still said in those of the teacher, whose cache can be read."""
    student = copied(twice[0], tmp_path)
    kept = json.loads((student / "kept_ids.json").read_text())
    tokens = AutoTokenizer.from_pretrained(tiny_teacher("bert")).convert_ids_to_tokens(kept["kept_ids"])
    assert tokens[5:] == KEPT_WORDS[30:70] and kept["teacher_vocab_size"] == 200
    assert main(["fidelity", "--student", str(student), "--cache", str(twice[1]), "--device", "cpu"]) == 0
    found = json.loads((student / "fidelity.json").read_text())
    assert any("45 of its teacher's 200 ids" in note for note in found["notes"])
    assert (found["distribution"]["kind"], found["distribution"]["kept_ids"]) == ("topk", 45)


def test_files_of_a_trimmed_student_are_measured_in_its_own_ids(
    twice: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, rows = copied(twice[0], tmp_path), ["--cache", str(twice[1]), "--rows", "6"]
    assert main(["fidelity", "--student", str(student), *rows, "--device", "cpu"]) == 0
    kl = json.loads((student / "fidelity.json").read_text())["distribution"]["kl"]
    capsys.readouterr()
    flags = ["--onnx", "--int8", "both", "--seconds", "0.1", "--length", "8", "--json"]
    assert main(["export", str(student), "--out", str(tmp_path / "out"), *rows, *flags]) == 0
    pytorch, onnx, *int8 = json.loads(capsys.readouterr().out)["onnx"]["files"]
    assert pytorch["output_kl"] == pytest.approx(kl, rel=1e-5) == onnx["output_kl"]
    assert len(int8) == 2 and all(each["output_kl"] == pytest.approx(kl, rel=0.1) for each in int8)


def test_a_trimmed_student_that_is_fine_tuned_keeps_its_ids(
    twice: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, saved = copied(twice[0], tmp_path), tmp_path / "saved"
    examples = "\n".join(f"{KEPT_WORDS[30 + row % 40]}\t{row % 2}" for row in range(24))
    (tmp_path / "task.tsv").write_text(f"sentence\tlabel\n{examples}\n", encoding="utf-8")
    files = [flag for name in ("train", "dev") for flag in (f"--{name}-file", str(tmp_path / "task.tsv"))]
    task = ["--task", "sst2", *files, "--epochs", "1", "--seeds", "1", "--device", "cpu", "--save", str(saved)]
    kept = (student / "kept_ids.json").read_bytes()
    (student / "kept_ids.json").write_bytes(kept[:9])
    assert main(["finetune", "--student", str(student), *task]) == 1
    said = capsys.readouterr().err
    assert "cannot be read as a record of kept ids" in said and "step 1" not in said
    (student / "kept_ids.json").write_bytes(kept)
    assert main(["finetune", "--student", str(student), *task]) == 0
    assert (saved / "kept_ids.json").read_bytes() == kept
    capsys.readouterr()
    flags = ["--int8", "static", "--cache", str(twice[1]), "--seconds", "0.1", "--length", "8", "--json"]
    assert main(["export", str(saved), "--out", str(tmp_path / "out"), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["pipeline"] == "text-classification" and record["onnx"]["calibration_rows"] > 0


def test_heads_stay(tiny_teacher: Any, text: Path, tmp_path: Path) -> None:
    """Those of a fine-tuned student, too."""
    student, out = tmp_path / "student", tmp_path / "trimmed"
    folder = tiny_teacher("distilbert")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(student)
    AutoTokenizer.from_pretrained(folder).save_pretrained(student)
    assert trim(student, out, text) == 0
    before, after = (AutoModelForSequenceClassification.from_pretrained(each).eval() for each in (student, out))
    inputs = [
        AutoTokenizer.from_pretrained(each)(KEPT_WORDS[5], return_tensors="pt", return_token_type_ids=False)
        for each in (student, out)
    ]
    with torch.no_grad():
        assert torch.equal(before(**inputs[0]).logits, after(**inputs[1]).logits)


def test_provenance_says_what_was_kept(tiny_teacher_copy: Any, text: Path, tmp_path: Path) -> None:
    student, out = tiny_teacher_copy("bert"), tmp_path / "trimmed"
    (student / "provenance.json").write_text(json.dumps({"cache": {"rows": 3}}))
    assert trim(student, out, text) == 0
    record = json.loads((out / "provenance.json").read_text())
    assert record["cache"] == {"rows": 3}
    assert (record["vocabulary"]["kept"], record["vocabulary"]["of"]) == (125, 200)
    (student / "provenance.json").write_text("[")
    assert trim(student, tmp_path / "other", text) == 1


def test_refusals(
    tiny_teacher: Any, tiny_teacher_copy: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny_teacher("bert")
    short, full = tmp_path / "short.txt", tmp_path / "full"
    short.write_text(" ".join(KEPT_WORDS[:9]))
    full.mkdir()
    (full / "thing").write_text("")
    broken = tiny_teacher_copy("bert")
    (broken / "tokenizer.json").unlink()
    for arguments, told in (
        ((student, tmp_path / "out", short), "the text uses 9 of the 200 ids"),
        ((student, full, text), "holds something already"),
        ((student, text, text), "holds something already"),
        ((student, "s3://bucket/out", text), "is an address"),
        ((student, tmp_path / "out", text, "--coverage", "0"), "--coverage: 0.0 is no share"),
        ((student, tmp_path / "out", text, "--coverage", "1.5"), "--coverage: 1.5 is no share"),
        ((tmp_path / "nowhere", tmp_path / "out", text), "there is no student directory"),
        ((broken, tmp_path / "out", text), "the tokenizer in"),
        ((student, tmp_path / "out", tmp_path / "nowhere.txt"), "no file matches"),
    ):
        assert trim(*arguments) == 1, told
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_weights_that_are_not_all_there_are_refused(
    tiny_teacher: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that would be random is not written as if it had been learnt."""
    student = tmp_path / "student"
    shutil.copytree(tiny_teacher("bert", head=False), student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert trim(student, tmp_path / "out", text) == 1
    assert "has other weights than its architecture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_leaves_nothing(
    tiny_teacher: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from student_train.students.vocabulary.kept_ids import KeptIds

    def full(self: KeptIds, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KeptIds, "write", full)
    assert trim(tiny_teacher("bert"), tmp_path / "out", text) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
