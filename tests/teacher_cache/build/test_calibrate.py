"""The error that a build declares of its `nmse` streams is the one that its rows have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from teacher_cache.build.build import build_cache
from teacher_cache.build.calibrate import _collect, _run, ensure_calibrated
from teacher_cache.build.settings import BuildSettings
from teacher_cache.codecs.sample import share_rows
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS, vector_streams
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, TargetSpecs
from teacher_cache.corpus.corpus import Rows
from teacher_cache.format.groups import Group
from teacher_cache.format.protocol import read_manifest
from teacher_cache.format.transforms import read_transform
from teacher_cache.format.writer import GroupWriter
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.teacher import Teacher

Settings = Callable[..., BuildSettings]


def measured_nmse(settings: BuildSettings) -> dict[str, float]:
    """The error of every hidden and attention target over all rows of a store, against the teacher as users run it."""
    model = AutoModelForMaskedLM.from_pretrained(settings.teacher).eval()
    enable_tap(model)
    reader = CacheReader.open(settings.out)
    layer = reader.manifest.targets.attention_layers()[0]
    request = TargetRequest(hidden_layers=reader.manifest.targets.hidden_layers(), attention_layers=(layer,))
    (targets,) = reader.read_rows(0, reader.rows, request).values()
    real_BT = targets.real_BT()
    with torch.no_grad(), record_attention(model, [layer]) as recorded:
        live = model.base_model(targets.input_ids_BT, attention_mask=real_BT.long(), output_hidden_states=True)
    pairs = {f"hidden/{n}": (values, live.hidden_states[n]) for n, values in targets.hidden.items()}
    sides = (targets.attention[layer], recorded.vectors[layer])
    pairs["attention"] = tuple(torch.cat([getattr(v, f"{n}_BTD") for n in VECTORS], dim=2) for v in sides)
    errors = {}
    for name, (have_BTD, want_BTD) in pairs.items():
        have_ND, want_ND = have_BTD[real_BT].double(), want_BTD[real_BT].double()
        errors[name] = float((have_ND - want_ND).square().sum() / (want_ND - want_ND.mean(0)).square().sum())
    return errors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"targets": "attention"},
        {"relations": "qkv"},
        {"rows": "document"},
        {"hs_view": "masked", "targets": "hidden,attention"},
    ],
    ids=["packed", "attention in its own metric", "qkv", "documents", "masked"],
)
def test_nmse_is_the_declared_one(small_settings: Settings, tmp_path: Path, changes: dict[str, object]) -> None:
    """A tiny sample of tiny vectors: the error of all rows is the declared one but for what a sample varies."""
    target = 1e-2
    settings = small_settings(tmp_path / "cache.zarr", max_rows=150, precision=f"nmse:{target}", **changes)
    build_cache(settings)
    errors = measured_nmse(settings)
    attention_error = errors.pop("attention")
    assert all(error == pytest.approx(target, rel=0.15) for error in errors.values())
    records = CacheReader.open(settings.out).manifest.calibration
    assert all(record.nmse == pytest.approx(target, rel=0.15) for record in records.values())
    alone = changes.get("targets") == "attention"
    assert ("attention/3/projected" in records) == alone
    if alone or "relations" in changes:
        # where attention shares a hidden state, the error is declared on that
        assert attention_error == pytest.approx(target, rel=0.15)


def test_nmse_holds_on_the_real_teacher(shared_teacher: Path, shared_corpus: Path, tmp_path: Path) -> None:
    import gzip

    target = 1e-2

    corpus = tmp_path / "some.txt"
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as text:
        corpus.write_text("".join(line for line, _ in zip(text, range(60), strict=False)), encoding="utf-8")
    settings = BuildSettings(
        teacher=str(shared_teacher), corpus=(str(corpus),), out=str(tmp_path / "cache.zarr"), seq_len=64, max_rows=96,
        targets="hidden,attention", layers="2", attention_layer=5, precision=f"nmse:{target}",
    )  # fmt: skip
    build_cache(settings)
    errors = measured_nmse(settings)
    assert errors["hidden/2"] == pytest.approx(target, rel=0.1)
    assert errors["attention"] == pytest.approx(target, rel=0.1)
    bits = describe_store(settings.out).bits_per_value()
    assert 0 < bits["attention/5/projected"] < bits["hidden/2"] < 3.4


def test_every_nmse_stream_is_calibrated_once(
    plain_manifest: Callable[..., Manifest], small_teacher: Teacher, small_rows: Rows, tmp_path: Path
) -> None:
    """Into constants and records in the manifest; the second time there is nothing to do."""
    targets = TargetSpecs(
        hidden=(HiddenSpec(layer=2, codec="nmse:0.01"), HiddenSpec(layer=4, codec="float16")),
        attention=(AttentionSpec(layer=3, form="projected", codec="nmse:0.05"),),
    )
    manifest = plain_manifest(targets)
    projections = {3: small_teacher.probe_attention(3)}
    storage, said = LocalStorage(tmp_path / "store"), list[str]()
    writer = GroupWriter(storage, Group(prefix="", manifest=manifest, seal=None)).write_manifest(manifest)
    calibrated = ensure_calibrated(writer, small_teacher, small_rows, 16, projections, said.append)
    records = read_manifest(storage).calibration
    assert records == calibrated.manifest.calibration
    assert {path: record.nmse for path, record in records.items()} == {
        "hidden/2": pytest.approx(0.01, rel=0.3),
        "attention/3/projected": pytest.approx(0.05, rel=0.3),
    }
    for path, width in (("hidden/2", 32), ("attention/3/projected", 96)):
        transform = read_transform(storage, calibrated.group.layout.stream(path))
        assert transform.basis_DK.shape == (width, 32) and transform.step == records[path].step
        assert torch.allclose(transform.basis_DK.T @ transform.basis_DK, torch.eye(32), atol=1e-5)
        assert sum(records[path].components.values()) == 32
    assert said and any("hidden/2" in line for line in said)
    before, there = list(said), {key: storage.read(key) for key in storage.list()}
    assert ensure_calibrated(calibrated, small_teacher, small_rows, 16, projections, said.append) is calibrated
    assert (said, {key: storage.read(key) for key in storage.list()}) == (before, there)


def test_fixed_precisions_need_no_calibration(
    plain_manifest: Callable[..., Manifest], small_teacher: Teacher, small_rows: Rows, tmp_path: Path
) -> None:
    manifest = plain_manifest(TargetSpecs(hidden=(HiddenSpec(layer=2, codec="int4"),)))
    writer = GroupWriter(LocalStorage(tmp_path / "store"), Group(prefix="", manifest=manifest, seal=None))
    assert ensure_calibrated(writer, small_teacher, small_rows, 16, {}, pytest.fail) is writer
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_rows_of_a_small_store_serve_for_everything(
    plain_manifest: Callable[..., Manifest], small_teacher: Teacher, small_rows: Rows, rows: int
) -> None:
    """A store of one row fits, tunes and checks on it; with more, no row that was fitted is measured."""
    manifest = plain_manifest(TargetSpecs(hidden=(HiddenSpec(layer=2, codec="nmse:0.01"),)), rows=rows)
    (stream,) = vector_streams(manifest)
    sample = _collect(manifest, [stream], partial(_run, manifest, small_teacher, small_rows, 4), {})[stream.path]
    block = small_rows.read(0, rows)
    live = small_teacher.run(
        torch.from_numpy(block.input_ids_BT).long(), torch.from_numpy(block.length_B), hidden_layers=[2]
    ).hidden[2]
    fit, tune, check = share_rows(rows, 24, 32)
    assert sample.count == int(block.length_B[:fit].sum())
    starts = {
        name: min(first, rows - count) for name, first, count in (("tune", fit, tune), ("check", fit + tune, check))
    }
    for name, count in (("tune", tune), ("check", check)):
        chosen = range(starts[name], starts[name] + count)
        want_ND = torch.cat([live[row, : block.length_B[row]] for row in chosen])
        assert torch.allclose(torch.cat(getattr(sample, name)), want_ND, atol=1e-4)
