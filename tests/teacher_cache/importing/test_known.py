"""What is known of a teacher without weights, and configurations that do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import TeacherError
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.known import KnownTeacher
from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import Sample, vllm_records, write_jsonl

Asked = Callable[..., ImportSettings]


def config_of(sample: Sample, folder: Path, **changes: Any) -> str:
    folder.mkdir()
    fields = json.loads((sample.teacher / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return str(folder)


def test_the_configuration_of_a_quantised_teacher_serves(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """Nobody loads its weights: what is said of them is left out, and the vocabulary may be padded."""
    quantised = {"quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoConfig": "code.Config"}}
    folder = config_of(sample, tmp_path / "config", vocab_size=1100, **quantised)
    settings = asked(write_jsonl(tmp_path / "a.jsonl", vllm_records(sample)), teacher_config=folder)
    import_store(settings)
    kept = json.loads((Path(settings.out) / "teacher" / "config.json").read_text())
    assert kept["vocab_size"] == 1100 and not quantised.keys() & kept.keys()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model_type": "bert"}, "predicts masked tokens.*`kdcache build`"),
        ({"model_type": "nothing-known"}, "cannot be read .ValueError"),
        ({"vocab_size": 1000}, re.escape("has ids up to 1023, its embeddings end at 999")),
    ],
)
def test_a_configuration_that_does_not_fit(
    sample: Sample, asked: Asked, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    with pytest.raises(TeacherError, match=told):
        import_store(asked(path, teacher_config=config_of(sample, tmp_path / "config", **changes)))


def test_a_teacher_is_told_by_its_name_its_tokenizer_and_its_sizes(sample: Sample, asked: Asked) -> None:
    """Two imports of one teacher can be read as one store; those of another teacher cannot."""
    teacher = KnownTeacher.load(asked(Path("a.jsonl"), teacher="large"))
    record = teacher.record(24)
    assert record == KnownTeacher.load(asked(Path("b.jsonl"), teacher="large")).record(24)
    other = KnownTeacher.load(asked(Path("a.jsonl"), teacher="larger")).record(24)
    assert record.weights_sha256 != other.weights_sha256
    assert (record.name, record.layers, record.hidden_size, record.vocab_size) == ("large", 4, 128, 1024)
    assert record.max_positions == 128 and teacher.record(500).max_positions == 500, "it has read such rows"
    assert teacher.tokens == 1024 and record.causal


def test_a_configuration_that_was_set_right_is_that_of_another_teacher(
    sample: Sample, asked: Asked, tmp_path: Path
) -> None:
    """Students are made from it: what was begun with a wrong one is not gone on with. Who wrote it does not matter."""
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    folders = {name: config_of(sample, tmp_path / name, **changes) for name, changes in {
        "right": {}, "wrong": {"rms_norm_eps": 0.5}, "other": {"transformers_version": "1.0", "use_cache": False},
    }.items()}  # fmt: skip
    hashes = {
        name: KnownTeacher.load(asked(path, teacher="t", teacher_config=folder)).record(24).weights_sha256
        for name, folder in folders.items()
    }
    assert hashes["right"] == hashes["other"] != hashes["wrong"]
