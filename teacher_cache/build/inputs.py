"""What a build starts from: the teacher, the rows that it is to read, what is to be kept, and how many rows at a time.

`BuildProgress` is told what goes on meanwhile. Nothing is computed here but what tries the teacher on a row or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from teacher_cache.build.resolve import (
    make_manifest,
    plan_targets,
    refuse_other_kind,
    resolve_segments,
    resolve_seq_len,
)
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.corpus.corpus import Rows, pack_corpus, refuse_unknown_shares
from teacher_cache.corpus.documents import look_up
from teacher_cache.corpus.mixing import Mix
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.models.placing import Placement
from teacher_cache.teacher.processes import Processes
from teacher_cache.teacher.shared import SharedTeacher, refuse_unshared
from teacher_cache.teacher.teacher import Teacher

_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}
_TOKENS_PER_READING = {"cpu": 16384, "cuda": 32768}
"""Of a teacher whose weights are brought from elsewhere for every batch, so that computing takes longer than bringing:
a layer of P weights takes 2 P operations a token (1e11 a second on two CPU cores, 4e14 on a large GPU) and 2 to 4 bytes
a weight once a batch (1e9 to 2.5e10 a second)."""


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


def read_inputs(
    settings: BuildSettings,
    progress: BuildProgress,
    look: Callable[[TargetSpecs], None] | None = None,
    processes: Processes | None = None,
) -> tuple[Teacher, dict[int, AttentionProjections], Rows, Manifest]:
    """The teacher, its projections, the rows that it is to read, and what is to be kept. Nothing is computed yet.

    A corpus that is not there is found before the teacher is loaded, and `look` is shown the targets before the text is
    read: both may take long. `processes` are to hold the teacher together.
    """
    mix = Mix.of(settings.corpus, settings.mix_alpha)
    refuse_unknown_shares(settings.corpus, mix, settings.shuffle_buffer)
    look_up(settings.corpus if mix is None else mix.specs, streamed=settings.shuffle_buffer is not None)
    teacher = load_teacher(settings, processes)
    refuse_other_kind(settings, teacher)
    seq_len = resolve_seq_len(settings, teacher)
    teacher.probe_rows(seq_len)
    if resolve_segments(settings, teacher) == "isolated":
        teacher.probe_segments(seq_len)
    targets, projections = plan_targets(settings, teacher, progress.note)
    if look is not None:
        look(targets)
    rows = pack_rows(settings, teacher, seq_len, progress)
    for source, count in rows.sources:
        progress.note(f"{count} rows ({count / sum(n for _, n in rows.sources):.1%}) of {source}")
    return teacher, projections, rows, make_manifest(settings, teacher, targets, rows, seq_len)


def load_teacher(settings: BuildSettings, processes: Processes | None = None) -> Teacher:
    """The teacher, not started yet; of each of several `processes` that are to hold it together."""
    if processes is not None:
        refuse_unshared(settings.teacher, settings.revision, processes.count)
    teacher = Teacher.load(
        settings.teacher,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        placement=Placement.chosen(settings.device_map, settings.max_memory, settings.device),
    )
    return teacher if processes is None else SharedTeacher(teacher, processes)


def pack_rows(settings: BuildSettings, teacher: Teacher, seq_len: int, progress: BuildProgress) -> Rows:
    """The rows that the settings ask for."""
    rows = pack_corpus(
        settings.corpus,
        teacher.tokenizer,
        seq_len=seq_len,
        row_mode=settings.rows,
        seed=settings.seed,
        max_rows=settings.max_rows,
        mix_alpha=settings.mix_alpha,
        shuffle_buffer=settings.shuffle_buffer,
        segments=resolve_segments(settings, teacher),
        causal=teacher.record.causal,
        chat=settings.chat or None,
        vocab_size=teacher.record.vocab_size,
        progress=progress.tokenised,
        note=progress.note,
    )
    whole = settings.shuffle_buffer is None
    if len(rows) < settings.max_rows and not (whole and settings.max_rows == BuildSettings.max_rows):
        what = "the corpus has" if whole else "what was read of the corpus makes"
        progress.note(f"{what} {len(rows)} rows, fewer than --max-rows {settings.max_rows}: all are kept")
    part = settings.part_numbers()
    return rows if part is None else rows.part(*part)


def choose_batch_rows(settings: BuildSettings, teacher: Teacher, seq_len: int) -> int:
    """Rows per forward pass of the teacher."""
    if settings.batch_size is not None:
        return settings.batch_size
    tokens = _TOKENS_PER_BATCH if settings.device_map is None else _TOKENS_PER_READING
    return max(1, tokens.get(teacher.device.type, tokens["cuda"]) // seq_len)
