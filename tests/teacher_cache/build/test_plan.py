"""A plan says what the build then writes, and a build that cannot fit does not begin."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.plan import BuildPlan, plan_build
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import CorpusError, SpaceError, StoreError, TeacherError
from teacher_cache.read.info import describe_store
from teacher_cache.wording import format_bytes

Settings = Callable[..., BuildSettings]
pytestmark = pytest.mark.usefixtures("time_to_try")

TOLERANCE = 0.05


def assert_as_built(plan: BuildPlan, tolerance: float = TOLERANCE) -> None:
    """The store that has been built since is what the plan said."""
    info = describe_store(plan.path)
    written: dict[str, int] = dict.fromkeys((name for group in plan.groups for name in group.bytes_per_target()), 0)
    for path, size in info.bytes_per_array.items():
        kind, _, rest = path.partition("/")
        name = f"{kind} {rest.partition('/')[0]}" if kind in ("hidden", "attention") else kind
        written[name if name in written else "inputs"] += size
    planned = {name: size for group in plan.groups for name, size in group.bytes_per_target().items()}
    assert planned == pytest.approx(written, rel=tolerance)
    assert plan.total_bytes == pytest.approx(info.total_bytes, rel=tolerance)
    if plan.state == "new":
        files = [path for path in Path(plan.path).rglob("*") if path.is_file()]
        assert plan.total_objects == len(files)
        arrays = {path for group in plan.groups for path in group.bytes_per_array}
        assert plan.folders == sum(entry.is_dir() for path in arrays for entry in Path(plan.path, path, "c").rglob("*"))


def test_the_real_teacher_takes_what_was_planned(shared_teacher: Path, shared_corpus: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "some.txt"
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as text:
        corpus.write_text("".join(line for line, _ in zip(text, range(60), strict=False)), encoding="utf-8")
    settings = BuildSettings(
        teacher=str(shared_teacher), corpus=(str(corpus),), out=str(tmp_path / "cache.zarr"), seq_len=64, max_rows=96,
        layers="2,4", attention_layer=4, device="cpu",
    )  # fmt: skip
    plan = plan_build(settings)
    assert not Path(settings.out).exists()
    assert (plan.state, plan.fits, plan.device) == ("new", True, "cpu")
    assert 8 <= plan.sample_rows <= 64
    assert plan.seconds > 0 and plan.tokens_per_second > 0
    build_cache(settings)
    assert_as_built(plan)
    (group,) = plan.groups
    assert (group.rows, group.blocks, group.tokens) == (96, 2, 96 * 64)
    assert set(group.bytes_per_target()) == {"inputs", "logits", "hidden 2", "hidden 4", "attention 4"}


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_store_of_few_rows_is_forecast_to_the_byte(small_settings: Settings, tmp_path: Path, precision: str) -> None:
    """All rows are tried: nothing is left to extrapolate but the share of a last, short block."""
    settings = small_settings(tmp_path / "cache.zarr", precision=precision, views=2, relations="qkv")
    plan = plan_build(settings)
    build_cache(settings)
    assert plan.sample_rows == 40
    assert plan.groups[0].bytes_per_array == describe_store(settings.out).bytes_per_array
    assert_as_built(plan)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "float16", "block_rows": 64},
        {"rows": "document", "targets": "attention"},
        {"logits": "sample", "k": 20, "hs_view": "masked"},
        {"part": "2/2"},
    ],
    ids=["packed", "float16", "documents, attention in its own metric", "drawn ids, masked view", "a part"],
)
def test_rows_beyond_the_sample_are_extrapolated(
    small_settings: Settings, tmp_path: Path, changes: dict[str, object]
) -> None:
    values = {"precision": "nmse:1e-2", "max_rows": 150, **changes}
    settings = small_settings(tmp_path / "cache.zarr", **values)
    plan = plan_build(settings)
    build_cache(settings)
    assert plan.sample_rows == 64 < plan.manifest.rows
    assert_as_built(plan)


def test_a_plan_says_when_its_sample_was_too_small_to_calibrate(small_settings: Settings, tmp_path: Path) -> None:
    """The tiny teacher is 32 wide: 320 tokens are enough."""
    plans = {
        precision: plan_build(small_settings(tmp_path / "cache.zarr", precision=precision, targets="hidden"))
        for precision in ("float16", "nmse:1e-2")
    }
    assert not any(plan.rough for plan in plans.values())
    few = {precision: replace(plan, sample_rows=13) for precision, plan in plans.items()}
    assert {precision: plan.rough for precision, plan in few.items()} == {"float16": False, "nmse:1e-2": True}
    assert plans["nmse:1e-2"].to_json()["rough"] is False


def test_a_store_of_one_row(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="nmse:1e-2", max_rows=1)
    plan = plan_build(settings)
    build_cache(settings)
    assert plan.sample_rows == 1
    assert_as_built(plan)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def test_only_what_an_unfinished_store_lacks_is_planned(
    small_settings: Settings, nmse_store: Path, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="nmse:1e-2", views=2)
    out = Path(shutil.copytree(nmse_store, settings.out))
    (out / "seal.json").unlink()
    (out / "commits/00000001.json").unlink()
    sizes = {
        array: sum(file.stat().st_size for file in (out / array / "c/1").rglob("*") if file.is_file())
        for array in describe_store(nmse_store).bytes_per_array
    }
    before = files_of(out)
    plan = plan_build(settings)
    assert files_of(out) == before, "planning writes nothing"
    assert plan.state == "unfinished"
    (group,) = plan.groups
    assert (group.rows, group.blocks, plan.sample_rows) == (16, 1, 16)
    assert group.bytes_per_array == sizes, "coded as the store codes, by its own calibration"
    assert plan.other_bytes < 20_000, "the teacher is there already"


def test_only_targets_that_a_finished_store_lacks_are_planned(
    small_settings: Settings, nmse_store: Path, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="nmse:1e-2", views=2, layers="1,2,4")
    out = Path(shutil.copytree(nmse_store, settings.out))
    before, there = files_of(out), describe_store(out)
    plan = plan_build(settings)
    assert files_of(out) == before
    assert plan.state == "extended"
    (group,) = plan.groups
    assert group.group == "extension 1" and list(group.targets) == ["hidden 1"]
    assert {path.partition("/codes")[0].partition("/escapes")[0] for path in group.bytes_per_array} == {"hidden/1"}
    build_cache(settings)
    built = describe_store(out)
    added = {path: size for path, size in built.bytes_per_array.items() if path not in there.bytes_per_array}
    assert group.total_bytes == pytest.approx(sum(added.values()), rel=TOLERANCE)
    assert plan.total_bytes == pytest.approx(built.total_bytes - there.total_bytes, rel=0.2), "mostly metadata"


def test_a_complete_store_needs_nothing(small_settings: Settings, small_store: Path) -> None:
    plan = plan_build(small_settings(small_store))
    assert (plan.state, plan.groups, plan.total_bytes, plan.sample_rows) == ("complete", (), 0, 0)
    assert json.loads(json.dumps(plan.to_json()))["total_bytes"] == 0


def test_a_plan_refuses_what_the_build_would(small_settings: Settings, small_store: Path) -> None:
    with pytest.raises(StoreError, match="--seed: the store has 0, this command asks for 7"):
        plan_build(small_settings(small_store, seed=7))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes; only root can."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False, capture_output=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_build_that_cannot_fit_is_refused_before_its_first_block(
    small_settings: Settings, small_disk: Callable[[int], Path], notes: Any, tmp_path: Path
) -> None:
    large = {"max_rows": 150, "block_rows": 32, "views": 3, "hs_view": "masked", "relations": "qkv", "layers": "all"}
    plan = plan_build(small_settings(tmp_path / "plan.zarr", **large))
    arrays = plan.groups[0].total_bytes
    assert arrays > 2 * plan.other_bytes
    settings = small_settings(small_disk(2 * plan.other_bytes + arrays // 2) / "cache.zarr", **large)
    assert not plan_build(settings).fits
    out = Path(settings.out)
    with pytest.raises(SpaceError, match=r"needs about .* free: it would stop half-way.*--force"):
        build_cache(settings, notes)
    assert any(line.startswith("to write: ") and "for 150 rows" in line for line in notes.lines)
    assert not (out / "commits").exists() and not list(out.glob("hidden/*/codes/c"))
    with pytest.raises(SpaceError, match="no space left"):
        build_cache(replace(settings, force=True))
    assert 0 < len(list((out / "commits").iterdir())) < plan.manifest.blocks


def test_a_build_says_its_size_before_its_first_block(small_settings: Settings, notes: Any, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="nmse:1e-2", max_rows=150)
    build_cache(settings, notes)
    (line,) = (line for line in notes.lines if line.startswith("to write: "))
    size, unit = line.split()[2:4]
    said = float(size) * {"kB": 1e3, "MB": 1e6}[unit]
    assert said == pytest.approx(sum(describe_store(settings.out).bytes_per_array.values()), rel=TOLERANCE)
    copied = sum(path.stat().st_size for path in (Path(settings.out) / "teacher").iterdir() if path.is_file())
    assert line.endswith(f"; the teacher's copy took {format_bytes(copied)}")


def test_the_teachers_copy_is_refused_where_it_cannot_fit(
    small_settings: Settings, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """Before it is written: half of it is room for nothing."""
    plan = plan_build(small_settings(tmp_path / "plan.zarr"))
    settings = small_settings(small_disk(plan.other_bytes // 2) / "cache.zarr")
    with pytest.raises(SpaceError, match=r"needs about .* free: it would stop half-way"):
        build_cache(settings)
    assert not (Path(settings.out) / "teacher").exists()


def test_fewer_rows_than_asked_for_are_told(small_settings: Settings, notes: Any, tmp_path: Path) -> None:
    build_cache(small_settings(tmp_path / "cache.zarr", max_rows=10_000), notes)
    rows = describe_store(tmp_path / "cache.zarr").manifest.rows
    assert f"the corpus has {rows} rows, fewer than --max-rows 10000: all are kept" in notes.lines


def test_a_corpus_that_is_not_there_is_found_before_the_teacher_is_loaded(
    small_settings: Settings, tmp_path: Path
) -> None:
    nothing = {"teacher": str(tmp_path / "no-teacher"), "out": str(tmp_path / "cache.zarr")}
    for corpus in (("nothing.txt",), ("nothing.txt@1",), (str(tmp_path),)):
        with pytest.raises(CorpusError, match="no file"):
            build_cache(BuildSettings(corpus=corpus, **nothing))
    (tmp_path / "text.txt").write_text("babo\n")
    with pytest.raises(TeacherError):
        build_cache(BuildSettings(corpus=(str(tmp_path / "text.txt"),), **nothing))
