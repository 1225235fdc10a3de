"""The one loop of an import: files -> checked rows -> blocks -> seal.

    files (hashed) -> every row read and checked -> manifest -> coded block -> shards, commit -> seal

Nothing is written before every row has been checked. From the manifest on it is a build: a block exists once it is
committed, so that an import which was killed goes on where it stopped, from the same files alone. Cost: every file is
read three times, once for its hash; no model runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from teacher_cache.build.block_rows import USUAL, with_block_rows
from teacher_cache.build.blocks import write_blocks
from teacher_cache.build.build import BuildReport
from teacher_cache.build.calibrate import calibrate_on
from teacher_cache.build.inputs import BuildProgress, Silent
from teacher_cache.build.resolve import refuse_large_block, software_versions
from teacher_cache.build.sidecar import write_teacher, write_variances
from teacher_cache.build.workers import Workers
from teacher_cache.build.writable import refuse_unwritable
from teacher_cache.codecs.logits import id_planes
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import HiddenSpec, LogitsSpec, TargetSpecs, describe_targets, parse_precision
from teacher_cache.corpus.corpus import tokenizer_fingerprint
from teacher_cache.errors import SettingsError, SourceError
from teacher_cache.format.resume import groups_to_build
from teacher_cache.format.transforms import keep_calibration, load_quantisers
from teacher_cache.format.writer import GroupWriter
from teacher_cache.importing.block import compute_block, read_streams
from teacher_cache.importing.distillkit import Packing
from teacher_cache.importing.files import Records, find_files
from teacher_cache.importing.hidden_folders import SUFFIX, HiddenSource, parse_layer_list
from teacher_cache.importing.known import KnownTeacher
from teacher_cache.importing.logprobs import LogprobSource, shape_of
from teacher_cache.importing.rows import ImportedRows, SourceScan, choose_entries, tokens_per_row
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.importing.source import SHAPES, Source
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.threads import usable_cores
from teacher_cache.wording import command_line

_RECORDS = (".jsonl", ".parquet")


def import_store(
    settings: ImportSettings, progress: BuildProgress | None = None, packing: Mapping[str, Any] | None = None
) -> BuildReport:
    """Import a store, or finish one that was started from the same files with the same settings.

    `packing` is the content of the file that `settings.packing` names, every value as it is written.

    Raises:
        DistillationError: anything the user can mend; see the subclasses.
    """
    progress = Silent() if progress is None else progress
    storage = open_storage(settings.out)
    refuse_unwritable(storage if isinstance(storage, LocalStorage) else None, None)
    teacher = KnownTeacher.load(settings)
    source = open_source(settings, teacher, packing)
    rows = ImportedRows(source, teacher, settings)
    refuse_large_block(settings.block_rows, len(rows))
    progress.note(f"{len(rows)} rows of {len(source.files)} files: {SHAPES[source.shape]}")
    scan = rows.scan(progress.tokenised)
    manifest = with_block_rows(make_manifest(settings, rows, scan), settings.block_rows, storage)
    _tell(source, scan, progress)
    with storage.lock():
        return _run(storage, settings, rows, manifest, progress)


def open_source(settings: ImportSettings, teacher: KnownTeacher, packing: Mapping[str, Any] | None = None) -> Source:
    """The files that the settings name, hashed.

    Raises:
        SourceError: they cannot be read, or are of no known shape.
        SettingsError: a setting means nothing to their shape.
    """
    files = find_files(settings.source, (*_RECORDS, SUFFIX))
    hidden = [path for path in files if path.suffix == SUFFIX]
    if hidden and (len(hidden) < len(files) or settings.shape not in ("auto", "hidden")):
        raise SourceError(
            f"{str(hidden[0])!r} holds hidden states, and other files of the source, or --shape, something else: a "
            "store is made of files of one shape; import each into a store of its own"
        )
    if hidden:
        _refuse_meaningless(settings, "hidden states", ("entries", "k", "packing"))
        layers = parse_layer_list(settings.layers, teacher.config.num_hidden_layers)
        return HiddenSource(hidden, layers, width=teacher.config.hidden_size, last=teacher.config.num_hidden_layers)
    if settings.shape == "hidden":
        raise SourceError(f"{str(files[0])!r} holds no hidden states: with --shape hidden give {SUFFIX} files")
    _refuse_meaningless(settings, "log-probabilities", ("layers",))
    records = Records(files)
    shape = shape_of(records.read(0), records.where(0)) if settings.shape == "auto" else settings.shape
    return LogprobSource(
        records,
        shape,
        teacher.tokenizer,
        entries=settings.entries,
        packing=None if packing is None else Packing.read(packing),
    )


def _refuse_meaningless(settings: ImportSettings, what: str, flags: Sequence[str]) -> None:
    given = next((flag for flag in flags if getattr(settings, flag) is not None), None)
    if given is not None:
        raise SettingsError(
            f"--{given} {getattr(settings, given)!r} would change nothing: it means nothing to {what}; leave it out"
        )


def make_manifest(settings: ImportSettings, rows: ImportedRows, scan: SourceScan) -> Manifest:
    """The manifest of the store that these rows become.

    Raises:
        SettingsError: more ids are asked for than there are, or the vocabulary is beyond three bytes.
    """
    teacher, seq_len = rows.teacher, tokens_per_row(settings, scan)
    record = teacher.record(seq_len)
    id_planes(record.vocab_size)
    return Manifest(
        teacher=record,
        tokenizer_sha256=tokenizer_fingerprint(teacher.tokenizer),
        corpus=rows.record(scan),
        seq_len=seq_len,
        row_mode="document",
        rows=len(rows),
        block_rows=USUAL,
        seed=settings.seed,
        views=1,
        mlm_probability=0.15,
        temperature=1.0,
        dtype=rows.source.dtype if isinstance(rows.source, HiddenSource) else "float32",
        targets=_targets(settings, rows.source, scan, record.vocab_size),
        positions="all",
        imported=rows.source.shape,
        software=software_versions(),
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _targets(settings: ImportSettings, source: Source, scan: SourceScan, vocab_size: int) -> TargetSpecs:
    if isinstance(source, HiddenSource):
        codec = parse_precision(settings.precision)
        return TargetSpecs(hidden=tuple(HiddenSpec(layer=layer, codec=codec) for layer in sorted(source.layers)))
    codec = "float16" if settings.precision == "float16" else "root8"
    entries = choose_entries(settings, scan, vocab_size)
    return TargetSpecs(logits=LogitsSpec(entries=entries, codec=codec, view="plain"))


def _tell(source: Source, scan: SourceScan, progress: BuildProgress) -> None:
    if scan.cut:
        progress.note(f"{scan.cut} rows are cut, as --long-rows says")
    for note in source.notes():
        progress.note(note)
    if scan.places:
        progress.note(
            f"{scan.places} distributions; the token that follows is listed in {scan.followed / scan.places:.1%}"
        )


def _run(
    storage: Storage, settings: ImportSettings, rows: ImportedRows, manifest: Manifest, progress: BuildProgress
) -> BuildReport:
    workers, started = Workers(), time.monotonic()
    writers = groups_to_build(storage, manifest)
    if not writers:
        progress.note(f"{settings.out} is complete already: {manifest.rows} rows; nothing to do")
    for writer in writers:
        _write_group(storage, settings, rows, writer, workers, progress)
    return BuildReport(
        path=settings.out,
        rows=manifest.rows,
        computed_rows=workers.add("rows", 0),
        written_bytes=workers.add("bytes", 0),
        seconds=time.monotonic() - started if writers else 0.0,
    )


def _write_group(
    storage: Storage,
    settings: ImportSettings,
    rows: ImportedRows,
    writer: GroupWriter,
    workers: Workers,
    progress: BuildProgress,
) -> None:
    writer = writer.unseal()
    write_teacher(storage, rows.teacher)
    manifest = writer.manifest
    progress.note(f"{manifest.rows} rows x {manifest.seq_len} tokens, {manifest.blocks} blocks")
    for name, what in describe_targets(manifest.targets).items():
        progress.note(f"  {name}: {what}")
    if writer.group.layout.uncalibrated:
        read = partial(read_streams, rows, manifest.seq_len)
        writer = keep_calibration(writer, calibrate_on(writer.group.layout, read, {}, progress.note))
    writer.write_metadata()
    if (lost := writer.compare_lost_seal()) is not None:
        progress.note(lost)
    missing = sorted(set(range(manifest.blocks)) - writer.committed())
    compute = partial(compute_block, writer.group.layout, load_quantisers(storage, writer.group.layout, {}), rows)
    write_blocks(
        writer, missing, compute, workers=workers, progress=progress, force=settings.force, cores=usable_cores()
    )
    write_variances(storage, manifest, complete={writer.group.prefix})
    writer.seal()
