"""Where a run starts: afresh, from the newest checkpoint or a named one; what would be overwritten is refused."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForMaskedLM

from student_train.engine.checkpoint import MARKER_NAME, checkpoint_path
from student_train.train.loop import Trainer
from teacher_cache.errors import TrainingError
from tests.student_train.train.trainings import STEPS, steps_of, validations_of


def test_a_resumed_run_is_the_uninterrupted_one(run_training, finished, interrupted):
    shutil.rmtree(checkpoint_path(interrupted, STEPS))
    records = run_training(interrupted, resume="auto")
    assert steps_of(records) == steps_of(finished[1])
    assert validations_of(records) == validations_of(finished[1])
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(out).state_dict() for out in (interrupted, finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_with_its_layer_weights(run_training, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("student_train.train.prepare.choose_dtype", lambda settings, device: dtype)
    out, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"method": "hs", "weights": None, "mapping": "emd", "steps": 6, "save_every": 3}
    records = run_training(out, **options)
    shutil.copytree(out, stopped)
    shutil.rmtree(checkpoint_path(stopped, 6))
    for name in ("config.json", "model.safetensors", "provenance.json"):
        (stopped / name).unlink()
    assert steps_of(run_training(stopped, resume="auto", **options)) == steps_of(records)
    ours, theirs = (json.loads((folder / "provenance.json").read_text())["adapted"]["hs"] for folder in (stopped, out))
    assert ours == theirs
    assert len(set(theirs["student_weights"])) == 2 and len(set(theirs["teacher_weights"])) == 4


def test_a_damaged_checkpoint_is_passed_over_and_a_named_one_taken(run_training, finished, interrupted):
    last = checkpoint_path(interrupted, STEPS)
    next(last.glob("*.pt")).write_bytes(b"")
    with pytest.raises(TrainingError, match="damaged"):
        run_training(interrupted, resume=str(last))
    records = run_training(interrupted, resume=str(checkpoint_path(interrupted, 8)))
    assert steps_of(records) == steps_of(finished[1])


def test_a_run_whose_last_step_is_saved_only_exports(run_training, finished, interrupted):
    assert run_training(interrupted, resume="auto") == finished[1]
    assert (interrupted / "model.safetensors").exists()


def test_a_run_that_went_back_goes_on_from_where_it_went_back_to(run_training, interrupted, finished, monkeypatch):
    """From step 8 of a run that had come to 12, stopped at 10: what is newest then is step 10."""
    half = interrupted / "checkpoints" / "step-00000006"
    half.mkdir()
    (half / "weights.pt").write_bytes(b"half")
    update = Trainer.update

    def update_and_stop(trainer, feed):
        went_on = update(trainer, feed)
        if went_on and trainer.state.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return went_on

    monkeypatch.setattr(Trainer, "update", update_and_stop)
    with pytest.raises(AssertionError):  # that it was not stopped
        run_training(interrupted, resume=str(checkpoint_path(interrupted, 8)))
    monkeypatch.undo()
    names = sorted(path.name for path in (interrupted / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010"]
    records = run_training(interrupted, resume="auto")
    assert steps_of(records) == steps_of(finished[1])
    assert validations_of(records) == validations_of(finished[1])


def test_resuming_without_a_checkpoint_starts_afresh(run_training, finished, interrupted):
    for marker in (interrupted / "checkpoints").glob("*/complete.json"):
        marker.unlink()
    records = run_training(interrupted, resume="auto", save_every=100)
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    assert steps_of(records) == steps_of(finished[1])
    assert len(validations_of(records)) == len(validations_of(finished[1]))


def test_damaged_checkpoints_are_no_reason_to_start_afresh_and_delete_them(run_training, interrupted, capsys):
    markers = sorted((interrupted / "checkpoints").glob("*/complete.json"))
    assert len(markers) == 2
    whole = markers[0].read_text()
    markers[1].write_text("{")
    markers[0].write_text("{")
    before = (interrupted / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError, match=r"no whole one before it.*delete .*checkpoints' to start"):
        run_training(interrupted, resume="auto")
    assert (interrupted / "metrics.jsonl").read_text() == before and markers[1].exists()
    markers[0].write_text(whole)
    run_training(interrupted, resume="auto")
    assert "passed over  no complete checkpoint at" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_does_not_overwrite_this_one(run_training, finished, interrupted):
    with pytest.raises(TrainingError, match="is a checkpoint of another run, and --out .* already holds"):
        run_training(interrupted, resume=str(checkpoint_path(finished[0], 8)))


def test_a_directory_that_holds_something_is_refused(run_training, finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    with pytest.raises(TrainingError, match=r"checkpoints.*--resume auto"):
        run_training(finished[0])
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before

    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in ("never", "auto"):
        with pytest.raises(TrainingError, match=r"thesis\.tex.*choose another --out"):
            run_training(tmp_path, resume=resume)
    with pytest.raises(TrainingError, match="is a file"):
        run_training(tmp_path / "thesis.tex")
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        run_training(tmp_path / "new", resume=str(tmp_path / "nowhere"))


def test_another_setting_is_refused_by_name(run_training, interrupted, tmp_path):
    with pytest.raises(TrainingError, match=r"--lr was 0\.002 and is 0\.001"):
        run_training(interrupted, resume="auto", lr=1e-3)
    with pytest.raises(TrainingError, match="number of steps was 12 and is 13"):
        run_training(interrupted, resume="auto", steps=13)
    with pytest.raises(TrainingError, match="number of steps was 12 and is 0"):
        run_training(interrupted, resume="auto", steps=0)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"params": {"eps": 0.5}}, "gradient_clipping": 0.01}))
    differing = (
        r"\(DeepSpeed's gradient_clipping was 1\.0 and is 0\.01; DeepSpeed's optimizer\.params\.eps was None and is"
    )
    with pytest.raises(TrainingError, match=differing):
        run_training(interrupted, resume="auto", deepspeed=str(file))
    with pytest.raises(TrainingError, match="--lr was"):
        run_training(tmp_path / "new", resume=str(checkpoint_path(interrupted, 8)), lr=1e-3)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_a_version_with_fewer_flags_goes_on(run_training, finished, interrupted):
    """What it says nothing of had its default; another value now is another run."""
    shutil.rmtree(checkpoint_path(interrupted, STEPS))
    marker = checkpoint_path(interrupted, 8) / MARKER_NAME
    record = json.loads(marker.read_text())
    for name in ("--vocabulary", "--relation-mask", "--topk-loss"):
        del record["identity"][name]
    marker.write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="--topk-loss was 'tail' and is 'renormalise'"):
        run_training(interrupted, resume="auto", topk_loss="renormalise")
    assert steps_of(run_training(interrupted, resume="auto")) == steps_of(finished[1])
