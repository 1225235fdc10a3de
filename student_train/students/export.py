"""A trained student as a plain Hugging Face directory: weights, configuration, tokenizer, provenance.

The directory holds the student alone. It is written beside its final place, loaded again as any user would load it, run
on one row beside the student that was trained, and only then moved file by file into place, the provenance record last:
where that record is, the student is whole.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from student_train.out_folder import explain_write_errors
from student_train.run_files import PROVENANCE
from student_train.students.pretrained import causal, load_model, load_teacher_tokenizer
from student_train.students.vocabulary.kept_ids import KEPT_IDS, KeptIds
from student_train.students.vocabulary.weights import trim_config
from teacher_cache.disk import flush_to_disk
from teacher_cache.errors import StudentError, first_line
from teacher_cache.models.families import encoder_of, position_limit, quiet_transformers
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments

Vocabulary = tuple[KeptIds, Any]
"""The kept ids, and a tokenizer that has these alone."""
UNFINISHED = ".export-unfinished"
"""The folder in which a student is put together."""
_COMPARED = 32
_DIFFERENCE = {torch.float16: 0.02, torch.bfloat16: 0.1}
_FLOAT32_DIFFERENCE = 1e-3
"""What arithmetic may make of a vector, as a share of its length; a buffer that was lost makes tens of percent."""


def export_student(
    model: PreTrainedModel,
    out: Path,
    *,
    teacher_folder: Path,
    seq_len: int,
    provenance: Mapping[str, Any],
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write `model` to the folder `out`, replacing an earlier export there and leaving other files alone.

    Args:
        model: the student, with or without its head over the vocabulary; written as it is.
        out: existing or new folder.
        teacher_folder: where the tokenizer comes from.
        seq_len: positions it was trained on, written as the `model_max_length` of an encoder's tokenizer.
        provenance: JSON record of where the student comes from.
        vocabulary: the ids that it has and the tokenizer that knows no others, where these are not the teacher's.

    Raises:
        StudentError: the tokenizer cannot be read, or what was written does not load without missing or unexpected
            weights, or computes something else than `model`.
        SpaceError, TrainingError: it cannot be written.
    """
    unfinished = out / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    kept, tokenizer = (None, load_teacher_tokenizer(teacher_folder)) if vocabulary is None else vocabulary
    tokenizer.model_max_length = _longest_text(model, tokenizer, seq_len)
    readable = _readable(model, tokenizer.model_input_names)
    if readable != tokenizer.model_input_names:
        # its arguments say what is saved, and the attribute with which value
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = readable
    if causal(model.config):
        model.generation_config = _generation(model, tokenizer, teacher_folder, kept)
    try:
        with explain_write_errors(out):
            _write(model, unfinished, tokenizer, provenance, kept)
        _check_reload(model, unfinished, seq_len)
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


def _longest_text(model: PreTrainedModel, tokenizer: Any, seq_len: int) -> int:
    """Where the tokenizer cuts texts off: a decoder goes on writing after what it reads, up to its last position."""
    if not causal(model.config):
        return seq_len
    longest: int = tokenizer.model_max_length
    return min(longest, position_limit(model) or longest)


