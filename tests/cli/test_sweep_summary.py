"""The summary of a sweep, from folders as trainings leave them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cli.sweep_summary import as_table, completed, summarise, write_summary
from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError
from teacher_cache.read.pool import open_caches


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": 1.0, "lr": 0.1, "tokens": 100 * number, "seconds": 2.0, "wait": 0.5, **more}


def validation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "valid_loss": loss, "valid_mha": loss / 2, "valid_skipped_rows": 0}


def settings_of(out: Path, **values: Any) -> TrainSettings:
    return TrainSettings(**{"method": "mha", "out": str(out), **values})


def with_records(out: Path, *records: dict[str, Any]) -> TrainSettings:
    out.mkdir(exist_ok=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return settings_of(out)


def test_a_training_is_summed_up_from_its_records(tmp_path: Path) -> None:
    settings = with_records(
        tmp_path, validation(0, 9.0), step(1), step(2), validation(2, 3.0), step(3), step(4), validation(4, 5.0)
    )
    found = summarise("a", {"seed": "1"}, settings, "complete")
    assert (found.steps, found.tokens, found.seconds) == (4, 400, 8.0)
    assert (found.tokens_per_second, found.wait_share) == (50.0, 0.25)
    assert found.last == {"step": 4, "loss": 5.0, "mha": 2.5} and found.best == {"step": 2, "loss": 3.0, "mha": 1.5}


def test_a_training_that_left_nothing_or_something_unreadable_has_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.jsonl").write_text("[\n")
    for name in ("nothing", "damaged"):
        found = summarise(name, {}, settings_of(tmp_path / name), "not started")
        assert (found.steps, found.last, found.best, found.tokens_per_second, found.wait_share) == (
            0,
            {},
            {},
            None,
            None,
        )
        assert "| not started | 0     |" in as_table([found.to_json()])


def test_the_summary_is_written_as_a_record_and_as_a_table(tmp_path: Path) -> None:
    first = summarise("a", {"lr": "1|2"}, with_records(tmp_path / "a", step(1), validation(1, 0.12345)), "complete")
    second = summarise("b", {}, settings_of(tmp_path / "b"), "failed (1)")
    record = write_summary([first, second], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == record
    assert [run["name"] for run in record["runs"]] == ["a", "b"] and "software" in record
    header, rule, one, other, *rest = (tmp_path / "out" / "summary.md").read_text().splitlines()
    assert len({len(line) for line in (header, rule, one, other)}) == 1, "aligned"
    assert [cell.strip() for cell in header.split("|")[1:-1]][5:7] == ["loss", "mha"]
    assert "lr 1\\|2" in one and "0.1235 / 0.1235" in one and "25.0%" in one
    assert "failed (1)" in other and other.count("–") == 6
    assert rest[-1].startswith("Losses: of the last validation")


@pytest.fixture(scope="module")
def store(tiny_teacher: Any, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from teacher_cache.build.build import build_cache
    from teacher_cache.build.settings import BuildSettings

    out = tmp_path_factory.mktemp("summary") / "cache.zarr"
    settings = {"teacher": str(tiny_teacher("bert")), "corpus": (str(tiny_corpus),), "out": str(out), "device": "cpu"}
    build_cache(BuildSettings(**settings, seq_len=16, max_rows=8, block_rows=8, targets="hidden", layers="4"))
    return str(out)


def finished(settings: TrainSettings, contents: str, **changes: Any) -> TrainSettings:
    """Leave the record of a student that was trained with these settings."""
    record = {"settings": {**asdict(settings), **changes}, "cache": {"identity_sha256": contents}}
    Path(settings.out).mkdir()
    (Path(settings.out) / "provenance.json").write_text(json.dumps(record))
    return settings


def test_students_of_the_same_settings_and_cache_are_complete(store: str, tmp_path: Path) -> None:
    contents = open_caches((store,)).identity_sha256
    one = finished(settings_of(tmp_path / "one", cache=(store,)), contents)
    # where a student or a batch of rows goes may differ, and a folder that the record names may be gone
    two = finished(settings_of(tmp_path / "two", cache=(store,)), contents, save_every=7, out="elsewhere")
    absent = settings_of(tmp_path / "absent", cache=("nothing.zarr",))
    assert completed({"one": one, "absent": absent, "two": two}) == ["one", "two"]


@pytest.mark.parametrize(
    "changes, contents, told",
    [
        ({"seed": 1}, None, "--seed was 1 and is 0"),
        ({"student": "no/such/folder"}, None, "--student was 'no/such/folder' and is None"),
        ({"deepspeed": "ds.json"}, None, "--deepspeed was 'ds.json' and is None"),
        ({}, "other", "cache contents was 'other' and is"),
        ({"method": "nonsense"}, None, "cannot be read .*'nonsense'"),
        ({"flag_of_tomorrow": 1}, None, "cannot be read .*flag_of_tomorrow"),
    ],
)
def test_a_student_of_something_else_is_refused(
    store: str, tmp_path: Path, changes: dict[str, Any], contents: str | None, told: str
) -> None:
    contents = contents or open_caches((store,)).identity_sha256
    settings = finished(settings_of(tmp_path / "one", cache=(store,)), contents, **changes)
    with pytest.raises(SettingsError, match=f"(?s)run 'one': .*{told}"):
        completed({"one": settings})


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"settings": []}', '{"settings": {"method": "mha"}, "cache": {}}'])
def test_a_record_that_cannot_be_read_is_told_with_its_path(tmp_path: Path, record: str) -> None:
    (tmp_path / "provenance.json").write_text(record)
    with pytest.raises(SettingsError, match=r"provenance.json' cannot be read .*delete the folder or choose another"):
        completed({"one": settings_of(tmp_path)})


def test_a_folder_that_cannot_be_is_told_by_the_name_of_its_run(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"run 'one': .* cannot be \(File name too long\).*choose another --out"):
        completed({"one": settings_of(tmp_path / ("9" * 300))})
