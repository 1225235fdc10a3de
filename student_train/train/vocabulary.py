"""`--vocabulary` of a training: which ids its student gets, and what the rows of the cache lose by that.

In: what was asked for, the cache, the rows to train on. Out: a `TrimmedVocabulary`, or None where every id stays. What
the rows lose is counted over all of them, and of their distributions over the first `_SAMPLED` rows. Cost: the input
ids of the rows are read once, a text is tokenised three times.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from student_train.data.first_rows import FirstRows
from student_train.data.split import RowRanges
from student_train.students.pretrained import load_config, load_teacher_tokenizer
from student_train.students.vocabulary.keep import keep_ids
from student_train.students.vocabulary.kept_ids import KeptIds, read_kept_ids
from student_train.students.vocabulary.mapping import IdMapping
from student_train.students.vocabulary.source import count_ids
from student_train.students.vocabulary.text import PieceDifferences, compare_pieces, count_text, covering
from student_train.students.vocabulary.tokenizer import trim_tokenizer
from student_train.vocabulary_choice import VocabularyChoice
from teacher_cache.contract.batch import SampledLogits, TargetRequest, TopkLogits
from teacher_cache.errors import SettingsError
from teacher_cache.read.pool import CacheSource

_MOST_DROPPED = 0.5
_SAMPLED = 64


@dataclass(frozen=True, kw_only=True)
class TrimmedVocabulary:
    """The kept ids, the tokenizer that has them alone, and what is lost.

    `lost` are shares: of the `tokens` of the rows, and of the teacher's `distribution` at places whose mass or draws
    are read. `differences` compares the pieces of the text, where the ids come from one.
    """

    choice: str
    kept: KeptIds
    tokenizer: Any
    stand_in: str
    lost: dict[str, float]
    differences: PieceDifferences | None = None

    def __str__(self) -> str:
        lost = f"{self.lost['tokens']:.4%} of the tokens of the rows are others and are read as {self.stand_in!r}"
        if "distribution" in self.lost:
            lost += f"; {self.lost['distribution']:.4%} of the teacher's distribution is on others too"
        same = "" if self.differences is None else f"; the text has {self.differences}"
        return f"{len(self.kept):,} of {self.kept.teacher_entries:,} ids; {lost}{same}"

    def record(self) -> dict[str, Any]:
        """For the provenance."""
        return {
            "choice": self.choice,
            "kept": len(self.kept),
            "of": self.kept.teacher_entries,
            "sha256": self.kept.sha256,
            "stand_in": self.stand_in,
            "lost": self.lost,
            **({} if self.differences is None else {"pieces": self.differences.to_json()}),
        }


def choose_vocabulary(
    choice: VocabularyChoice, source: CacheSource, rows: RowRanges, *, logits: bool, skip_damaged: bool = False
) -> TrimmedVocabulary | None:
    """The ids that the student of a training gets.

    Args:
        choice: what was asked for.
        source: the cache.
        rows: those to train on.
        logits: whether the student learns from the cached distribution.
        skip_damaged: pass over damaged blocks.

    Raises:
        SettingsError: a file cannot be read, uses next to nothing, or is of other languages than the rows.
        StudentError: the tokenizer cannot be cut.
        StoreError: the rows cannot be read.
    """
    if choice.all:
        return None
    folder = source.teacher_folder()
    name, entries = source.manifest.teacher.name, source.manifest.teacher.vocab_size
    tokenizer: Any = load_teacher_tokenizer(folder)
    counts_V = count_ids(source, rows, skip_damaged=skip_damaged)
    differences, files = None, [Path(file).expanduser() for file in choice.files]
    if choice.share is not None:
        kept = keep_ids(tokenizer, counts_V, covering(counts_V, choice.share), load_config(folder), folder, name)
    else:
        kept = _of_files(files, choice, tokenizer, entries, load_config(folder), folder, name)
    trimmed = trim_tokenizer(tokenizer, kept, name)
    if files and not _lists_ids(files):
        differences = compare_pieces(tokenizer, trimmed, kept, read_lines(files))
    vocabulary = TrimmedVocabulary(
        choice=choice.text,
        kept=kept,
        tokenizer=trimmed,
        stand_in=str(tokenizer.convert_ids_to_tokens(kept.stand_in)),
        lost={"tokens": _lost_tokens(counts_V, kept)},
        differences=differences,
    )
    if vocabulary.lost["tokens"] > _MOST_DROPPED:
        raise SettingsError(
            f"--vocabulary {choice.text!r} leaves {vocabulary.lost['tokens']:.1%} of the tokens of the rows to train "
            f"on without an id, all of which would be read as {vocabulary.stand_in!r}: the student would learn next to "
            "nothing from them; give a text of the languages of the cache, or coverage:0.9999 to go by its rows"
        )
    if logits:
        first = FirstRows(source=source, rows=rows, skip_damaged=skip_damaged)
        lost = _lost_distribution(first, kept)
        if lost is not None and lost >= 1:
            raise SettingsError(
                f"--vocabulary {choice.text!r} leaves nothing of the teacher's distribution: none of the ids that the "
                f"cache holds at places of the first {_SAMPLED} rows is kept, so od would learn nothing; keep more "
                "ids, or leave od out of --method"
            )
        vocabulary = replace(vocabulary, lost={**vocabulary.lost, **({} if lost is None else {"distribution": lost})})
    return vocabulary


def _lists_ids(files: Sequence[Path]) -> bool:
    """Whether these are no text but the ids that another student kept."""
    return len(files) == 1 and files[0].suffix == ".json"


def _of_files(
    files: Sequence[Path],
    choice: VocabularyChoice,
    tokenizer: Any,
    entries: int,
    config: PreTrainedConfig,
    folder: Path,
    name: str,
) -> KeptIds:
    if _lists_ids(files):
        kept = read_kept_ids(files[0])
        if kept is None or kept.teacher_entries != entries:
            raise SettingsError(
                f"--vocabulary {choice.text!r} lists some of {0 if kept is None else kept.teacher_entries:,} ids, and "
                f"the teacher of this cache has {entries:,}: they are another teacher's; give the file of a student of "
                "this one"
            )
        return kept
    counts_V = count_text(tokenizer, read_lines(files), entries)
    return keep_ids(tokenizer, counts_V, counts_V.nonzero()[0], config, folder, name)


def read_lines(files: Sequence[Path]) -> Iterator[str]:
    """The lines of text files in UTF-8, compressed by gzip where one is called `.gz`.

    Raises:
        SettingsError: one cannot be read.
    """
    for file in files:
        packed = file.suffix == ".gz"
        try:
            with gzip.open(file, "rt", encoding="utf-8") if packed else file.open(encoding="utf-8") as lines:
                for line in lines:
                    yield line.rstrip("\n")
        except (OSError, EOFError, ValueError) as error:
            raise SettingsError(
                f"--vocabulary 'trim:{file}' cannot be read ({error}): which ids the student gets cannot be told; give "
                "text files in UTF-8, joined by commas, such as the text that the cache was built from"
            ) from error


def _lost_tokens(counts_V: NDArray[np.int64], kept: KeptIds) -> float:
    total = int(counts_V.sum())
    return 1 - int(counts_V[kept.ids_K.numpy()].sum()) / total if total else 0.0


def _lost_distribution(rows: FirstRows, kept: KeptIds) -> float | None:
    """The share of the mass of known ids, or of the draws, that is on dropped ones, over places of the first rows.

    None where they have no place.
    """
    mapping, lost, known = IdMapping(kept), 0.0, 0.0
    for batch in rows.batches(TargetRequest(logits=True), _SAMPLED, 8):
        for targets in batch.values():
            if targets.logits is not None and targets.places is not None:
                mass_BMK = _mass_BMK(targets.logits) * targets.places.real_BM()[..., None]
                lost += float(mass_BMK[mapping.dropped(targets.logits.ids_BMK)].sum())
                known += float(mass_BMK.sum())
    return lost / known if known else None


def _mass_BMK(logits: TopkLogits | SampledLogits) -> Tensor:
    return logits.log_probs_BMK.double().exp() if isinstance(logits, TopkLogits) else logits.counts_BMK.double()
