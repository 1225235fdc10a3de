"""Every mapping as a method: what it reads, how it is described, what it refuses, and that it teaches."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from student_train.layer_map import MAPPINGS, parse_mapping
from student_train.methods.base import StudentNeeds
from student_train.methods.hs import (
    AttentionOverLayers,
    FirstTokenTransfer,
    HiddenTransfer,
    TransportTransfer,
)
from student_train.methods.model import DistillationModel, freeze_unused
from student_train.methods.objective import Objective, make_objective
from student_train.student_shape import read_shape
from student_train.students.shape import derive_config
from student_train.students.student import build_student, plan_student
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import Batch, TargetRequest
from teacher_cache.errors import TargetsError
from teacher_cache.read.reader import CacheReader
from tests.sinks import plant_sinks

LENGTHS = (12, 5, 9)
ALL = (1, 2, 3, 4)


def objective_for(cache: Any, mapping: str, shape: str = "2x24:4") -> Objective:
    config = derive_config(AutoConfig.from_pretrained(cache.folder), read_shape(shape).completed(), (2, 4))
    return make_objective({"hs": 1.0}, source=cache, student=config, mapping=mapping)


def distil(cache: Any, mapping: str, shape: str = "2x24:4", init: str = "random") -> DistillationModel:
    built = build_student(
        plan_student(shape, teacher_folder=cache.folder, init=init, with_mlm_head=False, seq_len=12), seed=0
    )
    objective = make_objective({"hs": 1.0}, source=cache, student=built.model.config, mapping=mapping)
    return DistillationModel(built.model, objective)


@pytest.mark.parametrize(
    ("mapping", "kind", "students", "teachers", "counted"),
    [
        ("uniform-cons", HiddenTransfer, {1, 2}, ALL, "positions"),
        ("last1", HiddenTransfer, {2}, (4,), "positions"),
        ("skip", FirstTokenTransfer, {1}, (2,), "rows"),
        ("emd", TransportTransfer, {1, 2}, ALL, "positions"),
        ("alp", AttentionOverLayers, {1, 2}, ALL, "positions"),
    ],
)
def test_what_each_form_reads_and_counts(
    mapping: str,
    kind: type,
    students: set[int],
    teachers: tuple[int, ...],
    counted: str,
    tiny_teacher: Any,
    live_cache: Any,
) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    objective = objective_for(cache, mapping)
    method = objective.methods["hs"]
    assert isinstance(method, kind) and method.counted == counted
    assert objective.request == TargetRequest(hidden_layers=teachers)
    assert objective.needs("plain") == StudentNeeds(hidden_layers=frozenset(students)) and not objective.needs("masked")
    described = method.describe()
    assert described["mapping"] == mapping
    pairs = parse_mapping(mapping, 4, 2).pairs
    if mapping in ("emd", "alp"):
        assert described["teacher_layers"] == [1, 2, 3, 4] and "pairs" not in described
    else:
        assert described["pairs"] == [list(pair) for pair in pairs]


def test_hidden_variance_is_read_for_the_mapped_layers_only(tiny_teacher: Any, live_cache: Any) -> None:
    method = objective_for(live_cache(tiny_teacher(), hidden=ALL), "1:1,2:3").methods["hs"]
    assert isinstance(method, HiddenTransfer) and method.variance == {1: 3.0, 3: 5.0}


@pytest.mark.parametrize("mapping", ["emd", "alp"])
def test_layers_in_units_of_their_deviation(mapping: str, tiny_teacher: Any, live_cache: Any) -> None:
    """Variances are 2 + layer in total, of 32 components."""
    method = objective_for(live_cache(tiny_teacher(), hidden=ALL), mapping).methods["hs"]
    assert isinstance(method, TransportTransfer | AttentionOverLayers)
    assert method.deviations == pytest.approx([(variance / 32) ** 0.5 for variance in (3, 4, 5, 6)])


@pytest.mark.parametrize("mapping", ["emd", "alp"])
def test_layers_of_different_inputs_are_not_compared(mapping: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    specs = tuple(
        replace(spec, view="masked" if spec.layer == 3 else "plain") for spec in cache.manifest.targets.hidden
    )
    mixed = replace(cache.manifest, targets=replace(cache.manifest.targets, hidden=specs))
    cache = replace(cache, manifest=mixed)
    with pytest.raises(TargetsError, match=r"masked for 3 and plain for 1, 2, 4.*--layers all and one --hs-view"):
        objective_for(cache, mapping)
    assert objective_for(cache, "uniform-cons").needs("masked") == StudentNeeds(hidden_layers=frozenset({2}))


@pytest.mark.parametrize("mapping", ["emd", "alp"])
def test_a_store_that_lacks_layers_is_refused_with_what_adds_them(
    mapping: str, make_tiny_store: Any, tmp_path: Path
) -> None:
    options = {"max_rows": 16, "targets": "hidden", "views": 1}
    store = make_tiny_store(tmp_path / "cache.zarr", layers="2,4", **options)
    reader = CacheReader.open(store)
    student = derive_config(
        AutoConfig.from_pretrained(reader.teacher_folder()), read_shape("2x24:4").completed(), (2, 4)
    )
    with pytest.raises(TargetsError, match="lacks hidden 1, hidden 3: .*--layers 1") as caught:
        make_objective({"hs": 1.0}, source=reader, student=student, mapping=mapping)
    why = (
        f"--mapping '{mapping}' compares each student layer with every teacher layer, 1 to 4: `--layers all` names them"
    )
    assert str(caught.value).endswith(why)
    if mapping == "emd":
        make_tiny_store(store, layers="all", **options)
        objective = make_objective({"hs": 1.0}, source=CacheReader.open(store), student=student, mapping=mapping)
        assert objective.request.hidden_layers == ALL


def test_other_refusals_of_a_store_say_nothing_of_all_layers(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    config = derive_config(AutoConfig.from_pretrained(cache.folder), read_shape("2x24:4").completed(), (2, 4))
    for mapping, methods in (("uniform", {"hs": 1.0}), ("emd", {"hs": 1.0, "mha": 1.0})):
        lacking = replace(cache, manifest=live_cache(cache.folder, hidden=ALL[:3]).manifest)
        with pytest.raises(TargetsError) as caught:
            make_objective(methods, source=lacking if mapping == "uniform" else cache, student=config, mapping=mapping)
        assert "--layers all" not in str(caught.value)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_sums_do_not_depend_on_how_rows_are_batched(mapping: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    batch, model = cache.batch(LENGTHS), distil(cache, mapping)
    whole = model(batch)["hs"]
    parts = [model({view: rows.rows(n, n + 1) for view, rows in batch.items()})["hs"] for n in range(3)]
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-4)
    assert sum(int(part.count) for part in parts) == int(whole.count)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_bfloat16_student_gets_its_loss_in_float32(mapping: str, tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    batch, model = cache.batch(LENGTHS), distil(cache, mapping)
    exact = model(batch)["hs"].total
    half = model.bfloat16()(batch)["hs"].total
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=0.1)


def test_a_copy_of_the_teacher_has_nothing_to_learn_where_layers_are_given(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    batch = cache.batch(LENGTHS)
    for mapping in ("uniform", "last1", "uniform-cons", "skip"):
        loss = distil(cache, mapping, "4x32:4", init="auto")(batch)["hs"]
        assert (loss.total / loss.count).item() == pytest.approx(0, abs=1e-5), mapping


def test_a_transport_finds_the_layers_that_a_student_was_copied_from(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    model = distil(cache, "emd", "4x32:4", init="auto")
    model(cache.batch(LENGTHS))
    model.objective.finish_step()
    flow = np.asarray(model.objective.adapted()["hs"]["flow"])
    # each layer's own column, where the marginals allow it, and never more than a sliver elsewhere
    assert flow.argmax(1).tolist() == [0, 1, 2, 3] and flow.trace() > 0.9


def test_a_probe_is_not_observed(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    batch, model = cache.batch(LENGTHS), distil(cache, "emd")
    before = model.objective.adapted()
    freeze_unused(model, batch)
    model.eval()
    model(batch)
    model.train()
    model.objective.finish_step()
    assert model.objective.adapted() == before
    model(batch)
    model.objective.finish_step()
    assert model.objective.adapted() != before
    assert make_objective({"hs": 1.0}, source=cache, student=model.student.config).adapted() == {}


def read(store: Path, objective: Objective) -> Batch:
    return CacheReader.open(store).read_rows(0, 16, objective.request)


@pytest.mark.parametrize("shape", ["2x24:4", "3x32:4"])
@pytest.mark.parametrize("mapping", [*MAPPINGS, "1:1,2:3+last1"])
def test_every_mapping_teaches_from_a_store(mapping: str, shape: str, tiny_store: Path) -> None:
    """Students of half the teacher's 4 layers and another width, and of 3 of them and its own width."""
    reader = CacheReader.open(tiny_store)
    built = build_student(
        plan_student(shape, teacher_folder=reader.teacher_folder(), init="random", with_mlm_head=False, seq_len=24),
        seed=0,
    )
    objective = make_objective({"hs": 1.0}, source=reader, student=built.model.config, mapping=mapping)
    model, batch = DistillationModel(built.model, objective), read(tiny_store, objective)
    exported = set(built.model.state_dict())
    freeze_unused(model, batch)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(batch)["hs"]
        (loss.total / loss.count).backward()
        optimizer.step()
        objective.finish_step()
        losses.append((loss.total / loss.count).item())
    assert losses[-1] < 0.9 * losses[0], losses
    # what trains along is not the student's
    assert set(model.student.state_dict()) == exported
    flows = objective.adapted().get("hs", {}).get("flow")
    assert (flows is not None) == (mapping == "emd")
    if flows is not None:
        assert np.asarray(flows).sum() == pytest.approx(1, abs=1e-4) and np.asarray(flows).min() >= 0


