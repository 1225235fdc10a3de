"""What is read of a directory, and what is refused by the names of file and entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.load import weights_fingerprint
from student_train.evaluate.run_records import TimingSetup, read_run
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.causal_models import make_causal
from tests.student_train.evaluate.left_records import answered, finetuned, harnessed, read_text, timed, write
from tests.student_train.evaluate.reports import make_report


def test_every_record_of_a_directory_is_read(make_run: Any) -> None:
    run = make_run("run", scores=[0.5, 0.75], method="hs")
    timed(run, 3.0, fingerprints={"teacher": "t"})
    command = "kdeval fidelity --json"
    write(run / "fidelity.json", {"evaluation": "fidelity", **make_report().to_json(), "command": command})
    found = read_run(str(run))
    assert (found.path, found.folder, found.weights, found.shape) == (str(run), run, None, None)
    assert found.settings["method"] == "hs" and found.commands == (command,) and found.stale == ()
    assert found.fidelity == make_report()
    assert found.tasks["sst2"].scores == {0: 0.5, 1: 0.75} and found.tasks["sst2"].metric == "accuracy"
    assert found.latency is not None
    assert (found.latency.parameters, found.latency.teacher_parameters) == (7_000_000, 22_000_000)
    assert found.latency.teacher_weights == "t"
    setup = TimingSetup(backend="pytorch", device="cpu", dtype="float32", threads=1, batch_size=8, seq_len=128)
    assert found.latency.timings[setup].median_ms == 24.0
    assert str(setup) == "pytorch on CPU (1 thread), float32, batch 8 of 128 tokens"


def test_records_of_a_causal_student(make_run: Any) -> None:
    run = make_run("run")
    text, harness = read_text(run, 2.0), harnessed(run, {"animals": 0.5})
    answered(run, 400.0)
    found = read_run(str(run))
    assert found.causal and found.perplexity == text and found.lm_eval == harness
    assert found.latency is not None and not found.latency.timings
    assert [timing.tokens_per_second for timing in found.latency.generation.values()] == [400.0, 100.0]
    assert not read_run(str(make_run("other"))).causal


def test_a_causal_model_without_records(tmp_path: Path) -> None:
    found = read_run(str(make_causal(tmp_path / "model", "llama")))
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert found.causal and found.shape is not None and found.shape.parameters == 300 * 32 + 2 * layer + 32
    write(found.folder / "perplexity.json", {"evaluation": "perplexity", "fingerprints": {"student": "another"}})
    assert read_run(str(found.folder)).stale == ("perplexity.json",)


@pytest.mark.parametrize(
    "name, record, named",
    [
        ("perplexity.json", {"evaluation": "perplexity"}, "the field 'scores' is missing"),
        ("perplexity.json", {"evaluation": "lm-eval"}, "'evaluation' is 'lm-eval' instead of 'perplexity'"),
        (
            "lm-eval.json",
            {"evaluation": "lm-eval", "student": "s", "results": [{}]},
            "the field 'results.0.task' is missing",
        ),
        ("lm-eval.json", {"evaluation": "lm"}, "'evaluation' is 'lm' instead of 'lm-eval'"),
        (
            "latency.json",
            {"evaluation": "latency", "measurements": [], "parameters": 1, "generation": [{"runs": 1}]},
            "the field 'generation.0.backend' is missing",
        ),
    ],
)
def test_damaged_records_of_causal_students(make_run: Any, name: str, record: dict[str, Any], named: str) -> None:
    run = make_run("run")
    write(run / name, record)
    with pytest.raises(StudentError) as refusal:
        read_run(str(run))
    assert name in str(refusal.value) and named in str(refusal.value)


def test_a_model_without_records(tiny_teacher: Any) -> None:
    """Parameters are those that latency counts: no pooler, no masked-LM head."""
    folder = tiny_teacher("bert")
    found = read_run(str(folder))
    assert found.shape is not None and str(found.shape) == "4x32:4:64" and found.shape.family == "bert"
    layer = 4 * 33 * 32 + 33 * 64 + 65 * 32 + 4 * 32
    assert found.shape.parameters == (200 + 64 + 2) * 32 + 2 * 32 + 4 * layer
    assert found.weights == weights_fingerprint(folder) and found.fidelity is None and not found.tasks
    assert found.settings == {} == found.provenance and found.commands == ()


def test_records_of_other_weights_do_not_count(tiny_teacher_copy: Any) -> None:
    student = tiny_teacher_copy("bert")
    finetuned(student, "sst2", [0.9], fingerprints={"weights": "of the student that was here before"})
    finetuned(student, "rte", [0.8], fingerprints={"weights": weights_fingerprint(student)})
    # older records do not say whose they are
    finetuned(student, "cola", [0.7])
    found = read_run(str(student))
    assert found.tasks.keys() == {"cola", "rte"} and found.stale == ("finetune-sst2.json",)


FINETUNE = '{"evaluation": "finetune", "task": "t", "metric": "m", '
SCORED = FINETUNE + '"seeds": [0], "scores": [0.1], '


@pytest.mark.parametrize(
    "name, text, named",
    [
        ("finetune-sst2.json", "{", "cannot be read as JSON"),
        ("finetune-sst2.json", "[1]", "an object is expected"),
        ("finetune-sst2.json", '{"evaluation": "fidelity"}', "'evaluation' is 'fidelity'"),
        ("finetune-sst2.json", '{"evaluation": "finetune", "seeds": [0]}', "the field 'scores' is missing"),
        (
            "finetune-sst2.json",
            '{"evaluation": "finetune", "seeds": [0], "scores": [NaN]}',
            "it holds NaN, which is no number of JSON",
        ),
        (
            "finetune-sst2.json",
            FINETUNE + '"seeds": [0, 0], "scores": [0.1, 0.2]}',
            "'seeds' [0, 0]",
        ),
        (
            "finetune-sst2.json",
            SCORED + '"by_test": {"de": {}}}',
            "field 'by_test.de.scores' is missing",
        ),
        (
            "finetune-sst2.json",
            SCORED + '"by_test": {"de": {"scores": [0.1, 0.2]}}}',
            "'de' in 'by_test' are 2 for 1 seeds",
        ),
        ("finetune-sst2.json", SCORED + '"by_test": [1]}', "the field 'by_test' is [1]: it must be an object"),
        (
            "finetune-sst2.json",
            SCORED + '"examples": {"dev": "many"}}',
            "'examples.dev' is 'many': it must be a whole",
        ),
        (
            "finetune-sst2.json",
            SCORED + '"learning_rates": ["fast"]}',
            "the field 'learning_rates.0' is 'fast': it must be a number",
        ),
        (
            "latency.json",
            '{"evaluation": "latency", "measurements": [{"backend": 3}]}',
            "the field 'measurements.0.backend' is 3: it must be text",
        ),
        ("latency.json", '{"evaluation": "latency", "measurements": []}', "the field 'parameters' is missing"),
        ("fidelity.json", '{"evaluation": "fidelity", "relations": []}', "the field 'student' is missing"),
        ("provenance.json", '{"settings": {}}', "the field 'cache' is missing"),
        (
            "provenance.json",
            '{"settings": {}, "cache": {}, "objective": []}',
            "'objective' is []: it must be",
        ),
    ],
)
def test_what_is_no_record_is_refused_by_file_and_entry(make_run: Any, name: str, text: str, named: str) -> None:
    run = make_run("run")
    (run / name).write_text(text)
    with pytest.raises(StudentError) as refusal:
        read_run(str(run))
    assert str(run / name) in str(refusal.value) and named in str(refusal.value)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no run directory"):
        read_run(str(tmp_path / "nowhere"))
    with pytest.raises(StudentError, match="neither a model nor a record"):
        read_run(str(tmp_path))
    # a directory with a record of other weights alone holds something that can be said
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "latency.json").write_text(
        json.dumps({"evaluation": "latency", "fingerprints": {"student": "of others"}})
    )
    assert read_run(str(tmp_path)).stale == ("latency.json",)