def _generation(model: PreTrainedModel, tokenizer: Any, teacher_folder: Path, kept: KeptIds | None) -> GenerationConfig:
    """Where `model.generate` begins and ends: as the teacher's does, which may know more ends than its configuration.

    Without an id for padding there is a warning at every call; the end of a text stands in for it, as it does there.
    What is no id of the student's, such as the -1 that some models have for padding, says that there is none.
    """
    try:
        settled = GenerationConfig.from_pretrained(teacher_folder, local_files_only=True)
    except (OSError, ValueError, TypeError):
        settled = GenerationConfig()
    if kept is not None:
        settled = trim_config(settled, kept)
    ids = {
        name: next(
            (
                found
                for each in (settled, model.config, tokenizer)
                if _are_tokens(found := getattr(each, name, None), model.config.vocab_size)
            ),
            None,
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if ids["pad_token_id"] is None:
        ends = ids["eos_token_id"]
        ids["pad_token_id"] = ends[0] if isinstance(ends, list) and ends else ends
    return GenerationConfig(**ids)


def _are_tokens(found: Any, entries: int) -> bool:
    """Whether this is an id, or several."""
    ids = found if isinstance(found, list) else [found]
    return bool(ids) and all(type(one) is int and 0 <= one < entries for one in ids)


def _move(unfinished: Path, out: Path) -> None:
    (out / PROVENANCE).unlink(missing_ok=True)
    # of an earlier student: the next one may have all ids
    (out / KEPT_IDS).unlink(missing_ok=True)
    for file in unfinished.rglob("*"):
        # contents before names: after a crash a name must not lead to an empty file
        flush_to_disk(file)
    flush_to_disk(out)
    # False sorts before True: everything else first, the record last
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == PROVENANCE):
        if file.name == PROVENANCE:
            flush_to_disk(out)
        if file.is_dir():
            # chat templates beside the first one
            shutil.rmtree(out / file.name, ignore_errors=True)
        file.replace(out / file.name)
    flush_to_disk(out)
    flush_to_disk(out.absolute().parent)


def _write(
    model: PreTrainedModel, folder: Path, tokenizer: Any, provenance: Mapping[str, Any], kept: KeptIds | None
) -> None:
    folder.mkdir(parents=True)
    with quiet_transformers():
        # one file at any size: an earlier export's shards could not be told from this one's
        model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
    if kept is not None:
        kept.write(folder)
    text = json.dumps(provenance, indent=2, allow_nan=False) + "\n"
    (folder / PROVENANCE).write_text(text, encoding="utf-8")
    # safetensors lets only its owner read a file; a student is as readable as the rest of its directory
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _check_reload(model: PreTrainedModel, folder: Path, seq_len: int) -> None:
    loaded = load_model(folder, with_mlm_head=encoder_of(model) is not model)
    if loaded.missing or loaded.unexpected:
        raise StudentError(
            f"the student written to {str(folder)!r} loads with missing weights {sorted(loaded.missing)!r} and "
            f"unexpected ones {sorted(loaded.unexpected)!r}: it would not be the network that was trained; please "
            f"report this with the family {model.config.model_type!r} and the Transformers version"
        )
    difference = _difference(model, loaded.model, seq_len)
    allowed = _DIFFERENCE.get(model.dtype, _FLOAT32_DIFFERENCE)
    if not difference <= allowed:
        raise StudentError(
            f"the student written to {str(folder)!r} loads and computes something else than the one that was trained: "
            f"its vectors differ by {difference:.2g} of their length, where arithmetic makes {allowed:.2g} at most; "
            f"please report this with the family {model.config.model_type!r} and the Transformers version"
        )


def _difference(trained: PreTrainedModel, loaded: PreTrainedModel, seq_len: int) -> float:
    """The largest distance of a final state, or of the logits at a position, as a share of its length, on one row.

    Raises:
        StudentError: the loaded one does not run.
    """
    length = min(_COMPARED, seq_len)
    try:
        ours = _vectors(trained, length)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        # some families read rows of certain lengths only; this one they have been trained on
        length = seq_len
        ours = _vectors(trained, length)
    try:
        theirs = _vectors(nn.Module.to(loaded, trained.device), length)
    except Exception as error:
        raise StudentError(
            f"the exported student does not run where the trained one does ({type(error).__name__}: "
            f"{first_line(error)}); please report this with the family {trained.config.model_type!r} and the "
            "Transformers version"
        ) from error
    return max(map(_distance, ours, theirs))


def _distance(ours_TD: Tensor, theirs_TD: Tensor) -> float:
    if not torch.equal(ours_TD.isnan(), theirs_TD.isnan()):
        return float("inf")
    ours_TD, theirs_TD = ours_TD.nan_to_num(), theirs_TD.nan_to_num()
    share_T = (ours_TD - theirs_TD).norm(dim=1) / ours_TD.norm(dim=1).clamp_min(1e-30)
    return float(share_T.max())


@torch.no_grad()
def _vectors(model: PreTrainedModel, length: int) -> list[Tensor]:
    """Final states and, where there is a head, logits at all positions of one row."""
    base, training = encoder_of(model), model.training
    ids_1T: Tensor = torch.arange(length, device=model.device)[None] * 7919 % model.config.vocab_size
    nn.Module.eval(model)
    try:
        # not through the call: a compiled student would be compiled anew for this row
        arguments = forward_arguments(model, torch.ones_like(ids_1T, dtype=torch.bool))
        final_TD = base.forward(input_ids=ids_1T, **arguments).last_hidden_state[0]
        found = [final_TD] if base is model else [final_TD, LMHead(model)(final_TD)]
    finally:
        nn.Module.train(model, training)
    return [each.double() for each in found]