@pytest.mark.parametrize("mapping", ["1:2,2:4", "emd", "alp"])
def test_sinks_are_not_learned(mapping: str, tiny_teacher: Any, live_cache: Any) -> None:
    """First tokens of layer 4 a thousand times as large: the loss is that of a row without them."""
    cache = live_cache(tiny_teacher(), hidden=ALL)
    model, batch = distil(cache, mapping), cache.batch(list(LENGTHS))
    targets = batch["plain"]
    first_BT = torch.zeros(3, 12, dtype=torch.bool)
    first_BT[:, 0] = True
    none_BT = torch.zeros_like(first_BT)
    sinks = {layer: first_BT if layer == 4 else none_BT for layer in ALL}
    large = targets.hidden[4].clone()
    large[:, 0] *= 1000
    found = {
        name: model({"plain": replace(targets, hidden={**targets.hidden, 4: state}, hidden_sinks=sinks)})["hs"]
        for name, state in (("large", large), ("as they were", targets.hidden[4]))
    }
    assert torch.isfinite(found["large"].total)
    if mapping == "alp":
        # attention over layers is position by position
        assert found["large"].total.item() == pytest.approx(found["as they were"].total.item(), rel=1e-6)
    else:
        assert torch.equal(found["large"].total, found["as they were"].total)
    # a step divides by the positions that the host counts, and a validation by these: both by all of them
    assert int(found["large"].count) == sum(LENGTHS)
    without = dict.fromkeys(ALL, none_BT)
    plain, none = (model({"plain": replace(targets, hidden_sinks=one)})["hs"] for one in ({}, without))
    assert torch.equal(plain.total, none.total) and plain.total > found["large"].total


