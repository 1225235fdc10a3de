"""From a student to a folder that can be published and served: `kdeval export`.

In: a student's directory with the records that training and measurements left there. Out: a new folder, written whole
or not at all, and an `ExportReport`. Costs a copy of the weights; with ONNX files their export, quantising and
measuring, seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from student_train.evaluate.export.cache_rows import texts_of
from student_train.evaluate.export.card import make_card, write_card
from student_train.evaluate.export.embedding import (
    INSTALL,
    LEAST_SENTENCES,
    Similarity,
    check_embeds,
    compare_embeddings,
    embedding_folder,
    missing_package,
    sentences_of,
    write_embedding,
)
from student_train.evaluate.export.facts import Facts, cache_facts, read_saved
from student_train.evaluate.export.folder import check_loads, write_model
from student_train.evaluate.export.onnx_files import check_packages, onnx_source, write_onnx_files
from student_train.evaluate.export.push import check_token, push
from student_train.evaluate.export.settings import ExportSettings
from student_train.evaluate.export.source import Source, read_source
from student_train.evaluate.fidelity.fidelity import plan_for
from student_train.evaluate.latency.turns import Show
from student_train.evaluate.load import load_student
from student_train.evaluate.new_folder import check_new_folder, whole_folder
from student_train.evaluate.onnx.records import OnnxReport
from student_train.evaluate.run_records import read_run
from teacher_cache.read.pool import CacheSource, open_caches


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written where. `files` are names with bytes; `address` is that on the hub, if it went there."""

    student: str
    out: str
    pipeline: str
    files: Mapping[str, int]
    onnx: OnnxReport | None
    similarity: Similarity | None
    address: str | None
    notes: Sequence[str]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "student": self.student,
            "out": self.out,
            "pipeline": self.pipeline,
            "files": dict(self.files),
            "bytes": self.bytes,
            "onnx": None if self.onnx is None else self.onnx.to_json(),
            "similarity": None if self.similarity is None else asdict(self.similarity),
            "address": self.address,
            "notes": list(self.notes),
        }


def export_student_folder(settings: ExportSettings, *, show: Show) -> ExportReport:
    """Write the folder that the settings ask for.

    Raises:
        StudentError: there is no complete model, it cannot be exported as asked, or a record of it cannot be read.
        StoreError: the cache cannot be read.
        SettingsError: the folder cannot be written, a package is missing, or the hub refuses.
    """
    out = Path(settings.out).expanduser()
    check_new_folder("--out", out, Path(settings.student).expanduser())
    check_packages(settings)
    if settings.push_to_hub is not None:
        check_token(settings.push_to_hub)
    show("loading the student")
    source = read_source(settings.student)
    if settings.with_onnx:
        onnx_source(source, settings)
    facts, teacher, reader = _gather(source, settings)
    with whole_folder("--out", out) as folder:
        facts = replace(facts, notes=(*facts.notes, *write_model(source, folder)))
        if teacher is not None:
            facts = _embed(facts, teacher, folder, reader, show)
        if settings.with_onnx:
            onnx = write_onnx_files(source, settings, folder, reader=reader, saved=facts.saved, show=show)
            facts = replace(facts, onnx=onnx)
        check_loads(source, folder)
        write_card(make_card(facts), folder)
    address = None
    if settings.push_to_hub is not None:
        show(f"uploading to {settings.push_to_hub}")
        address = push(out, settings.push_to_hub, private=settings.private)
    files = {str(file.relative_to(out)): file.stat().st_size for file in sorted(out.rglob("*")) if file.is_file()}
    return ExportReport(
        student=settings.student,
        out=str(out),
        pipeline=facts.pipeline,
        files=files,
        onnx=facts.onnx,
        similarity=facts.similarity,
        address=address,
        notes=tuple(facts.notes),
    )


def _gather(source: Source, settings: ExportSettings) -> tuple[Facts, Path | None, CacheSource | None]:
    """What is known, the folder of a teacher that embeds sentences, and the store."""
    run = read_run(settings.student)
    notes = [f"{name} is a record of other weights and was left out" for name in run.stale]
    if source.fine_tuned:
        # earlier versions measured such decoders as if they still predicted next tokens
        found = {"perplexity": run.perplexity, "lm-eval": run.lm_eval}
        notes += [
            f"{name}.json was left out: the model was fine-tuned for a task and predicts no next tokens"
            for name, record in found.items()
            if record is not None
        ]
        run = replace(run, perplexity=None, lm_eval=None)
    saved, base = read_saved(source)
    provenance = run.provenance or base
    reader = open_caches(settings.cache) if settings.cache else None
    manifest, identity = (None, None) if reader is None else (reader.manifest, reader.identity_sha256)
    facts = Facts(
        settings=settings,
        source=source,
        run=run,
        provenance=provenance,
        cache=cache_facts(provenance, manifest, identity),
        saved=saved,
        notes=tuple(notes),
    )
    recorded = facts.teacher if source.kind.pipeline == "feature-extraction" else None
    teacher = embedding_folder(settings.teacher, recorded)
    if teacher is None and source.kind.pipeline == "feature-extraction":
        note = (
            "no files of sentence-transformers: a store keeps no pooling of its teacher; if that embeds sentences, "
            "give --teacher its folder or name on the hub"
        )
        facts = replace(facts, notes=(*facts.notes, note))
    return facts, teacher, reader


def _embed(facts: Facts, teacher: Path, folder: Path, reader: CacheSource | None, show: Show) -> Facts:
    """Write the files of sentence-transformers, and compare embeddings where there is what it takes."""
    longest = write_embedding(facts.source, teacher, folder)
    facts = replace(facts, embeds=True, longest_sentence=longest)
    if missing_package():
        return _without_similarity(facts, f"sentence-transformers is not installed ({INSTALL})")
    check_embeds(folder)
    if reader is None:
        return _without_similarity(facts, "no text is at hand: give --cache")
    plan = plan_for(reader, load_student(facts.source.folder), rows=facts.settings.rows)
    sentences = sentences_of(texts_of(reader, plan.rows))
    if len(sentences) < LEAST_SENTENCES:
        return _without_similarity(facts, f"the measured rows hold {len(sentences)} whole sentences")
    show(f"embedding {len(sentences)} sentences")
    found = compare_embeddings(folder, teacher, sentences)
    return replace(facts, similarity=replace(found, held_out=plan.held_out))


def _without_similarity(facts: Facts, why: str) -> Facts:
    return replace(facts, notes=(*facts.notes, f"embeddings were not compared with the teacher's: {why}"))
