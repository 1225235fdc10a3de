"""Everything that a model card says, gathered from the records in the student's directory and from this export.

A model that was fine-tuned hands on what its student came from. What no record tells is None, and left out of the card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from student_train.evaluate.export.embedding import Similarity
from student_train.evaluate.export.settings import REPOSITORY, ExportSettings
from student_train.evaluate.export.source import Source
from student_train.evaluate.onnx.records import OnnxReport
from student_train.evaluate.run_records import RunRecords
from student_train.evaluate.schemas import SavedSchema, check_record, read_object
from student_train.run_files import FINETUNED
from student_train.run_schemas import CacheSchema, ProvenanceSchema
from teacher_cache.contract.manifest import Manifest
from teacher_cache.fields import check_fields


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an export. `cache` is of the store that the student was trained from, `saved` of its task."""

    settings: ExportSettings
    source: Source
    run: RunRecords
    provenance: Mapping[str, Any]
    cache: CacheSchema
    saved: SavedSchema | None = None
    onnx: OnnxReport | None = None
    embeds: bool = False
    similarity: Similarity | None = None
    longest_sentence: int | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def teacher(self) -> str | None:
        """As it was called when the store was built."""
        return self.cache.teacher.name

    @property
    def base_model(self) -> str | None:
        """Its name on the hub, where it came from there."""
        if self.settings.base_model is not None:
            return self.settings.base_model
        name = self.teacher
        from_hub = name is not None and self.cache.teacher.revision is not None and REPOSITORY.fullmatch(name)
        return name if from_hub else None

    @property
    def pipeline(self) -> str:
        """The hub's name of what the model does."""
        return "sentence-similarity" if self.embeds else self.source.kind.pipeline

    @property
    def library(self) -> str:
        """That loads it."""
        return "sentence-transformers" if self.embeds else "transformers"


def read_saved(source: Source) -> tuple[SavedSchema | None, Mapping[str, Any]]:
    """What `kdeval finetune --save` says of the model: its record, and the provenance of its student.

    Raises:
        StudentError: the record cannot be read.
    """
    path = source.folder / FINETUNED
    if not path.exists():
        return None, {}
    record = read_object(path)
    saved = check_record(SavedSchema, path, record)
    base = record.get("base")
    try:
        check_fields(ProvenanceSchema, base)
    except ValueError:
        base = None
    return saved, base or {}


def notes_of(record: Mapping[str, Any]) -> list[str]:
    """The notes of a record that is anybody's; the first versions left none."""
    notes = record.get("notes")
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def cache_facts(provenance: Mapping[str, Any], manifest: Manifest | None, identity: str | None) -> CacheSchema:
    """What is known of the store that the student was trained from.

    The first versions said less of it in a student's record; where the store is at hand (`identity` is its hash), it
    says the rest.
    """
    if not provenance:
        return CacheSchema()
    known = check_fields(ProvenanceSchema, provenance).cache
    if manifest is None or known.identity_sha256 != identity or known.corpus is not None:
        return known
    corpus = manifest.corpus
    rest = {
        "seq_len": manifest.seq_len,
        "command": manifest.command,
        "corpus": {
            "specs": list(corpus.specs),
            "fingerprint": corpus.fingerprint,
            "documents": corpus.documents,
            "tokens": corpus.tokens,
        },
    }
    return check_fields(CacheSchema, {**known.model_dump(exclude_none=True), **rest})