def test_vectors_to_fit_are_those_of_ordinary_positions(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=ALL)
    model, batch = distil(cache, "2:4"), cache.batch(list(LENGTHS))
    first_BT = torch.zeros(3, 12, dtype=torch.bool)
    first_BT[:, 0] = True
    targets = replace(batch["plain"], hidden_sinks={4: first_BT})
    method = model.objective.methods["hs"]
    assert isinstance(method, HiddenTransfer)
    ((_, student_ND, teacher_ND),) = method.mapped(model.run_student({"plain": targets}), {"plain": targets})
    assert len(student_ND) == len(teacher_ND) == sum(LENGTHS) - 3
    assert torch.equal(teacher_ND, torch.cat([targets.hidden[4][row, 1:length] for row, length in enumerate(LENGTHS)]))


@pytest.fixture(scope="module")
def sink_store(tiny_teacher: Any, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 2 and 4 of a BERT whose first tokens of documents are sinks."""
    folder = tmp_path_factory.mktemp("sinks")
    teacher = Path(shutil.copytree(tiny_teacher(), folder / "teacher"))
    plant_sinks(teacher, token_id=2)
    build_cache(
        BuildSettings(
            teacher=str(teacher), corpus=(str(tiny_corpus),), out=str(folder / "cache.zarr"), targets="hidden",
            layers="2,4", precision="nmse:1e-2", seq_len=24, max_rows=64, device="cpu",
        )
    )  # fmt: skip
    return folder / "cache.zarr"


def test_the_loss_of_a_store_with_sinks_is_that_of_its_ordinary_tokens(sink_store: Path) -> None:
    """In rotated coordinates, against float64 on the teacher's own states; the best constant guess costs about 1."""
    reader = CacheReader.open(sink_store)
    built = build_student(
        plan_student("2x24:4", teacher_folder=reader.teacher_folder(), init="random", with_mlm_head=False, seq_len=12),
        seed=0,
    )
    objective = make_objective({"hs": 1.0}, source=reader, student=built.model.config, mapping="1:2,2:4")
    assert objective.request.rotated_layers == (2, 4)
    model = DistillationModel(built.model, objective)
    batch = reader.read_rows(0, 16, objective.request)
    found, outputs = model(batch)["hs"], model.run_student(batch)
    plain = reader.read_rows(0, 16, TargetRequest(hidden_layers=(2, 4)))["plain"]
    expected, constant = 0.0, 0.0
    for pair in ((1, 2), (2, 4)):
        linear = objective.projections["hs"].get_submodule(f"student_{pair[0]}_teacher_{pair[1]}")
        ordinary_BT = plain.ordinary_BT(pair[1])
        assert 0 < int((plain.real_BT() & ~ordinary_BT).sum()) < 0.2 * int(plain.real_BT().sum())
        rotation = reader.rotation(pair[1])
        assert rotation is not None
        mapped_ND = rotation.synthesise(linear(outputs["plain"].hidden[pair[0]])[ordinary_BT].float())
        taught_ND = plain.hidden[pair[1]][ordinary_BT].double()
        variance = reader.hidden_variance(pair[1])
        expected += float((mapped_ND.double() - taught_ND).square().sum()) / variance
        constant += float((taught_ND - taught_ND.mean(0)).square().sum()) / variance
    assert found.total.item() == pytest.approx(expected, rel=1e-4)
    assert int(found.count) == int(plain.real_BT().sum())
    assert constant / int(plain.real_BT().sum()) == pytest.approx(2.0, rel=0.25)


@pytest.fixture(scope="module")
def calibrated_store(make_tiny_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 2 and 4 in the `nmse` codec, layer 1 in float16."""
    store = tmp_path_factory.mktemp("calibrated") / "cache.zarr"
    for precision, layers in (("nmse:1e-2", "2,4"), ("float16", "1")):
        make_tiny_store(store, precision=precision, layers=layers, targets="hidden", views=1, max_rows=64)
    return store


class Unrotated:
    """A store that is read in the coordinates of the teacher, as a pool of several calibrations is."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def rotation(self, layer: int) -> None:
        return None


@pytest.mark.parametrize("shape", ["2x32:4", "2x24:4"])
def test_maps_to_rotated_targets_cost_the_same(shape: str, calibrated_store: Path) -> None:
    reader = CacheReader.open(calibrated_store)
    built = build_student(
        plan_student(shape, teacher_folder=reader.teacher_folder(), init="random", with_mlm_head=False, seq_len=12),
        seed=0,
    )
    found = []
    for source in (reader, Unrotated(reader)):
        objective = make_objective({"hs": 1.0}, source=source, student=built.model.config, mapping="1:2,2:2,2:4")
        loss = DistillationModel(built.model, objective)(reader.read_rows(0, 6, objective.request))["hs"]
        built.model.zero_grad()
        loss.total.backward()
        trained = (*built.model.parameters(), *objective.parameters())
        gradient = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        found.append((objective.request.rotated_layers, loss.total.item(), gradient))
    (rotated, total, gradient), (unrotated, expected_total, expected_gradient) = found
    assert (rotated, unrotated) == ((2, 4), ())
    assert total == pytest.approx(expected_total, rel=1e-5)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-5


def test_layers_without_a_rotation_are_learned_as_they_are(calibrated_store: Path) -> None:
    """A store may hold some layers calibrated and others not."""
    reader = CacheReader.open(calibrated_store)
    config = derive_config(
        AutoConfig.from_pretrained(reader.teacher_folder()), read_shape("2x32:4").completed(), (2, 4)
    )
    objective = make_objective({"hs": 1.0}, source=reader, student=config, mapping="1:1,2:4")
    assert objective.request.rotated_layers == (4,)
    maps = objective.projections["hs"]
    assert torch.equal(maps.get_submodule("student_1_teacher_1").weight, torch.eye(32))
    rotated = maps.get_submodule("student_2_teacher_4")
    assert torch.equal(rotated.weight, torch.eye(32)) and torch.equal(
        rotated.rotation.basis_DK, reader.rotation(4).basis_DK
    )
    plain = reader.read_rows(0, 2, TargetRequest(hidden_layers=(1,)))["plain"].hidden[1]
    assert torch.equal(reader.read_rows(0, 2, objective.request)["plain"].hidden[1], plain)
