"""Several real stores read as one: the numbers that each of them gives, and refusals of what does not go together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import sha256_of_json
from teacher_cache.errors import StoreError, TargetsError
from teacher_cache.read.merge import merge_parts
from teacher_cache.read.pool import CachePool, expand_locations, open_caches, parts_of
from teacher_cache.read.reader import CacheReader

EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)

Settings = Callable[..., BuildSettings]


@pytest.fixture(scope="module")
def other_corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus backwards: another text."""
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text("\n".join(reversed(tiny_corpus.read_text().splitlines())) + "\n")
    return path


@pytest.fixture(scope="module")
def stores(small_settings: Settings, other_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.zarr: 40 rows in blocks of 16; b.zarr: 21 rows of another text in blocks of 5 and with another seed."""
    folder = tmp_path_factory.mktemp("parts")
    build_cache(small_settings(folder / "a.zarr"))
    build_cache(small_settings(folder / "b.zarr", corpus=(str(other_corpus),), max_rows=21, block_rows=5, seed=7))
    return folder


@pytest.fixture(scope="module")
def pool(stores: Path) -> CachePool:
    opened = open_caches([str(stores / "*.zarr")])
    assert isinstance(opened, CachePool)
    return opened


@pytest.fixture(scope="module")
def calibrated(small_settings: Settings, other_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> CachePool:
    """Two stores in the `nmse` codec, each calibrated on its own text."""
    folder = tmp_path_factory.mktemp("calibrated")
    changes = {"precision": "nmse:1e-2", "targets": "hidden,attention"}
    build_cache(small_settings(folder / "a.zarr", **changes))
    build_cache(small_settings(folder / "b.zarr", corpus=(str(other_corpus),), **changes))
    opened = open_caches([str(folder / "a.zarr"), str(folder / "b.zarr")])
    assert isinstance(opened, CachePool)
    return opened


def tensors(record: Any) -> list[torch.Tensor]:
    if isinstance(record, dict):
        return [tensor for _, value in sorted(record.items()) for tensor in tensors(value)]
    if is_dataclass(record):
        return [tensor for field in fields(record) for tensor in tensors(getattr(record, field.name))]
    return [] if record is None else [torch.as_tensor(record)]


def assert_same(ours: Any, theirs: Any) -> None:
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_a_pool_has_the_rows_and_blocks_of_its_parts_in_order(pool: CachePool, stores: Path) -> None:
    first, second = (CacheReader.open(stores / name) for name in ("a.zarr", "b.zarr"))
    assert pool.rows == pool.manifest.rows == 61
    assert pool.block_bounds.tolist() == [0, 16, 32, 40, 45, 50, 55, 60, 61]
    assert pool.block_bounds.dtype == np.int64
    assert pool.path == f"{stores}/a.zarr, {stores}/b.zarr"
    assert pool.views_for(EVERYTHING) == ("plain", "masked")
    assert_same(pool.read_rows(0, 40, EVERYTHING), first.read_rows(0, 40, EVERYTHING))
    assert_same(pool.read_rows(40, 61, EVERYTHING), second.read_rows(0, 21, EVERYTHING))


def test_rows_are_read_across_parts(pool: CachePool) -> None:
    ours, (first, second) = pool.read_rows(37, 48, EVERYTHING), pool.parts
    for view, batch in ours.items():
        assert_same(batch.rows(0, 3), first.read_rows(37, 40, EVERYTHING)[view])
        assert_same(batch.rows(3, 11), second.read_rows(0, 8, EVERYTHING)[view])
    for start, stop in ((-1, 3), (60, 62), (5, 5)):
        with pytest.raises(ValueError, match=r"not within 0\.\.61"):
            pool.read_rows(start, stop, EVERYTHING)


@pytest.mark.parametrize("kind", ["pool", "calibrated"])
def test_blocks_are_decoded_by_the_part_they_come_from(kind: str, request: pytest.FixtureRequest) -> None:
    """Each store has constants of its own: one part's codes and another's basis would give other numbers."""
    pool = request.getfixturevalue(kind)
    wanted = replace(EVERYTHING, logits=kind == "pool")
    for block, (first, last) in enumerate(zip(pool.block_bounds[:-1], pool.block_bounds[1:], strict=True)):
        expected = pool.read_rows(int(first) + 1, int(last), wanted) if last - first > 1 else {}
        for view, batch in expected.items():
            coded = pool.load_block(block, wanted, view)
            assert coded.block == block
            assert_same(pool.decode(coded, 1, int(last - first)), batch)


def test_the_parts_of_a_text_are_the_whole(small_settings: Settings, tmp_path: Path) -> None:
    whole = small_settings(tmp_path / "whole.zarr", block_rows=10)
    build_cache(whole)
    for number in (1, 2):
        build_cache(replace(whole, out=str(tmp_path / f"part-{number}.zarr"), part=f"{number}/2"))
    reader, pool = open_caches([str(tmp_path / "whole.zarr")]), open_caches([str(tmp_path / "part-*.zarr")])
    assert pool.rows == 40
    assert pool.block_bounds.tolist() == reader.block_bounds.tolist()
    assert pool.manifest.corpus == reader.manifest.corpus
    assert_same(pool.read_rows(0, 40, EVERYTHING), reader.read_rows(0, 40, EVERYTHING))


def test_one_store_is_read_as_it_is(stores: Path) -> None:
    reader = open_caches([str(stores / "b.zarr")])
    assert isinstance(reader, CacheReader)
    assert parts_of(reader) == (reader,)


def test_the_manifest_is_of_all_parts(pool: CachePool, stores: Path) -> None:
    first, second = (part.manifest for part in pool.parts)
    corpus = pool.manifest.corpus
    assert corpus.specs == first.corpus.specs + second.corpus.specs
    assert corpus.tokens == first.corpus.tokens + second.corpus.tokens
    assert corpus.documents == first.corpus.documents + second.corpus.documents
    assert corpus.fingerprint == sha256_of_json([first.corpus.fingerprint, second.corpus.fingerprint])
    assert pool.manifest.targets == first.targets
    assert pool.manifest.teacher == first.teacher


def test_contents_and_their_order_are_the_identity(pool: CachePool, stores: Path) -> None:
    names = [str(stores / "a.zarr"), str(stores / "b.zarr")]
    assert open_caches(names).identity_sha256 == pool.identity_sha256
    others = {open_caches(chosen).identity_sha256 for chosen in (names[::-1], names[:1], names[1:])}
    assert len(others) == 3
    assert pool.identity_sha256 not in others


def test_what_the_parts_share_is_asked_of_them(pool: CachePool) -> None:
    with pytest.raises(TargetsError, match=r"a\.zarr, .*b\.zarr' lack hidden 3.*built each of them with `--t"):
        pool.require(TargetRequest(hidden_layers=(3,)))
    first, second = pool.parts
    assert pool.teacher_folder() == first.teacher_folder()
    variance = (40 * first.hidden_variance(2) + 21 * second.hidden_variance(2)) / 61
    assert pool.hidden_variance(2) == pytest.approx(variance)


def test_rotated_coordinates_are_given_only_where_all_parts_share_them(pool: CachePool, calibrated: CachePool) -> None:
    assert pool.rotation(2) is None
    assert calibrated.rotation(2) is None
    assert all(part.rotation(2) is not None for part in calibrated.parts)
    wanted = TargetRequest(hidden_layers=(2,), rotated_layers=(2,))
    with pytest.raises(AssertionError):
        calibrated.decode(calibrated.load_block(0, wanted, "plain"), 0, 3)
    for source in (pool, calibrated):
        for ask in (source.require, lambda request, source=source: source.read_rows(0, 3, request)):
            with pytest.raises(TargetsError, match="hidden state 2 of .* has no rotated coordinates"):
                ask(wanted)
    for part in calibrated.parts:
        part.require(wanted)


def test_locations_are_expanded_in_order(tmp_path: Path) -> None:
    for name in ("b.zarr", "a.zarr", "c[1].zarr"):
        (tmp_path / name).mkdir()
    found = expand_locations(["s3://bucket/*.zarr", str(tmp_path / "[ab].zarr"), str(tmp_path / "c[1].zarr"), "x.zarr"])
    assert found == (
        "s3://bucket/*.zarr",
        f"{tmp_path}/a.zarr",
        f"{tmp_path}/b.zarr",
        f"{tmp_path}/c[1].zarr",
        "x.zarr",
    )


def test_what_matches_nothing_is_named(tmp_path: Path) -> None:
    pattern = str(tmp_path / "*.zarr")
    with pytest.raises(StoreError, match="matches nothing") as caught:
        open_caches([pattern])
    assert repr(pattern) in str(caught.value)
    with pytest.raises(StoreError, match="no store is given"):
        open_caches([])


# ---- what does not go together --------------------------------------------------------------------------------------


def test_parts_that_do_not_match_are_refused_with_every_difference(
    small_settings: Settings, stores: Path, other_corpus: Path, tmp_path: Path
) -> None:
    """All in one: a store differing in every flag that a student could notice."""
    build_cache(
        small_settings(
            tmp_path / "c.zarr",
            corpus=(str(other_corpus),),
            seq_len=20,
            rows="document",
            views=2,
            mlm_probability=0.2,
            temperature=2.0,
            layers="2",
            precision="int8",
        )
    )
    with pytest.raises(StoreError, match="do not match") as caught:
        open_caches([str(stores / "a.zarr"), str(tmp_path / "c.zarr")])
    message = str(caught.value)
    for words in (
        repr(str(stores / "a.zarr")),
        repr(str(tmp_path / "c.zarr")),
        "--seq-len: 24 and 20",
        "--rows: 'packed' and 'document'",
        "--views: 1 and 2",
        "--mlm-probability: 0.15 and 0.2",
        "--temperature: 1.0 and 2.0",
        "hidden 2: 'plain view, float16' and 'plain view, int8'",
        "hidden 4: 'plain view, float16' and nothing",
    ):
        assert words in message
    assert "--block-rows" not in message and "corpus" not in message


def test_another_teacher_or_number_type_is_refused(pool: CachePool) -> None:
    (path, one), (other_path, other) = ((part.path, part.manifest) for part in pool.parts)
    teacher = replace(other.teacher, weights_sha256="other")
    for changes, name in (
        ({"teacher": teacher}, "teacher weights"),
        ({"tokenizer_sha256": "other"}, "tokenizer"),
        ({"dtype": "bfloat16"}, "--dtype"),
    ):
        with pytest.raises(StoreError, match=f"do not match:\n  {name}: "):
            merge_parts([(path, one), (other_path, replace(other, **changes))])


def test_rows_that_would_count_twice_are_refused(stores: Path, tmp_path: Path, pool: CachePool) -> None:
    again = shutil.copytree(stores / "a.zarr", tmp_path / "again.zarr")
    with pytest.raises(StoreError, match=r"again\.zarr' both hold rows 0 to 39 of the same text.*--part"):
        open_caches([str(stores / "*.zarr"), str(again)])
    one, other = (part.manifest for part in pool.parts)
    half = replace(one, rows=20)
    merged = merge_parts([("a", half), ("b", replace(half, first_row=20)), ("c", other)])
    assert merged.rows == 61
    assert merged.corpus.tokens == one.corpus.tokens + other.corpus.tokens
    assert merge_parts([("b", replace(half, first_row=20)), ("a", half)]).corpus == one.corpus
    with pytest.raises(StoreError, match="'a' and 'b' both hold rows 19 to 19"):
        merge_parts([("b", replace(half, first_row=19)), ("c", other), ("a", half)])
    with pytest.raises(StoreError, match="orders of --seed 0 and 5"):
        merge_parts([("a", half), ("b", replace(half, first_row=20, seed=5))])
