"""The rows of a source, checked and in the order of a store.

Every row is read and checked once before anything is written, so that a source with a wrong line in the middle leaves
no store behind; then each again, when its block is made. Rows are in ascending order of a hash of (seed, row), but for
rows that can only be read together (a row group of a table): these stay together, in an order of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from teacher_cache.codecs.logits import TopkEntries
from teacher_cache.contract.manifest import CorpusRecord
from teacher_cache.errors import SettingsError, SourceError
from teacher_cache.importing.checks import check_ids, most_probable
from teacher_cache.importing.known import KnownTeacher
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.importing.source import Source, SourceRow, refuse
from teacher_cache.random_bits import uniform_bits

_UNIT = 5
"""Last coordinate of the hash that orders units; 0 to 4 are taken by other draws of the corpus."""


@dataclass(frozen=True, kw_only=True)
class SourceScan:
    """What one reading of all rows found.

    Tokens of the longest row, and of all rows; how many rows are cut; how many places list so many most probable ids;
    how many places there are, and how many of them list the token that follows.
    """

    longest: int
    tokens: int
    cut: int
    top_counts: Counter[int]
    places: int
    followed: int

    @property
    def usual_count(self) -> int:
        """The number of most probable ids that most places list, the larger one of two."""
        return max(self.top_counts, key=lambda count: (self.top_counts[count], count))


class ImportedRows:
    """The rows that are kept, in final order."""

    def __init__(self, source: Source, teacher: KnownTeacher, settings: ImportSettings) -> None:
        self.source = source
        self.teacher = teacher
        self.settings = settings
        unit_R = source.unit_R
        row_R = np.arange(len(unit_R))
        order = np.lexsort((uniform_bits(settings.seed, row_R), unit_R, uniform_bits(settings.seed, unit_R, _UNIT)))
        self.row_ids = order[: settings.max_rows]

    def __len__(self) -> int:
        return len(self.row_ids)

    def scan(self, progress: Callable[[int, int], None]) -> SourceScan:
        """Read and check every row that is kept; `progress` is told rows and tokens so far.

        Raises:
            SourceError: a row cannot be read, or is not what it should be.
        """
        longest, tokens, cut, places, followed, counts = 0, 0, 0, 0, 0, Counter[int]()
        limit, vocab_size = self.settings.seq_len, self.teacher.config.vocab_size
        for number, row_id in enumerate(self.row_ids.tolist(), 1):
            whole = self._read_whole(row_id)
            row = self._cut(whole, row_id, limit)
            if len(row.input_ids_T) < len(whole.input_ids_T):
                cut += 1
            longest, tokens = max(longest, len(row.input_ids_T)), tokens + len(row.input_ids_T)
            progress(number, tokens)
            if (found := row.distributions) is None:
                continue
            if not len(found.position_P):
                refuse(
                    self.source.where(row_id), "no token has a distribution: there is nothing to learn; leave it out"
                )
            most_probable(found, 1, vocab_size, self.source.where(row_id))
            counts.update(found.top_P.tolist())
            next_E = np.repeat(row.input_ids_T[found.position_P + 1], found.count_P)
            places, followed = places + len(found.position_P), followed + int((found.ids_E == next_E).sum())
        return SourceScan(longest=longest, tokens=tokens, cut=cut, top_counts=counts, places=places, followed=followed)

    def record(self, scan: SourceScan) -> CorpusRecord:
        """What a store records of where its rows come from."""
        return CorpusRecord(
            # what was given, not every file: there may be one a row
            specs=tuple(self.settings.source),
            fingerprint=self.source.fingerprint,
            documents=len(self.source.unit_R),
            tokens=scan.tokens,
            rows=len(self.source.unit_R),
        )

    def read(self, place: int, seq_len: int) -> SourceRow:
        """The row at a place of the final order, of at most `seq_len` tokens."""
        row_id = int(self.row_ids[place])
        return self._cut(self._read_whole(row_id), row_id, seq_len)

    def topk(self, place: int, row: SourceRow, entries: int) -> TopkEntries:
        """The most probable ids at the places of a row."""
        where = self.source.where(int(self.row_ids[place]))
        assert row.distributions is not None
        return most_probable(row.distributions, entries, self.teacher.config.vocab_size, where)

    def _read_whole(self, row_id: int) -> SourceRow:
        row = self.source.read(row_id)
        check_ids(row, self.teacher.tokens, self.source.where(row_id))
        return row

    def _cut(self, row: SourceRow, row_id: int, limit: int | None) -> SourceRow:
        if limit is None or len(row.input_ids_T) <= limit:
            return row
        if self.settings.long_rows == "refuse":
            refuse(
                self.source.where(row_id),
                f"{len(row.input_ids_T)} tokens are more than --seq-len {limit}: give a larger one, or --long-rows cut "
                "to leave out what is beyond",
            )
        return row.first(limit)


def choose_entries(settings: ImportSettings, scan: SourceScan, vocab_size: int) -> int:
    """How many ids to keep at each place.

    Raises:
        SettingsError: more are asked for than the vocabulary or any place has.
        SourceError: most places list none that is among the most probable.
    """
    if settings.k is None:
        if not scan.usual_count:
            raise SourceError(
                "most places of the source list no most probable id, only the token that follows, which is no "
                "distribution to learn; ask the engine for more of them, such as prompt_logprobs=20"
            )
        return scan.usual_count
    most = min(max(scan.top_counts), vocab_size)
    if settings.k > most:
        raise SettingsError(
            f"--k {settings.k} is more than the {most} ids that any place of the source lists: the others would be "
            "made up; give a smaller number, or leave it out"
        )
    return settings.k


def tokens_per_row(settings: ImportSettings, scan: SourceScan) -> int:
    """T of the store."""
    return settings.seq_len or scan.longest
