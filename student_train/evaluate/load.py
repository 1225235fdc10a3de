"""An exported student, or any directory of a Hugging Face model, loaded as any user would load it.

In: a folder. Out: the model in float32, with its language-modelling head where the folder has one, and the provenance
record where `kdtrain` wrote one. Whether it can read a cache's rows at all is checked by `check_fit`: token ids of
another vocabulary would be other words to it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from student_train.run_files import PROVENANCE
from student_train.students.pretrained import (
    check_family,
    has_task_head,
    load_config,
    load_model,
    vocabulary_difference,
)
from student_train.students.vocabulary.kept_ids import read_kept_ids
from student_train.students.vocabulary.mapping import IdMapping
from teacher_cache.contract.batch import TargetBatch
from teacher_cache.contract.manifest import Manifest
from teacher_cache.errors import StudentError
from teacher_cache.models.families import encoder_of, kind_of, position_limit
from teacher_cache.models.heads import LMHead
from teacher_cache.models.placing import Placement
from teacher_cache.outside import parse_record

_log = logging.getLogger(__name__)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Names of weight files, as `from_pretrained` prefers them."""


@dataclass(frozen=True, kw_only=True)
class LoadedStudent:
    """A student ready to be measured. `head` maps final hidden states [P, D] to logits [P, V], if there is one.

    `ids` takes a teacher's ids to its own, where it has only some of them.
    """

    folder: Path
    encoder: PreTrainedModel
    head: LMHead | None
    provenance: Mapping[str, Any]
    ids: IdMapping | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The encoder's configuration."""
        return self.encoder.config

    def reads(self, targets: TargetBatch) -> TargetBatch:
        """Rows of a cache with inputs in the student's ids; targets stay the teacher's."""
        if self.ids is None:
            return targets
        return replace(targets, input_ids_BT=self.ids.inputs(targets.input_ids_BT))


def load_student(folder: str | Path, device: str = "cpu", placement: Placement | None = None) -> LoadedStudent:
    """The model in `folder`, in evaluation mode on `device`, or spread over several.

    Raises:
        StudentError: there is no complete model of an encoder family, or its provenance record cannot be read.
        TeacherError: it cannot be spread.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise StudentError(
            f"there is no student directory {str(folder)!r}: nothing can be measured; give --student the directory "
            "that kdtrain wrote (its --out) or any Hugging Face encoder directory"
        )
    kind, config = check_family(folder), load_config(folder)
    # families name the class of a causal LM in several ways, and none but a fine-tuned one is of use without its head
    with_head = kind == "causal-lm" and not has_task_head(config)
    with_head |= any(name.endswith("ForMaskedLM") for name in config.architectures or [])
    loaded = load_model(folder, with_mlm_head=with_head, placement=placement)
    kept = read_kept_ids(folder)
    model = loaded.model
    if placement is None:
        nn.Module.to(model, device).eval()
    _log.info("read student %s: %s, to run on %s", folder, loaded.model.config.model_type, device)
    return LoadedStudent(
        folder=folder,
        encoder=encoder_of(model),
        head=LMHead(model) if loaded.has_trained_head else None,
        provenance=_read_provenance(folder / PROVENANCE),
        ids=None if kept is None else IdMapping(kept),
    )


def _read_provenance(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        record = parse_record(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudentError(
            f"{str(path)!r} cannot be read as JSON ({error}): which layers the student was trained on cannot be told; "
            "restore the file, or delete it to measure with default layers"
        ) from error
    if not isinstance(record, dict):
        raise StudentError(f"{str(path)!r} holds {record!r} where a JSON object is expected: restore or delete it")
    return record


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights of a model folder are loaded from: safetensors where there are any."""
    return next((files for pattern in WEIGHTS if (files := sorted(folder.glob(pattern)))), [])


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and bytes of the weight files in a model folder."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def check_fit(student: LoadedStudent, manifest: Manifest, teacher_folder: Path) -> None:
    """Refuse a student that cannot read the cache's rows.

    Raises:
        StudentError: it predicts masked tokens and the teacher next ones, or the other way round, its token ids mean
            something else than the teacher's, or it has too few positions.
    """
    if (kind_of(student.config) == "causal-lm") != manifest.teacher.causal:
        ours, theirs = ("a masked LM", "a causal LM") if manifest.teacher.causal else ("a causal LM", "a masked LM")
        raise StudentError(
            f"student {str(student.folder)!r} is {ours}, and the teacher of this cache, {manifest.teacher.name!r}, "
            f"{theirs}: what one predicts means nothing to the other; give a cache of a teacher of the student's kind"
        )
    kept = None if student.ids is None else student.ids.kept
    difference = vocabulary_difference(student.folder, teacher_folder, kept)
    if difference:
        raise StudentError(
            f"student {str(student.folder)!r} has {difference}: the rows of the cache are token ids of the teacher "
            f"{manifest.teacher.name!r} and would mean other words to it; give the cache that the student was trained "
            "from, or a student with the teacher's vocabulary"
        )
    positions = position_limit(student.encoder)
    if positions is not None and positions < manifest.seq_len:
        raise StudentError(
            f"student {str(student.folder)!r} reads at most {positions} positions, the rows of the cache have "
            f"{manifest.seq_len}: it cannot read them; give a cache built with --seq-len {positions} or less"
        )
