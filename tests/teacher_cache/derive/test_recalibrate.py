"""Steps of a derived store: the error that it declares counts from the teacher."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.codecs.sample import CalibrationSample
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.origins import Derivation, plan_derivation
from teacher_cache.derive.recalibrate import _squared_weights, _variance, load_coders, recalibrate
from teacher_cache.derive.recode import Coarsening
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.derive.source_rows import SourceRows
from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.format.small_arrays import write_constant
from teacher_cache.format.transforms import read_transform
from teacher_cache.models.attention import AttentionProjections, Projection
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage

Settings = Callable[..., BuildSettings]


def derive(source: Path, out: Path, **flags: Any) -> CacheReader:
    derive_store(DeriveSettings(src=str(source), dst=str(out), **flags), Silent())
    return CacheReader.open(out)


@pytest.fixture(scope="module")
def real_store(shared_teacher: Path, shared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real teacher in half precision: five digits of what it says."""
    folder = tmp_path_factory.mktemp("real")
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as text:
        lines = [line for line, _ in zip(text, range(60), strict=False)]
    (folder / "some.txt").write_text("".join(lines), encoding="utf-8")
    settings = BuildSettings(
        teacher=str(shared_teacher), corpus=(str(folder / "some.txt"),), out=str(folder / "cache.zarr"), seq_len=64,
        max_rows=96, targets="hidden,attention", layers="4", attention_layer=6, precision="float16",
    )  # fmt: skip
    build_cache(settings)
    return Path(settings.out)


def errors(reader: CacheReader, exact: Path) -> dict[str, float]:
    """NMSE of the last hidden state and of queries, keys and values, over all rows."""
    layer, attention_layer = (
        reader.manifest.targets.hidden_layers()[-1],
        reader.manifest.targets.attention_layers()[0],
    )
    wanted = TargetRequest(hidden_layers=(layer,), attention_layers=(attention_layer,))
    sides: dict[str, list[torch.Tensor]] = {"hidden": [], "attention": []}
    for one in (reader, CacheReader.open(exact)):
        targets = one.read_rows(0, reader.rows, wanted)["plain"]
        vectors = [getattr(targets.attention[attention_layer], f"{vector}_BTD") for vector in VECTORS]
        for name, values_BTD in (("hidden", targets.hidden[layer]), ("attention", torch.cat(vectors, dim=2))):
            sides[name].append(values_BTD[targets.real_BT()].double())
    return {
        name: float((have_ND - want_ND).square().sum() / (want_ND - want_ND.mean(0)).square().sum())
        for name, (have_ND, want_ND) in sides.items()
    }


def test_declared_errors_count_from_the_teacher(real_store: Path, tmp_path: Path) -> None:
    """Recoded from half precision, then coarser twice: what is declared is the distance from the teacher's values."""
    source, size = real_store, 0
    for target in (1e-2, 3e-2, 1e-1):
        out = tmp_path / f"{target}.zarr"
        reader = derive(source, out, precision=f"nmse:{target}")
        assert reader.manifest.targets.attention[0].form == "projected"
        for path, record in reader.manifest.calibration.items():
            assert record.nmse == pytest.approx(target, rel=0.06), path
        assert errors(reader, real_store) == pytest.approx({"hidden": target, "attention": target}, rel=0.06)
        before, size, source = size, sum(describe_store(out).bytes_per_array.values()), out
        assert not before or size < 0.9 * before


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_a_fixed_precision_has_lost_counts(small_settings: Settings, tmp_path: Path, precision: str) -> None:
    exact = tmp_path / "exact.zarr"
    build_cache(small_settings(exact, max_rows=160, targets="hidden,attention", layers="4"))
    fixed = derive(exact, tmp_path / "fixed.zarr", precision=precision)
    assert not fixed.manifest.calibration
    lost = errors(fixed, exact)
    target = float(f"{2 * max(lost.values()):.2g}")
    reader = derive(Path(fixed.path), tmp_path / "out.zarr", precision=f"nmse:{target}")
    assert errors(reader, exact) == pytest.approx({"hidden": target, "attention": target}, rel=0.15)
    with pytest.raises(SettingsError, match=f"finer than {precision}.*has lost"):
        derive(Path(fixed.path), tmp_path / "no.zarr", precision=f"nmse:{min(lost.values()) / 2:g}")
    assert not (tmp_path / "no.zarr").exists()


def make(source: Path, **flags: Any) -> tuple[SourceRows, Derivation]:
    reader = CacheReader.open(source)
    return SourceRows(reader), plan_derivation(reader.layout, DeriveSettings(src=str(source), dst="out.zarr", **flags))


def test_a_stream_that_is_kept_keeps_its_constants(nmse_store: Path) -> None:
    said: list[str] = []
    source, derivation = make(nmse_store, row_range="5:30")
    found = recalibrate(source, derivation, said.append)
    assert {path: record for path, (_, record) in found.items()} == source.manifest.calibration
    for path, (transform, _) in found.items():
        want = read_transform(source.reader.storage, source.reader.layout.stream(path))
        assert torch.equal(transform.basis_DK, want.basis_DK) and torch.equal(transform.mean_D, want.mean_D)
    assert not said
    assert load_coders(source, derivation, source.reader.storage) == {}


