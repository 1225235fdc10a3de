"""Where learned maps start: at least squares, computed here by NumPy, unless the student holds the teacher's layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from student_train.methods.map_starts import fit_maps, rows_to_fit
from student_train.settings import TrainSettings
from student_train.train.describe import describe_run
from student_train.train.prepare import TrainingRun, prepare_run


def prepare(store: Path, tmp_path: Path, **settings: Any) -> TrainingRun:
    given = {"student": "2x16:2:32", "init": "random", "steps": 1, "device": "cpu", "valid_share": 0.0}
    return prepare_run(TrainSettings(**{**given, **settings}, cache=(str(store),), out=str(tmp_path / "student")))


def vectors(run: TrainingRun) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """What each map takes and should give, over all training rows, by plain forward passes; float64."""
    (rows,), found = run.training_rows, {}
    batch = run.reader.read_rows(rows.start, rows.stop, run.objective.request)
    with torch.no_grad():
        outputs = run.model.eval().run_student(batch)
    for (view, targets), (name, maps) in zip(batch.items(), run.objective.projections.items(), strict=True):
        real_BT = targets.real_BT()
        for map_name in maps:
            _, student, _, teacher, *vector = map_name.split("_")
            given, wanted = outputs[view], targets
            if vector:
                pair = (
                    getattr(side.attention[int(layer)], f"{vector[0]}_BTD")
                    for side, layer in ((given, student), (wanted, teacher))
                )
            else:
                pair = (given.hidden[int(student)], wanted.hidden[int(teacher)])
            found[name, map_name] = tuple(each[real_BT].double().numpy() for each in pair)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "hs", "mapping": "1:2,2:3,2:4"},
        {"method": "direct", "attention_layer": "3"},
        {"method": "hs", "student": "2x32:4:64", "mapping": "uniform+last"},
    ],
)
def test_maps_start_at_least_squares(tiny_store: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run = prepare(tiny_store, tmp_path, **settings)
    assert run.maps_fitted and any("start at the linear regression" in line for line in describe_run(run))
    found = vectors(run)
    assert len(found) == 3
    for (name, map_name), (student, teacher) in found.items():
        linear = run.objective.projections[name].get_submodule(map_name)
        weight, bias = (each.detach().double().numpy() for each in (linear.weight, linear.bias))
        residual = teacher - student @ weight.T - bias
        spread = np.square(teacher - teacher.mean(0)).sum()
        constant = np.concatenate([student, np.ones((len(student), 1))], axis=1)
        best = teacher - constant @ np.linalg.lstsq(constant, teacher, rcond=None)[0]
        assert np.abs(residual.mean(0)).max() < 1e-4 * teacher.std()  # the intercept is free of the penalty
        assert np.square(best).sum() <= np.square(residual).sum() < 1.05 * np.square(best).sum() < spread


def test_copied_layers_start_at_the_identity(tiny_store: Path, tmp_path: Path) -> None:
    run = prepare(tiny_store, tmp_path, method="hs", mapping="uniform+last", student="2x32:4:64", init="auto")
    assert not run.maps_fitted and not any("regression" in line for line in describe_run(run))
    for linear in run.objective.projections["hs"].children():
        assert torch.equal(linear.weight, torch.eye(32)) and not linear.bias.any()


def test_of_principal_components_too(make_tiny_store: Any, tmp_path: Path) -> None:
    """Maps lead to rotated coordinates there; a training starts no farther away than the best constant guess."""
    store = make_tiny_store(tmp_path / "cache.zarr", precision="nmse:1e-2")
    run = prepare(store, tmp_path, method="hs", mapping="uniform+last", student="2x32:4:64")
    assert run.maps_fitted and run.objective.request.rotated_layers
    (rows,) = run.training_rows
    (loss,) = run.model(run.reader.read_rows(rows.start, rows.stop, run.objective.request)).values()
    assert (loss.total / loss.count).item() < 3.0
    again = prepare(store, tmp_path, method="hs", mapping="uniform+last", student="2x32:4:64")
    for one, other in zip(run.objective.parameters(), again.objective.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("student", ["2x16:2:32", "folder"])
def test_sliced_and_given_students_are_fitted(tiny_store: Path, tmp_path: Path, student: str) -> None:
    """Their hidden states are not in the teacher's coordinates, or need not be."""
    given = str(tiny_store / "teacher") if student == "folder" else student
    run = prepare(tiny_store, tmp_path, method="hs", mapping="last1", student=given, init="auto")
    assert run.maps_fitted and not run.built.whole_layers


def test_a_student_that_is_not_finite_is_left_to_the_first_validation(tiny_store: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_store / "teacher")
    with torch.no_grad():
        next(model.encoder.layer[0].parameters()).fill_(float("nan"))
    folder = shutil.copytree(tiny_store / "teacher", tmp_path / "nan")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    assert not prepare(tiny_store, tmp_path, method="hs", mapping="1:2", student=str(folder), init="auto").maps_fitted


def test_no_maps_where_nothing_is_trained(tiny_store: Path, tmp_path: Path) -> None:
    assert not prepare(tiny_store, tmp_path, method="hs", steps=0).maps_fitted
    settings = TrainSettings(method="hs", init="random", cache=(str(tiny_store),), out=str(tmp_path), device="cpu")
    assert not prepare_run(settings, fresh=False).maps_fitted and prepare_run(settings).maps_fitted


def test_nothing_to_fit(tiny_store: Path, tmp_path: Path) -> None:
    assert not prepare(tiny_store, tmp_path, method="mha").maps_fitted
    run = prepare(tiny_store, tmp_path, method="hs", mapping="last1", init="auto", student="2x32:4:64")
    batch = run.reader.read_rows(0, 8, run.objective.request)
    before = [parameter.clone() for parameter in run.objective.parameters()]
    assert fit_maps(run.model, [batch]) is False, "all rows in one batch leave none to choose the ridge on"
    assert all(torch.equal(*pair) for pair in zip(before, run.objective.parameters(), strict=True))


def test_rows_are_read_in_two_batches_at_least() -> None:
    assert rows_to_fit(10_000, 512) == (16, 4) and rows_to_fit(10_000, 64) == (128, 32)
    assert rows_to_fit(3, 512) == (3, 1) and rows_to_fit(1, 24) == (1, 1) and rows_to_fit(9, 10_000) == (2, 1)
