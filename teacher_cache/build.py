"""The one loop that chains corpus, teacher, targets and store.

    rows (packed, shuffled) -> calibration, views -> one teacher pass per view -> coded block -> shards, commit -> seal

Each block is computed from its rows alone, in batches that start at its first row, so that it comes out the same
whether the build ran through or was killed and started again. Packing, compressing, hashing and writing a block happen
in a background thread while the teacher reads the next one; at most two blocks wait, which bounds the memory whatever
the corpus size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from teacher_cache.batch import TargetRequest
from teacher_cache.calibration import ensure_calibrated
from teacher_cache.contract import Manifest, describe_targets
from teacher_cache.corpus import RowBlock, Rows, pack_corpus
from teacher_cache.masking import MaskedRows
from teacher_cache.objects import Commit
from teacher_cache.passes import TeacherPass, run_views
from teacher_cache.reader import CacheReader
from teacher_cache.relations import VECTORS, AttentionProjections
from teacher_cache.settings import BuildSettings
from teacher_cache.specify import make_manifest, plan_targets, resolve_seq_len
from teacher_cache.store import CacheStore
from teacher_cache.targets import BlockTargets
from teacher_cache.teacher import Teacher
from teacher_cache.transform import Quantiser

_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}
_BLOCKS_WAITING = 2
_STATISTICS_BLOCKS = 4
_STATISTICS_ROWS = 16


class BuildProgress(Protocol):
    """What a build tells while it runs."""

    def note(self, text: str) -> None:
        """One line that the user should see."""

    def tokenised(self, documents: int, tokens: int) -> None:
        """So much of the corpus has been read."""

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        """So many rows are safe on the disk, of which `written_bytes` bytes were written by this run."""


class Silent:
    """A `BuildProgress` that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def tokenised(self, documents: int, tokens: int) -> None:
        """Nothing."""

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did: rows in the store, rows that this run computed, bytes it wrote, seconds up to the seal."""

    path: str
    rows: int
    computed_rows: int
    written_bytes: int
    seconds: float


def build_cache(settings: BuildSettings, progress: BuildProgress | None = None) -> BuildReport:
    """Build a store, or finish one that was started with the same settings.

    Raises:
        DistillationError: anything the user can mend; see the subclasses.
    """
    progress = progress or Silent()
    teacher = Teacher.load(settings.teacher, revision=settings.revision, dtype=settings.dtype, device=settings.device)
    seq_len = resolve_seq_len(settings, teacher)
    targets, projections = plan_targets(settings, teacher, progress.note)
    rows = pack_corpus(
        settings.corpus,
        teacher.tokenizer,
        seq_len=seq_len,
        row_mode=settings.rows,
        seed=settings.seed,
        max_rows=settings.max_rows,
        progress=progress.tokenised,
    )
    manifest = make_manifest(settings, teacher, targets, rows, seq_len)
    store = CacheStore.create_or_resume(Path(settings.out), manifest)
    if store.sealed:
        progress.note(f"{settings.out} is complete already: {manifest.rows} rows; nothing to do")
        return BuildReport(path=settings.out, rows=manifest.rows, computed_rows=0, written_bytes=0, seconds=0.0)
    _announce(manifest, progress)
    _write_teacher(store, teacher)
    _write_projections(store, projections)
    started = time.monotonic()
    teacher.start()
    batch_rows = _batch_rows(settings, teacher, seq_len)
    store, quantisers = ensure_calibrated(store, teacher, rows, batch_rows, projections, progress.note)
    computed, written = _build_blocks(store, teacher, quantisers, rows, batch_rows, progress)
    _write_statistics(store)
    store.seal()
    return BuildReport(
        path=settings.out,
        rows=manifest.rows,
        computed_rows=computed,
        written_bytes=written,
        seconds=time.monotonic() - started,
    )


def _batch_rows(settings: BuildSettings, teacher: Teacher, seq_len: int) -> int:
    if settings.batch_size is not None:
        return settings.batch_size
    return max(1, _TOKENS_PER_BATCH.get(teacher.device.type, _TOKENS_PER_BATCH["cuda"]) // seq_len)


def _announce(manifest: Manifest, progress: BuildProgress) -> None:
    progress.note(
        f"{manifest.rows} rows x {manifest.seq_len} tokens of {manifest.corpus.rows} in the corpus "
        f"({manifest.corpus.documents} documents), {manifest.blocks} blocks"
    )
    for name, what in describe_targets(manifest.targets).items():
        progress.note(f"  {name}: {what}")


def _write_teacher(store: CacheStore, teacher: Teacher) -> None:
    """Keep what students need of the teacher, so that training needs neither the teacher nor a network."""
    if store.has_folder("teacher"):
        return
    with store.new_folder("teacher") as folder:
        teacher.save(folder)


def _write_projections(store: CacheStore, projections: dict[int, AttentionProjections]) -> None:
    for layer, found in projections.items():
        for name in VECTORS:
            for part in ("weight", "bias"):
                path = f"attention/{layer}/projection/{name}/{part}"
                if not store.has_constant(path):
                    store.write_constant(path, getattr(getattr(found, name), part).numpy())


def _build_blocks(
    store: CacheStore,
    teacher: Teacher,
    quantisers: Mapping[str, Quantiser],
    rows: Rows,
    batch_rows: int,
    progress: BuildProgress,
) -> tuple[int, int]:
    """Compute, code and commit every missing block; returns rows computed and bytes written."""
    manifest = store.manifest
    committed = store.committed()
    done = sum(last - first for first, last in map(manifest.block_range, committed))
    computed = written = 0
    progress.committed(done, manifest.rows, 0)
    waiting: deque[Future[Commit]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as writer:
        for block in sorted(set(range(manifest.blocks)) - committed):
            block_rows = rows.read(*manifest.block_range(block))
            targets = compute_block(manifest, teacher, quantisers, block_rows, batch_rows)
            waiting.append(writer.submit(_write_block, store, block, targets))
            last_block = done + computed + len(waiting) * manifest.block_rows >= manifest.rows
            while waiting and (last_block or waiting[0].done() or len(waiting) > _BLOCKS_WAITING):
                commit = waiting.popleft().result()
                computed += commit.rows[1] - commit.rows[0]
                written += sum(digest.size for digest in commit.shards.values())
                progress.committed(done + computed, manifest.rows, written)
    return computed, written


def _write_block(store: CacheStore, block: int, targets: BlockTargets) -> Commit:
    return store.write_block(block, targets.finish())


@torch.inference_mode()
def compute_block(
    manifest: Manifest, teacher: Teacher, quantisers: Mapping[str, Quantiser], rows: RowBlock, batch_rows: int
) -> BlockTargets:
    """Everything that the store keeps of one block of rows, coded and not yet packed."""
    block = BlockTargets(manifest, quantisers)
    block.put_rows("input_ids", rows.input_ids_BT)
    block.put_rows("length", rows.length_B)
    block.put_rows("row_id", rows.row_id_B)
    block.put_rows("document", rows.document_B)
    for one in run_views(manifest, teacher, block.streams, rows, batch_rows, manifest.targets.views()):
        block.put_vectors(one)
        if one.masked is not None:
            if one.first == 0:
                _put_mask(block, one.masked, one.masked_view * manifest.block_rows)
            if manifest.targets.logits is not None:
                _put_logits(block, teacher, one, one.masked)
    return block


def _put_mask(block: BlockTargets, masked: MaskedRows, first: int) -> None:
    block.put_rows("masked/positions", masked.positions_BM, first)
    block.put_rows("masked/original_ids", masked.original_ids_BM, first)
    block.put_rows("masked/replacement_ids", masked.replacement_ids_BM, first)
    block.put_rows("masked/count", masked.count_B, first)


def _put_logits(block: BlockTargets, teacher: Teacher, one: TeacherPass, masked: MaskedRows) -> None:
    final_BTD = one.outputs.final_BTD
    part = slice(one.first, one.first + len(final_BTD))
    positions_BM = torch.from_numpy(masked.positions_BM[part].astype(np.int64)).to(teacher.device)
    real_BM = torch.arange(positions_BM.shape[1]) < torch.from_numpy(masked.count_B[part])[:, None]
    final_BMD = final_BTD.gather(1, positions_BM[:, :, None].expand(-1, -1, final_BTD.shape[2]))
    block.put_logits(one.masked_view, one.first, real_BM.to(teacher.device), final_BMD, teacher.head())


def _write_statistics(store: CacheStore) -> None:
    """Write E||h - mean||^2 of each hidden state, measured on the first blocks as stored."""
    reader = CacheReader.open(store.path, allow_unsealed=True)
    stop = min(store.manifest.rows, _STATISTICS_BLOCKS * store.manifest.block_rows)
    for layer in store.manifest.targets.hidden_layers():
        if not store.has_constant(f"hidden/{layer}/variance"):
            store.write_constant(f"hidden/{layer}/variance", np.array(_total_variance(reader, layer, stop)))


def _total_variance(reader: CacheReader, layer: int, stop: int) -> float:
    """E||h - mean||^2 over the real positions of rows 0..stop, from sums of a few rows at a time."""
    count, total_D, squares = 0, torch.zeros(reader.manifest.teacher.hidden_size, dtype=torch.float64), 0.0
    for first in range(0, stop, _STATISTICS_ROWS):
        batch = reader.read_rows(first, min(first + _STATISTICS_ROWS, stop), TargetRequest(hidden_layers=(layer,)))
        for targets in batch.values():
            values_ND = targets.hidden[layer][targets.real_BT()].double()
            count += len(values_ND)
            total_D += values_ND.sum(dim=0)
            squares += float(values_ND.square().sum())
    return squares / count - float((total_D / count).square().sum())
