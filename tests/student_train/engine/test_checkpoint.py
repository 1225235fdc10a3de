"""Checkpoints with a real DeepSpeed engine around a toy model: whole or not there, and exact."""

import json
import random
import shutil

import numpy as np
import pytest
import torch

from student_train.engine.checkpoint import (
    KEPT,
    MARKER_NAME,
    check_checkpoint,
    checkpoint_path,
    drop_beyond,
    load_checkpoint,
    newest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from student_train.engine.config import make_config
from student_train.engine.engine import start_engine
from student_train.settings import TrainSettings
from teacher_cache.errors import TrainingError


def toy_engine(width=4, stage=0):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    config = make_config(TrainSettings(method="hs", batch_size=2), dtype=torch.float32, micro_batch=2)
    config["zero_optimization"]["stage"] = stage
    return start_engine(model, config, device="cpu", warmup=2, steps=20)


def draw_and_step(engine, width=4):
    """A step whose input comes from the torch generator, and numbers from the other two."""
    loss = engine(torch.randn(2, width)).square().sum()
    engine.backward(loss)
    engine.step()
    return loss.item(), float(np.random.rand()), random.random()  # noqa: NPY002


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_loaded_checkpoint_goes_on_exactly(tmp_path, stage):
    engine = toy_engine(stage=stage)
    for _ in range(3):
        draw_and_step(engine)
    path = save_checkpoint(engine, tmp_path, step=3, identity={"seed": 0}, state={"tokens": 17})
    expected = [draw_and_step(engine) for _ in range(4)]

    other = toy_engine(stage=stage)
    draw_and_step(other)
    assert load_checkpoint(other, path) == {"tokens": 17}
    assert [draw_and_step(other) for _ in range(4)] == expected
    assert check_checkpoint(path).identity == {"seed": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints at steps 1 and 2, to be copied before it is damaged."""
    out = tmp_path_factory.mktemp("run")
    engine = toy_engine()
    for step in (1, 2):
        draw_and_step(engine)
        save_checkpoint(engine, out, step=step, identity={}, state={})
    return out


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_the_newest_whole_checkpoint_is_found(run):
    assert newest_checkpoint(run) == checkpoint_path(run, 2)
    assert newest_checkpoint(run / "nowhere") is None


def test_a_checkpoint_without_marker_does_not_exist(run):
    path = checkpoint_path(run, 2)
    (path / MARKER_NAME).unlink()
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        load_checkpoint(toy_engine(), path)
    assert newest_checkpoint(run) == checkpoint_path(run, 1)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "marker"])
def test_damage_is_noticed_and_the_one_before_is_taken(run, damage):
    path = checkpoint_path(run, 2)
    file = next(path.glob("*.pt"))
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "delete":
        file.unlink()
    else:
        (path / MARKER_NAME).write_text('{"step": 2')
    with pytest.raises(TrainingError, match="step-00000002"):
        check_checkpoint(path)
    assert newest_checkpoint(run) == checkpoint_path(run, 1)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda marker: marker.update(step=True), "the field 'step' is True: it must be a whole number"),
        (lambda marker: marker.update(processes=0), "the field 'processes' is 0"),
        (lambda marker: marker.update(identity=[]), r"the field 'identity' is \[\]: it must be an object"),
        (lambda marker: marker.update(files={}), r"the field 'files' is \{\}"),
        (lambda marker: marker.update(of_tomorrow=1), "the field 'of_tomorrow' is 1: no field of that name"),
        (lambda marker: marker.pop("step"), "the field 'step' is missing"),
        (lambda marker: marker["files"].update(a=[1]), "the field 'files.a.1' is missing"),
        (lambda marker: marker["files"].update(a=[-1, "0" * 64]), "the field 'files.a.0' is -1"),
        (lambda marker: marker["files"].update(a=[1, "x"]), "the field 'files.a.1' is 'x'"),
        (lambda marker: marker["files"].update({"../a": [1, "0" * 64]}), "it must be the name of a file in the ch"),
        (lambda marker: marker["files"].update({"/etc/a": [1, "0" * 64]}), "it must be the name of a file in the ch"),
        (lambda marker: marker["files"].update({"a" * 300: [1, "0" * 64]}), "it must be the name of a file in the ch"),
    ],
)
def test_a_marker_that_cannot_be_is_named_and_the_one_before_is_taken(run, change, said):
    path = checkpoint_path(run, 2)
    marker = json.loads((path / MARKER_NAME).read_text())
    change(marker)
    (path / MARKER_NAME).write_text(json.dumps(marker))
    with pytest.raises(TrainingError, match=f"no complete checkpoint at .*step-00000002' .*{said}"):
        check_checkpoint(path)
    assert newest_checkpoint(run) == checkpoint_path(run, 1)


def test_a_half_written_folder_of_the_same_step_is_replaced(run):
    path = checkpoint_path(run, 2)
    (path / MARKER_NAME).unlink()
    (path / "leftover.pt").write_bytes(b"half")
    save_checkpoint(toy_engine(), run, step=2, identity={}, state={})
    assert "leftover.pt" not in check_checkpoint(path).files


def test_old_checkpoints_are_dropped(run):
    engine = toy_engine()
    for step in (3, 4):
        save_checkpoint(engine, run, step=step, identity={}, state={})
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [checkpoint_path(run, step).name for step in (3, 4)]
    assert len(names) == KEPT


def test_a_checkpoint_of_another_shape_is_refused(run):
    with pytest.raises(TrainingError, match="does not fit"):
        load_checkpoint(toy_engine(width=5), checkpoint_path(run, 2))


def test_the_checkpoint_just_written_stays_whatever_else_is_there(run):
    engine = toy_engine()
    for step in (8, 9, 3):
        save_checkpoint(engine, run, step=step, identity={}, state={})
    assert newest_checkpoint(run) == checkpoint_path(run, 9)
    assert check_checkpoint(checkpoint_path(run, 3)).step == 3
    assert len(list((run / "checkpoints").iterdir())) == KEPT


def test_what_lies_beyond_the_step_to_go_on_from_is_dropped(run):
    (checkpoint_path(run, 0)).mkdir()
    (run / "checkpoints" / "step-by-step").mkdir()
    drop_beyond(run, 1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-by-step"]
    drop_beyond(run, 0)
    drop_beyond(run / "nowhere", 0)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-by-step"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_generator_of_the_gpu_goes_back_too():
    torch.rand(1, device="cuda")
    state = random_state()
    expected = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
