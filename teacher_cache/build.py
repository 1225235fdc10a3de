"""The one loop that chains corpus, teacher, targets and store.

    rows (packed, shuffled) -> views -> one teacher pass per view -> coded arrays of a block -> shards, commit -> seal

Each block is computed from its rows alone, in batches that start at its first row, so that it comes out the same
whether the build ran through or was killed and started again. Compressing, hashing and writing a block happen in a
background thread while the teacher reads the next one; at most two blocks wait, which bounds the memory whatever the
corpus size.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.batch import TargetRequest
from teacher_cache.contract import Manifest, View, describe_targets
from teacher_cache.corpus import RowBlock, Rows, pack_corpus
from teacher_cache.masking import MaskedRows, mask_rows
from teacher_cache.objects import Commit
from teacher_cache.reader import CacheReader
from teacher_cache.relations import VECTORS, AttentionProjections
from teacher_cache.settings import BuildSettings
from teacher_cache.specify import make_manifest, plan_targets, resolve_seq_len
from teacher_cache.store import CacheStore
from teacher_cache.targets import BlockTargets
from teacher_cache.teacher import Teacher

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
    computed, written = _build_blocks(store, teacher, rows, _batch_rows(settings, teacher, seq_len), progress)
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
    store: CacheStore, teacher: Teacher, rows: Rows, batch_rows: int, progress: BuildProgress
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
            targets = compute_block(manifest, teacher, rows.read(*manifest.block_range(block)), batch_rows)
            waiting.append(writer.submit(store.write_block, block, targets.arrays))
            last_block = done + computed + len(waiting) * manifest.block_rows >= manifest.rows
            while waiting and (last_block or waiting[0].done() or len(waiting) > _BLOCKS_WAITING):
                commit = waiting.popleft().result()
                computed += commit.rows[1] - commit.rows[0]
                written += sum(digest.size for digest in commit.shards.values())
                progress.committed(done + computed, manifest.rows, written)
    return computed, written


def compute_block(manifest: Manifest, teacher: Teacher, rows: RowBlock, batch_rows: int) -> BlockTargets:
    """Everything that the store keeps of one block of rows."""
    block = BlockTargets(manifest)
    block.put_rows("input_ids", rows.input_ids_BT)
    block.put_rows("length", rows.length_B)
    block.put_rows("row_id", rows.row_id_B)
    block.put_rows("document", rows.document_B)
    for view in manifest.targets.views():
        for masked_view in range(manifest.views_of(view)):
            masked = _mask(manifest, teacher, rows, masked_view) if view == "masked" else None
            input_ids_BT = rows.input_ids_BT if masked is None else masked.apply(rows.input_ids_BT)
            if masked is not None:
                _put_mask(block, masked, masked_view * manifest.block_rows)
            for first in range(0, len(input_ids_BT), batch_rows):
                part = slice(first, first + batch_rows)
                _run_batch(block, teacher, input_ids_BT[part], rows.length_B[part], masked, masked_view, first)
    return block


def _mask(manifest: Manifest, teacher: Teacher, rows: RowBlock, masked_view: int) -> MaskedRows:
    return mask_rows(
        rows.input_ids_BT,
        rows.length_B,
        rows.row_id_B,
        special_ids=teacher.tokenizer.all_special_ids,
        mask_id=teacher.tokenizer.mask_token_id,
        vocab_size=len(teacher.tokenizer),
        places=manifest.masked_per_row,
        probability=manifest.mlm_probability,
        seed=manifest.seed,
        view=masked_view,
    )


def _put_mask(block: BlockTargets, masked: MaskedRows, first: int) -> None:
    block.put_rows("masked/positions", masked.positions_BM, first)
    block.put_rows("masked/original_ids", masked.original_ids_BM, first)
    block.put_rows("masked/replacement_ids", masked.replacement_ids_BM, first)
    block.put_rows("masked/count", masked.count_B, first)


@torch.inference_mode()
def _run_batch(
    block: BlockTargets,
    teacher: Teacher,
    input_ids_BT: NDArray[np.int32],
    length_B: NDArray[np.int32],
    masked: MaskedRows | None,
    masked_view: int,
    first: int,
) -> None:
    """One teacher pass over some rows in one view, and everything that is kept of it."""
    view: View = "plain" if masked is None else "masked"
    streams = [stream for stream in block.streams if stream.view == view]
    outputs = teacher.run(
        torch.from_numpy(input_ids_BT).long(),
        torch.from_numpy(length_B),
        hidden_layers={stream.layer for stream in streams if stream.source == "hidden"},
        attention_layers={stream.layer for stream in streams if stream.source != "hidden"},
    )
    real_BT = torch.arange(input_ids_BT.shape[1]) < torch.from_numpy(length_B)[:, None]
    block.put_vectors(view, masked_view, first, real_BT.to(teacher.device), outputs.hidden, outputs.attention)
    if masked is not None and block.manifest.targets.logits is not None:
        part = slice(first, first + len(input_ids_BT))
        positions_BM = torch.from_numpy(masked.positions_BM[part].astype(np.int64)).to(teacher.device)
        real_BM = torch.arange(positions_BM.shape[1]) < torch.from_numpy(masked.count_B[part])[:, None]
        final_BMD = outputs.final_BTD.gather(1, positions_BM[:, :, None].expand(-1, -1, outputs.final_BTD.shape[2]))
        block.put_logits(masked_view, first, real_BM.to(teacher.device), final_BMD, teacher.head())


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
