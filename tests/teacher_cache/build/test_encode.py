"""What a block keeps of values that calibration did not see coming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.build.encode import BlockTargets
from teacher_cache.build.passes import TeacherPass
from teacher_cache.codecs.nmse import Quantiser, Transform
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.errors import TeacherError
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import read_manifest
from teacher_cache.format.transforms import read_transform
from teacher_cache.read.decode import CodedBlock, RowDecoder
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.outputs import TeacherOutputs


def all_escapes(store: Path, block_rows: int) -> tuple[StoreLayout, Transform, torch.Tensor, BlockTargets]:
    """A block of hidden state 2 whose packings, as if calibration had seen nothing but the mean, hold no value."""
    manifest = read_manifest(LocalStorage(store))
    record = manifest.calibration["hidden/2"]
    nothing = replace(record, components={**dict.fromkeys(record.components, 0), "zero": 32})
    hidden = next(spec for spec in manifest.targets.hidden if spec.layer == 2)
    manifest = replace(
        manifest,
        block_rows=block_rows,
        rows=block_rows,
        targets=TargetSpecs(hidden=(hidden,)),
        calibration={"hidden/2": nothing},
    )
    values_BTD = 30 * torch.randn(block_rows, 24, 32, generator=torch.Generator().manual_seed(0))
    layout = StoreLayout.of(manifest)
    transform = read_transform(LocalStorage(store), layout.stream("hidden/2"))
    block = BlockTargets(layout, {"hidden/2": Quantiser(transform, None)})
    real_BT = torch.ones(block_rows, 24, dtype=torch.bool)
    outputs = TeacherOutputs(hidden={2: values_BTD}, attention={}, final_BTD=values_BTD)
    block.put_vectors(TeacherPass(view="plain", masked_view=0, first=0, real_BT=real_BT, masked=None, outputs=outputs))
    return layout, transform, values_BTD, block


def test_values_beyond_what_calibration_saw_keep_their_error(nmse_store: Path) -> None:
    layout, transform, values_BTD, block = all_escapes(nmse_store, 16)
    arrays: dict[str, Any] = block.finish()
    count = int(arrays["hidden/2/escapes/count"][0])
    assert count > 0.9 * values_BTD.numel()
    arrays |= {f"hidden/2/escapes/{n}": arrays[f"hidden/2/escapes/{n}"][0, :count] for n in ("index", "value")}
    coded = CodedBlock(block=0, view="plain", request=TargetRequest(hidden_layers=(2,)), arrays=arrays)
    for start, stop in ((0, 16), (3, 7)):
        have = (
            RowDecoder(
                layout,
                coded,
                start,
                stop,
                device="cpu",
                projections=lambda layer: pytest.fail("no attention here"),
                transforms=lambda path: transform,
            )
            .decode()
            .hidden[2]
        )
        error = (have - values_BTD[start:stop]) @ transform.basis_DK
        assert float(error.abs().max()) <= 0.501 * transform.step


def test_more_escapes_than_there_is_room_for_stop_the_build(nmse_store: Path) -> None:
    *_, block = all_escapes(nmse_store, 64)
    with pytest.raises(TeacherError, match="hidden/2 has .* room is for 16384.*--precision int8"):
        block.finish()
