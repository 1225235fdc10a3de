"""Coordinates are those of plain division by the documented layout; blocks decode alike wherever their arrays are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.codecs.packing import ranges
from teacher_cache.contract.batch import TargetBatch, TargetRequest, concatenate
from teacher_cache.contract.manifest import Manifest
from teacher_cache.device import Transfer, to_device
from teacher_cache.read.decode import CodedBlock, is_decoded_on_device
from teacher_cache.read.reader import CacheReader

LAYER = 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def coordinates_plainly(manifest: Manifest, coded: CodedBlock) -> NDArray[np.float32]:
    """All coordinates [N, D] of a block: one digit after the other, then the escapes, then times step."""
    path, tokens = f"hidden/{LAYER}", manifest.block_rows * manifest.seq_len
    record = manifest.calibration[path]
    codes_DN = np.zeros((sum(record.components.values()), tokens), dtype=np.int64)
    for packing, part in ranges(record.components):
        packed = coded.arrays[f"{path}/codes/{packing.name}"].astype(np.int64)
        radix = 2 * packing.limit + 1
        for token in range(tokens):
            value = packed[:, token // packing.per_byte]
            if packing.per_byte > 1:
                value = value // radix ** (packing.per_byte - 1 - token % packing.per_byte) % radix - packing.limit
            codes_DN[part, token] = value
    for index, value in zip(*(coded.arrays[f"{path}/escapes/{name}"] for name in ("index", "value")), strict=True):
        codes_DN[divmod(int(index), tokens)] = value
    return codes_DN.T.astype(np.float32) * np.float32(record.step)


@pytest.mark.parametrize("block", [0, 2])
def test_coordinates_are_those_of_plain_division(nmse_store: Path, block: int) -> None:
    reader = CacheReader.open(nmse_store)
    request = TargetRequest(hidden_layers=(LAYER,), rotated_layers=(LAYER,))
    (view,) = reader.views_for(request)
    coded = reader.load_block(block, request, view)
    expected_ND = coordinates_plainly(reader.manifest, coded)
    rows, positions = int(np.diff(reader.block_bounds)[block]), reader.manifest.seq_len
    expected_BTD = torch.from_numpy(expected_ND).reshape(-1, positions, expected_ND.shape[1])
    for start in range(rows):
        for stop in range(start + 1, rows + 1):
            have_BTD = reader.decode(coded, start, stop).hidden[LAYER]
            assert torch.equal(have_BTD, expected_BTD[start:stop])


STORES = {
    "float16": {},
    "nmse": {"precision": "nmse:1e-2", "views": 2},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "vectors": {"precision": "nmse:1e-1", "relations": "qkv", "logits": "sample"},
    "matrices": {"relations": "matrix", "hs_view": "masked"},
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_what_was_sent_ahead_decodes_alike(
    store: str, device: str, small_settings: Callable[..., BuildSettings], tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", **STORES[store])
    build_cache(settings)
    reader = CacheReader.open(tmp_path / "cache.zarr")
    targets = reader.manifest.targets
    request = TargetRequest(hidden_layers=targets.hidden_layers(), attention_layers=(3,), logits=True, masked=True)
    moved: set[str] = set()
    for view in reader.views_for(request):
        coded = reader.load_block(1, request, view, reader.manifest.views_of(view) - 1)
        # without a GPU nothing is sent: tensors stand for what has arrived
        sent = coded.sent(Transfer(device)) if device == "cuda" else replace(coded, arrays=as_tensors(coded))
        moved |= {path for path, values in sent.arrays.items() if isinstance(values, torch.Tensor)}
        for start, stop in ((0, 16), (3, 10)):
            have, want = reader.decode(sent, start, stop, device), reader.decode(coded, start, stop)
            assert_same(have.to("cpu"), want)
            assert have.unpadded == want.unpadded == bool(want.real_BT().all())
    assert any("codes" in path or path.endswith("key") for path in moved)
    assert not {"row_id", "length", "input_ids"} & moved


def as_tensors(coded: CodedBlock) -> dict[str, Any]:
    return {
        path: torch.from_numpy(np.array(values)) if is_decoded_on_device(path) else values
        for path, values in coded.arrays.items()
    }


def assert_same(have: TargetBatch, want: TargetBatch) -> None:
    pairs = list(zip(tensors_of(have), tensors_of(want), strict=True))
    assert len(pairs) > 4
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.allclose(mine.float(), theirs.float(), rtol=1e-5, atol=1e-6)


def tensors_of(record: Any) -> list[torch.Tensor]:
    if is_dataclass(record):
        return [tensor for field in fields(record) for tensor in tensors_of(getattr(record, field.name))]
    if isinstance(record, dict):
        return [tensor for key in sorted(record) for tensor in tensors_of(record[key])]
    return [record] if isinstance(record, torch.Tensor) else []


def test_rows_are_without_padding_where_all_parts_are() -> None:
    ids_BT, number_B = torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 3])
    full = TargetBatch(input_ids_BT=ids_BT, length_B=number_B, row_id_B=number_B, unpadded=True)
    short = replace(full, length_B=number_B - 1, unpadded=False)
    assert full.rows(0, 1).unpadded and full.to("cpu").unpadded and concatenate([full, full]).unpadded
    assert not short.rows(0, 1).unpadded and not concatenate([full, short]).unpadded


def test_nothing_is_copied_where_the_host_decodes() -> None:
    arrays = {"hidden/2/codes/byte": np.zeros(3, dtype=np.int8)}
    assert Transfer("cpu").send(arrays, is_decoded_on_device) == (arrays, None)
    assert np.shares_memory(to_device(arrays["hidden/2/codes/byte"], "cpu").numpy(), arrays["hidden/2/codes/byte"])