def test_a_coarser_stream_keeps_its_rotation_but_for_the_order(nmse_store: Path) -> None:
    """The step grows, what was rounded to before is remembered, and the declared error is what was asked for."""
    said: list[str] = []
    source, derivation = make(nmse_store, precision="nmse:0.05", targets="hidden")
    found = recalibrate(source, derivation, said.append)
    assert [line.split(":")[0].strip() for line in said] == ["hidden/2", "hidden/4"]
    for path, (transform, record) in found.items():
        before, old = (
            source.manifest.calibration[path],
            read_transform(source.reader.storage, source.reader.layout.stream(path)),
        )
        assert record.step > before.step and record.earlier_steps == (before.step,)
        assert record.nmse == pytest.approx(0.05, rel=0.15)
        assert sum(record.components.values()) == 32
        columns = {column.numpy().tobytes() for column in old.basis_DK.T}
        assert {column.numpy().tobytes() for column in transform.basis_DK.T} == columns
        assert torch.equal(transform.mean_D, old.mean_D)


def test_coders_come_from_the_constants_of_the_derived_store_alone(nmse_store: Path, tmp_path: Path) -> None:
    """So that a run that goes on codes as the first one did; constants of another rotation are refused."""
    source, derivation = make(nmse_store, precision="nmse:0.05", targets="hidden", layers="4")
    ((path, (transform, _)),) = recalibrate(source, derivation, str).items()
    storage = LocalStorage(tmp_path)
    for name, value in (("basis", transform.basis_DK), ("mean", transform.mean_D)):
        write_constant(storage, f"{path}/{name}", value.numpy())
    write_constant(storage, f"{path}/step", np.array(transform.step))
    coder = load_coders(source, derivation, storage)[path]
    assert isinstance(coder, Coarsening)
    before = read_transform(source.reader.storage, source.reader.layout.stream(path))
    assert coder.ratio == before.step / transform.step < 1
    assert torch.equal(transform.basis_DK[:, coder.place_D], before.basis_DK)
    write_constant(storage, f"{path}/basis", transform.basis_DK.neg().numpy())
    with pytest.raises(StoreError, match="was begun from another store: hidden/4 has not the rotation of"):
        load_coders(source, derivation, storage)


def test_errors_and_variance_are_those_of_what_is_coded() -> None:
    """Queries, keys and values of a hidden state with a given covariance, beside all of them written out."""
    draw = torch.Generator().manual_seed(3)
    maps = {
        name: Projection(weight=torch.randn(5, 4, generator=draw), bias=torch.randn(5, generator=draw))
        for name in VECTORS
    }
    projections = AttentionProjections(**maps)
    values_NH = torch.randn(300, 4, generator=draw) @ torch.randn(4, 4, generator=draw)
    sample = CalibrationSample()
    sample.fit(values_NH)
    vectors_ND = torch.cat([values_NH.double() @ one.weight.double().T + one.bias for one in maps.values()], dim=1)
    for given, coded_ND in ((projections, vectors_ND), (None, values_NH.double())):
        want = float((coded_ND - coded_ND.mean(dim=0)).square().sum(dim=1).mean())
        assert _variance(sample.moments()[1], given) == pytest.approx(want, rel=1e-5)
    weight_H = _squared_weights(projections, 4)
    for component in range(4):
        error_H = torch.zeros(4, dtype=torch.float64)
        error_H[component] = 0.1
        spread = sum(float((one.weight.double() @ error_H).square().sum()) for one in maps.values())
        assert spread == pytest.approx(0.01 * float(weight_H[component]))
    assert _squared_weights(None, 4).tolist() == [1.0] * 4


@pytest.mark.parametrize("rows", ["0:1", "0:2", "16:17", "3:40"])
def test_any_number_of_rows_can_be_recalibrated(nmse_store: Path, rows: str) -> None:
    source, derivation = make(nmse_store, row_range=rows, precision="nmse:0.1", targets="hidden", layers="2")
    ((_, record),) = recalibrate(source, derivation, str).values()
    assert record.step > source.manifest.calibration["hidden/2"].step


def test_where_one_stream_is_refused_only_those_under_way_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def calibrated(_source: object, _derivation: object, origin: Any) -> tuple[None, Any]:
        tried.append(origin.target.path)
        if origin.target.path == "hidden/0":
            time.sleep(0.3)  # so that others could be begun
            raise SettingsError("finer than its source")
        time.sleep(0.01)
        return None, SimpleNamespace(nmse=0.1)

    monkeypatch.setattr("teacher_cache.derive.recalibrate._calibrated", calibrated)
    targets = [SimpleNamespace(target_nmse=0.1, path=f"hidden/{n}") for n in range(20)]
    origins: Any = SimpleNamespace(origins=[SimpleNamespace(target=one, way="recoded") for one in targets])
    nothing: Any = None
    with pytest.raises(SettingsError, match="finer"):
        recalibrate(nothing, origins, print)
    assert len(tried) <= 3
