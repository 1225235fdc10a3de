"""What a store keeps of the teacher beside its targets, so that training needs neither the teacher nor a network.

The teacher's Hugging Face folder, the projections of attention layers that are computed from a hidden state, and the
variance of each hidden state. What is there already is not written again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch

from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import TeacherError
from teacher_cache.format.attention_constants import ROTARY_PARTS, projection_path, rotary_path
from teacher_cache.format.groups import Group
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import TEACHER, digest_object, has_teacher, write_teacher_files
from teacher_cache.format.small_arrays import has_constant, write_constant
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import Storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCKS = 4
_ROWS_AT_ONCE = 16
_WEIGHTS_PER_FILE = 50 * 10**9
_LEAST_SPREAD = 1e-12
"""Variance that is more than rounding, as a share of the mean square: float32 tells no smaller one from none."""


def reach_attention(
    teacher: Teacher, groups: Iterable[Group], known: Mapping[int, AttentionProjections]
) -> dict[int, AttentionProjections]:
    """Make the attention of these groups readable, and find the projections that are not `known`.

    A build that finishes an older group may name other layers than that group holds, so the groups are asked. Call it
    before `Teacher.start`.
    """
    found = {}
    for group in groups:
        for layer in group.layout.attention:
            teacher.tap()
            if group.layout.attention_input(layer) is not None and layer not in known:
                spec = group.manifest.targets.find_attention(layer)
                assert spec is not None
                replayed = spec.replay is not None
                seq_len = group.manifest.seq_len
                projections = teacher.probe_replay(layer, seq_len) if replayed else teacher.probe_attention(layer)
                assert projections is not None, "the store was built by the same weights"
                found[layer] = projections
    return found


def write_projections(storage: Storage, layout: StoreLayout, projections: Mapping[int, AttentionProjections]) -> None:
    """Write the maps of attention layers that are computed from what they read, where they are not there yet."""
    for layer in layout.attention:
        if layout.attention_input(layer) is None:
            continue
        found = projections[layer]
        values = {
            projection_path(layer, name, part): getattr(getattr(found, name), part)
            for name in VECTORS
            for part in ("weight", "bias")
        }
        if found.replay is not None:
            values |= {rotary_path(layer, part): getattr(found.replay, f"{part}_Tr") for part in ROTARY_PARTS}
        for path, value in values.items():
            if not has_constant(storage, path):
                write_constant(storage, path, value.numpy())


class Saveable(Protocol):
    """A teacher, or what is known of one."""

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder."""


def teacher_files(teacher: Teacher, storage: Storage) -> tuple[int, int]:
    """Bytes and objects that `write_teacher` will write, about, without writing the weights. Call before `start`."""
    if has_teacher(storage):
        return 0, 0
    model = teacher.model if teacher.record.has_mlm_head else cast("PreTrainedModel", teacher.model.base_model)
    # tied weights are saved once
    weights: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    with TemporaryDirectory() as folder:
        teacher.tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        others = LocalStorage(folder).list()
    parts = max(1, -(-sum(weights.values()) // _WEIGHTS_PER_FILE))
    # an index where there are several, and the list of all of them
    return sum(weights.values()) + sum(others.values()), len(others) + parts + (parts > 1) + 1


def write_teacher(storage: Storage, teacher: Saveable) -> int:
    """Keep what students need of the teacher, so that training needs neither the teacher nor a network.

    Returns the bytes of it; 0 where it is there already.
    """
    if has_teacher(storage):
        return 0
    with storage.scratch() as folder:
        teacher.save(folder)
        saved = LocalStorage(folder)
        files = {name: digest_object(saved, name) for name in saved.list()}
        for name in files:
            storage.write_file(f"{TEACHER}/{name}", folder / name)
    write_teacher_files(storage, {f"{TEACHER}/{name}": digest for name, digest in files.items()})
    return sum(digest.size for digest in files.values())


def write_variances(storage: Storage, manifest: Manifest, complete: Collection[str]) -> None:
    """Write E||h - mean||^2 of each hidden state of a group, where it is not there; `complete` as for the reader.

    Of ordinary tokens: sinks would be all that counts in it.

    Raises:
        TeacherError: a hidden state is the same at all tokens.
    """
    reader = CacheReader.of(storage, complete=complete)
    blocks = min(manifest.blocks, _BLOCKS)
    for layer in manifest.targets.hidden_layers():
        path = f"hidden/{layer}/variance"
        if not has_constant(storage, path):
            write_constant(storage, path, np.array(_total_variance(reader, layer, blocks)))


def _total_variance(reader: CacheReader, layer: int, blocks: int) -> float:
    """E||h - mean||^2 over the ordinary tokens of the first blocks, from sums of a few rows at a time."""
    count, total_D, squares = 0, torch.zeros(reader.manifest.teacher.hidden_size, dtype=torch.float64), 0.0
    request = TargetRequest(hidden_layers=(layer,))
    (view,) = reader.views_for(request)
    for block in range(blocks):
        coded = reader.load_block(block, request, view)
        first, last = reader.manifest.block_range(block)
        for start in range(0, last - first, _ROWS_AT_ONCE):
            targets = reader.decode(coded, start, min(start + _ROWS_AT_ONCE, last - first))
            values_ND = targets.hidden[layer][targets.ordinary_BT(layer)].double()
            count += len(values_ND)
            total_D += values_ND.sum(dim=0)
            squares += float(values_ND.square().sum())
    power = squares / count
    variance = power - float((total_D / count).square().sum())
    if not variance > _LEAST_SPREAD * power:
        raise TeacherError(
            f"hidden state {layer} is the same at every token (its variance is {variance!r}): there is nothing to learn"
            " from it, and losses are shares of the variance; check the checkpoint, or what the import was made of, or "
            f"leave {layer} out of --layers, in another --out"
        )
    return variance
