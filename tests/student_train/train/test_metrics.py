"""What a run records: lines of JSON that survive a resume and a kill, curves, and progress on standard error."""

import json

import pytest

from student_train.run_files import METRICS_NAME, read_records
from student_train.train.metrics import TENSORBOARD_NAME, MetricsLog, Progress
from teacher_cache.errors import TrainingError


def write(out, records, **options):
    log = MetricsLog(out, **options)
    for record in records:
        log.write(record)
    log.close()


def test_records_are_lines_of_json_and_curves(tmp_path):
    write(tmp_path, [{"step": 0, "valid_loss": 3.0}, {"step": 1, "loss": 2.5, "grad_norm": None}], last_step=None)
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "valid_loss": 3.0},
        {"step": 1, "loss": 2.5, "grad_norm": None},
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / TENSORBOARD_NAME))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["train/loss", "valid/loss"]
    assert board.Scalars("valid/loss")[0].value == 3.0


ELSE = {"lr": 0.1, "tokens": 10, "seconds": 0.5, "wait": 0.0}
"""What a record of a step has beside its loss."""


def test_a_resumed_log_records_no_step_twice(tmp_path):
    write(tmp_path, [{"step": step, "loss": float(step), **ELSE} for step in range(1, 6)], last_step=None)
    write(tmp_path, [{"step": step, "loss": -1.0, **ELSE} for step in (4, 5)], last_step=3)
    assert [(record["step"], record["loss"]) for record in read_records(tmp_path / METRICS_NAME)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, -1.0),
        (5, -1.0),
    ]


def test_a_fresh_log_forgets_everything_before_it(tmp_path):
    write(tmp_path, [{"step": 0, "valid_loss": 1.0}, {"step": 1, "loss": 1.0}], last_step=None)
    write(tmp_path, [{"step": 0, "valid_loss": 2.0}], last_step=None)
    assert read_records(tmp_path / METRICS_NAME) == [{"step": 0, "valid_loss": 2.0}]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / METRICS_NAME
    path.write_text(json.dumps({"step": 1, "loss": 1.0, **ELSE}) + '\n{"step": 2, "lo')
    write(tmp_path, [{"step": 2, "loss": 2.0}], last_step=1)
    assert [record["step"] for record in read_records(path)] == [1, 2]


@pytest.mark.parametrize("lacking", ELSE)
def test_a_record_that_lacks_something_is_not_handed_on(tmp_path, lacking):
    """Where it is of a step that is gone on from; what is dropped anyway may be anything."""
    path, whole = tmp_path / METRICS_NAME, {"step": 1, "loss": 1.0, **ELSE}
    text = json.dumps({name: value for name, value in whole.items() if name != lacking}) + "\n"
    path.write_text(text)
    with pytest.raises(TrainingError, match=f"line 1: the field '{lacking}' is missing"):
        write(tmp_path, [], last_step=1)
    assert path.read_text() == text
    write(tmp_path, [whole], last_step=None)
    assert read_records(path) == [whole]


def test_progress_goes_to_standard_error_in_plain_lines(capsys):
    progress = Progress()
    progress.say("a [line] of text " + "x" * 200)
    progress.start(total=2, step=0)
    progress.step(1, loss=1.0, losses={"mha": 1.0}, tokens=10, wait=0.0)
    progress.step(2, loss=0.5, losses={"mha": 0.25, "hs": 2.5}, tokens=10, wait=0.0)
    progress.stop()
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last = captured.err.splitlines()
    assert first == "a [line] of text " + "x" * 200
    assert last.startswith("step 2/2: loss 0.5 (mha 0.25, hs 2.5), ") and " tok/s, 0.0% waiting" in last


def test_what_is_no_number_is_never_written(tmp_path):
    log = MetricsLog(tmp_path, last_step=None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 1, "loss": float("nan")})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("damage", ["\0\0\0", "[1]", '{"loss": 1.0}', '{"step": "one"}'])
def test_a_damaged_file_is_a_message(tmp_path, damage):
    write(tmp_path, [{"step": 1, "loss": 1.0}], last_step=None)
    path = tmp_path / METRICS_NAME
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl' cannot be read .*delete it"):
        read_records(path)
    with pytest.raises(TrainingError, match="cannot be read"):
        MetricsLog(tmp_path, last_step=1)
