"""An imported store is the store that a build makes of the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import Silent
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TopkLogits
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import StoreError
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.read.info import describe_store
from teacher_cache.read.pool import open_caches
from teacher_cache.storage.base import open_storage
from teacher_cache.verify.verify import verify_store
from tests.teacher_cache.importing.samples import (
    LOGITS,
    K,
    Sample,
    assert_same_distributions,
    column_records,
    read,
    shuffled,
    vllm_records,
    write_jsonl,
    write_parquet,
)
from tests.teacher_cache.test_remote_store import objects_of

if TYPE_CHECKING:
    from tests.conftest import S3Server

Asked = Callable[..., ImportSettings]


def test_prompt_logprobs_are_what_a_build_keeps(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """Entry t is the distribution of token t, and is kept after token t - 1; the extra token is not one of K."""
    settings = asked(write_jsonl(tmp_path / "a.jsonl", shuffled(vllm_records(sample))))
    report = import_store(settings)
    assert report.rows == report.computed_rows == len(sample.rows)
    manifest = describe_store(settings.out).manifest
    assert manifest.imported == "vllm" and manifest.targets.logits is not None
    assert manifest.targets.logits.entries == K and manifest.seq_len == max(map(len, sample.rows))
    have, want = read(settings.out), read(sample.store)
    assert_same_distributions(have, want)
    assert verify_store(settings.out).whole


@pytest.mark.parametrize("shape", ["jsonl", "parquet", "both"])
def test_columns_are_what_a_build_keeps(sample: Sample, asked: Asked, tmp_path: Path, shape: str) -> None:
    records = shuffled(column_records(sample))
    middle = {"jsonl": len(records), "parquet": 0, "both": 4}[shape]
    files = [write_jsonl(tmp_path / "a.jsonl", records[:middle])] if middle else []
    files += [write_parquet(tmp_path / "b.parquet", records[middle:], group=3)] if records[middle:] else []
    import_store(settings := asked(*files))
    assert_same_distributions(read(settings.out), read(sample.store))


def test_a_shift_by_one_is_seen(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """The comparison of these tests fails where entries are read as those of the token after the next."""
    records = [
        {**one, "top_ids": [[0], *one["top_ids"]], "top_logprobs": [[-1.0], *one["top_logprobs"]]}
        for one in column_records(sample)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    import_store(this := asked(path, entries="this", k=K))
    assert_same_distributions(read(this.out), read(sample.store))
    import_store(other := asked(path, entries="next", k=K, out=str(tmp_path / "shifted.zarr")))
    with pytest.raises(AssertionError):
        assert_same_distributions(read(other.out), read(sample.store))


def test_fewer_ids_than_others_leave_the_rest_in_the_tail(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """A place with three ids: these are kept, the mass of all others is the tail, and what fills it up has none."""
    records = column_records(sample)
    first = tuple(records[0]["input_ids"])
    for name in ("top_ids", "top_logprobs"):
        records[0][name][0] = records[0][name][0][:3]
    import_store(settings := asked(write_jsonl(tmp_path / "a.jsonl", records)))
    batch = read(settings.out)
    row = next(n for n, ids in enumerate(batch.input_ids_BT) if tuple(ids[: len(first)].tolist()) == first)
    assert isinstance(batch.logits, TopkLogits)
    log_probs_K, ids_K = batch.logits.log_probs_BMK[row, 0], batch.logits.ids_BMK[row, 0]
    assert log_probs_K[:3].isfinite().all() and log_probs_K[3:].isneginf().all()
    assert len(set(ids_K.tolist())) == K and ids_K[:3].tolist() == records[0]["top_ids"][0]
    mass = sample.log_probs[0][0].double().exp()
    want = 1 - mass[ids_K[:3]].sum()
    assert float(batch.logits.log_tail_BM[row, 0].exp()) == pytest.approx(float(want), abs=1e-3)


def test_another_source_does_not_go_on_with_a_store(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    records = column_records(sample)
    path = write_jsonl(tmp_path / "a.jsonl", records)
    import_store(settings := asked(path))
    assert import_store(settings).computed_rows == 0, "the same is complete already"
    records[0]["top_logprobs"][0][-1] -= 0.01
    write_jsonl(path, records)
    with pytest.raises(
        StoreError, match=r"source files: the store has '.* .SHA-256 \w{12}\.{3}.', this command asks for '"
    ):
        import_store(settings)


def test_rows_are_cut_where_that_is_asked_for(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    import_store(settings := asked(path, seq_len=7, long_rows="cut"))
    batch = read(settings.out)
    assert batch.input_ids_BT.shape[1] == 7 and batch.places is not None
    assert torch.equal(batch.places.count_B, batch.length_B - 1)
    assert {tuple(ids[:n].tolist()) for ids, n in zip(batch.input_ids_BT, batch.length_B, strict=True)} == {
        tuple(row[:7]) for row in sample.rows
    }


def test_imports_are_read_as_one_and_derived_from(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """Two imports of one teacher are one corpus; what is derived from one says that it was imported."""
    records = vllm_records(sample)
    stores = []
    for number, part in enumerate((records[:4], records[4:])):
        path = write_jsonl(tmp_path / f"{number}.jsonl", part)
        import_store(settings := asked(path, out=str(tmp_path / f"{number}.zarr"), seq_len=24, k=K))
        stores.append(settings.out)
    cache = open_caches(stores)
    assert_same_distributions(cache.read_rows(0, cache.rows, LOGITS)["plain"], read(sample.store))
    other = asked(tmp_path / "1.jsonl", out=str(tmp_path / "other.zarr"), seq_len=24, k=K, teacher="another")
    import_store(other)
    with pytest.raises(StoreError, match="teacher weights"):
        open_caches([stores[0], other.out])
    derive_store(DeriveSettings(src=stores[0], dst=str(tmp_path / "small.zarr"), k=3))
    manifest = describe_store(tmp_path / "small.zarr").manifest
    assert manifest.imported == "vllm" and manifest.targets.logits is not None and manifest.targets.logits.entries == 3
    assert verify_store(tmp_path / "small.zarr").whole


def test_a_build_does_not_add_to_an_import(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """Nor an import to a build: whose targets they are is not the same."""
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    import_store(settings := asked(path))
    text = tmp_path / "text.txt"
    text.write_text("He went home.\n")
    with pytest.raises(StoreError, match="teacher weights: the store has"):
        build_cache(BuildSettings(teacher=str(sample.teacher), corpus=(str(text),), out=settings.out, device="cpu"))
    with pytest.raises(StoreError, match="corpus: the store has"):
        import_store(asked(path, out=str(sample.store)))


class StopsAfterABlock(Silent):
    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        if written_bytes:
            raise KeyboardInterrupt


def test_an_import_into_a_bucket_is_that_on_a_disk(sample: Sample, asked: Asked, s3: S3Server, tmp_path: Path) -> None:
    """Also where it was stopped once."""
    settings = asked(write_jsonl(tmp_path / "a.jsonl", vllm_records(sample)), block_rows=2)
    import_store(settings)
    remote = replace(settings, out=f"{s3.bucket('imports')}/caches/one.zarr")
    with pytest.raises(KeyboardInterrupt):
        import_store(remote, StopsAfterABlock())
    report = import_store(remote)
    assert 0 < report.computed_rows < report.rows
    assert objects_of(open_storage(remote.out)) == objects_of(open_storage(settings.out))
    assert verify_store(remote.out).whole
