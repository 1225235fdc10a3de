"""`kdcache import` from the command line, and what other commands say of what it made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli import kdcache, kdeval, kdtrain
from tests.teacher_cache.importing.conftest import TEXT
from tests.teacher_cache.importing.samples import Sample, make_sample, vllm_records, write_jsonl


@pytest.fixture(scope="module")
def sample(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folder = tmp_path_factory.mktemp("sample")
    (folder / "text.txt").write_text(TEXT)
    return make_sample(shared_data / "causal-tiny", folder / "text.txt", folder)


@pytest.fixture(scope="module")
def store(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An imported store, made by the command."""
    folder = tmp_path_factory.mktemp("imported")
    source = write_jsonl(folder / "answers.jsonl", vllm_records(sample))
    out = str(folder / "cache.zarr")
    flags = ["--tokenizer", str(sample.teacher), "--teacher", "some-large-model", "--out", out, "--block-rows", "4"]
    assert kdcache.main(["import", str(source), *flags]) == 0
    return out


def test_info_and_verify_say_where_it_is_from(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kdcache.main(["info", store]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^imported +from files of the shape vllm, source [0-9a-f]{12}; computed elsewhere$", told, re.M)
    assert "some-large-model" in told and "weights unknown" in told
    assert kdcache.main(["info", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["imported"] == "vllm"
    assert kdcache.main(["verify", store]) == 0
    assert "; imported (vllm), computed elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, told",
    [
        ("kdcache verify STORE --deep 2", "was imported .vllm.*nothing can be computed again.* leave out --deep"),
        ("kdtrain --cache STORE --method od --init embeddings --out OUT", "--init 'embeddings' asks for weights"),
        ("kdtrain --cache STORE --method od --init teacher:last --out OUT", "holds none: its targets were imported"),
        ("kdtrain --cache STORE --method hs --out OUT", "lacks hidden .*it was imported .vllm.*into another store"),
        ("kdcache import STORE/answers.jsonl --tokenizer STORE/teacher --out OUT", "names no file"),
    ],
)
def test_what_takes_the_teacher_itself_is_refused(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, told: str
) -> None:
    program, *flags = [part.replace("STORE", store).replace("OUT", str(tmp_path / "out")) for part in command.split()]
    assert {"kdcache": kdcache, "kdtrain": kdtrain}[program].main(flags) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{program}: ")]
    assert len(lines) == 1 and re.search(told, lines[0]), lines
    assert not (tmp_path / "out").exists()


def test_a_student_is_trained_from_it_and_measured(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training does not know the difference; only what needs the teacher's weights does."""
    out = str(tmp_path / "student")
    flags = ["--student", "2x32:2", "--steps", "4", "--batch-size", "4", "--device", "cpu"]
    assert kdtrain.main(["--cache", store, "--method", "od", "--out", out, *flags]) == 0
    told = capsys.readouterr()
    assert "random weights: the targets were imported" in told.out + told.err
    assert json.loads((tmp_path / "student" / "provenance.json").read_text())["cache"]["imported"] == "vllm"
    measured = ["fidelity", "--student", out, "--cache", store, "--device", "cpu"]
    assert kdeval.main(measured) == 0
    assert kdeval.main([*measured, "--exact"]) == 1
    assert "cannot be compared with the teacher itself; leave out --exact" in capsys.readouterr().err
