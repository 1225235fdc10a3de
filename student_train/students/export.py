"""A trained student as a plain Hugging Face directory: weights, configuration, tokenizer, provenance.

The directory holds the student alone. It is written beside its final place, loaded again as any user would load it, and
only then moved file by file into place, the provenance record last: where that record is, the student is whole.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from student_train.out_folder import explain_write_errors
from student_train.run_files import PROVENANCE
from student_train.students.pretrained import load_model, load_teacher_tokenizer
from teacher_cache.disk import flush_to_disk
from teacher_cache.errors import StudentError
from teacher_cache.models.families import encoder_of, quiet_transformers

UNFINISHED = ".export-unfinished"
"""The folder in which a student is put together."""


def export_student(
    model: PreTrainedModel, out: Path, *, teacher_folder: Path, seq_len: int, provenance: Mapping[str, Any]
) -> None:
    """Write `model` to the folder `out`, replacing an earlier export there and leaving other files alone.

    Args:
        model: the student, with or without masked-LM head; written as it is.
        out: existing or new folder.
        teacher_folder: where the tokenizer comes from.
        seq_len: positions it was trained on, written as the tokenizer's `model_max_length`.
        provenance: JSON record of where the student comes from.

    Raises:
        StudentError: the tokenizer cannot be read, or what was written does not load without missing or unexpected
            weights.
        SpaceError, TrainingError: it cannot be written.
    """
    unfinished = out / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer: Any = load_teacher_tokenizer(teacher_folder)
    tokenizer.model_max_length = seq_len
    readable = _readable(model, tokenizer.model_input_names)
    if readable != tokenizer.model_input_names:
        # its arguments say what is saved, and the attribute with which value
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = readable
    try:
        with explain_write_errors(out):
            _write(model, unfinished, tokenizer, provenance)
        _check_reload(model, unfinished)
        with explain_write_errors(out):
            _move(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _readable(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The tokenizer's outputs that the student can read, all values of them.

    A teacher's tokenizer may number the second text of a pair, where the student's table has one type or none.
    """
    encoder = encoder_of(model)
    taken = inspect.signature(encoder.forward).parameters
    types = getattr(encoder.config, "type_vocab_size", 0)
    return [name for name in names if name in taken and (name != "token_type_ids" or types >= 2)]


def _move(unfinished: Path, out: Path) -> None:
    (out / PROVENANCE).unlink(missing_ok=True)
    for file in unfinished.iterdir():
        # contents before names: after a crash a name must not lead to an empty file
        flush_to_disk(file)
    flush_to_disk(out)
    # False sorts before True: everything else first, the record last
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == PROVENANCE):
        if file.name == PROVENANCE:
            flush_to_disk(out)
        file.replace(out / file.name)
    flush_to_disk(out)
    flush_to_disk(out.absolute().parent)


def _write(model: PreTrainedModel, folder: Path, tokenizer: Any, provenance: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    with quiet_transformers():
        # one file at any size: an earlier export's shards could not be told from this one's
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
    text = json.dumps(provenance, indent=2, allow_nan=False) + "\n"
    (folder / PROVENANCE).write_text(text, encoding="utf-8")
    # safetensors lets only its owner read a file; a student is as readable as the rest of its directory
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _check_reload(model: PreTrainedModel, folder: Path) -> None:
    loaded = load_model(folder, with_mlm_head=encoder_of(model) is not model)
    if loaded.missing or loaded.unexpected:
        raise StudentError(
            f"the student written to {str(folder)!r} loads with missing weights {sorted(loaded.missing)!r} and "
            f"unexpected ones {sorted(loaded.unexpected)!r}: it would not be the network that was trained; please "
            f"report this with the family {model.config.model_type!r} and the Transformers version"
        )
