"""`kdcache import` from the command line, and what other commands say of what it made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from cli import kdcache, kdeval, kdtrain
from tests.teacher_cache.importing.conftest import TEXT
from tests.teacher_cache.importing.samples import (
    Sample,
    assert_same_distributions,
    make_sample,
    read,
    vllm_records,
    write_jsonl,
)
from tests.teacher_cache.importing.test_distillkit import packed_records


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


def test_hidden_states_are_learnt_too(sample: Sample, tmp_path: Path) -> None:
    """What vLLM writes of layers 2 and 4, a file a row, trains a student with `hs`."""
    folder = tmp_path / "states"
    folder.mkdir()
    for number, row in enumerate(sample.rows):
        states_TLD = sample.hidden[number][[2, 4]].transpose(0, 1).contiguous()
        tensors = {"token_ids": torch.tensor(row), "hidden_states": states_TLD}
        save_file(tensors, folder / f"hs_{number}.safetensors")
    out, student = str(tmp_path / "cache.zarr"), tmp_path / "student"
    flags = ["--tokenizer", str(sample.teacher), "--layers", "2,4", "--out", out, "--block-rows", "4"]
    assert kdcache.main(["import", str(folder), *flags]) == 0
    flags = ["--student", "2x32:2", "--steps", "4", "--batch-size", "4", "--device", "cpu", "--out", str(student)]
    assert kdtrain.main(["--cache", out, "--method", "hs", "--mapping", "1:2,2:4", *flags]) == 0
    losses = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert losses and (student / "model.safetensors").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_a_packing_is_read_from_the_file_that_names_it(sample: Sample, tmp_path: Path, inside: bool) -> None:
    """A compression_config.yaml as DistillKit writes it, or the configuration of a training."""
    given = {
        "d": 1024, "k": 8, "exact_k": 8, "exact_dtype": "float32", "polynomial_terms": None, "term_dtype": "float32",
        "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
    }  # fmt: skip
    content = {"model": "student", "teacher": {"kind": "dataset", "logprob_compressor": given}} if inside else given
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    written = {name: str(value).lower() for name, value in given.items()} | {"residual_bins": []}
    source = write_jsonl(tmp_path / "a.jsonl", packed_records(sample, {**written, "polynomial_terms": None}))
    out = str(tmp_path / "cache.zarr")
    flags = ["--tokenizer", str(sample.teacher), "--out", out, "--precision", "float16"]
    assert kdcache.main(["import", str(source), "--packing", str(tmp_path / "config.yaml"), *flags]) == 0
    assert_same_distributions(read(out), read(sample.store))


def test_a_packing_that_cannot_be_read(sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{}])
    flags = ["--tokenizer", str(sample.teacher), "--packing", str(tmp_path / "nothing.yaml")]
    assert kdcache.main(["import", str(source), *flags]) == 1
    assert "kdcache: --packing '" in capsys.readouterr().err
