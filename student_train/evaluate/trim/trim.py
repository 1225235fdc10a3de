"""A finished student with fewer ids: `kdeval trim`.

In: a model folder and a text. Out: a folder with the same model, whose embedding, head and tokenizer have the kept ids
alone. Both models are run on a row of kept ids before anything is written: they must give the same states and, over
the kept ids, the same logits. Cost: two models in memory, and the text is tokenised three times.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from student_train.evaluate.trim.records import ModelSize, TrimReport
from student_train.evaluate.trim.settings import TrimSettings
from student_train.run_files import PROVENANCE, run_provenance
from student_train.students.pretrained import check_family, load_config
from student_train.students.vocabulary.keep import keep_ids
from student_train.students.vocabulary.kept_ids import KeptIds, read_kept_ids
from student_train.students.vocabulary.text import compare_pieces, count_text, covering
from student_train.students.vocabulary.tokenizer import trim_tokenizer
from student_train.students.vocabulary.weights import trim_weights
from teacher_cache.disk import flush_to_disk, system_error_number
from teacher_cache.errors import SettingsError, StudentError, first_line
from teacher_cache.models.families import encoder_of, pooler_option, quiet_transformers
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.models.tokenizers import read_tokenizer
from teacher_cache.outside import parse_record

_COMPARED = 32
_DIFFERENCE = 1e-3
"""What arithmetic may make of a vector, as a share of its length; another row of a table makes all of it."""
_HALF_DIFFERENCE = 0.05


@dataclass(frozen=True, kw_only=True)
class TrimmedStudent:
    """A model with fewer ids in memory. `kept` are ids of the first teacher, not of a student that had fewer."""

    model: PreTrainedModel
    tokenizer: Any
    kept: KeptIds
    provenance: Mapping[str, Any] | None
    report: TrimReport

    def write(self, out: Path) -> TrimReport:
        """Write the folder, whole or not at all; the report with its size.

        Raises:
            OSError: it cannot be written.
        """
        unfinished = out.with_name(f".{out.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            self._fill(unfinished)
            report = replace(self.report, after=replace(self.report.after, bytes=_bytes_of(unfinished)))
            for file in [*unfinished.rglob("*"), unfinished]:
                flush_to_disk(file)
            unfinished.replace(out)
            flush_to_disk(out.absolute().parent)
        except SafetensorError as error:
            raise OSError(system_error_number(error), first_line(error)) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return report

    def _fill(self, folder: Path) -> None:
        with quiet_transformers():
            self.model.save_pretrained(folder, max_shard_size="1TB")
            self.tokenizer.save_pretrained(folder)
        self.kept.write(folder)
        if self.provenance is not None:
            text = json.dumps(self.provenance, indent=2, allow_nan=False) + "\n"
            (folder / PROVENANCE).write_text(text, encoding="utf-8")
        # safetensors lets only its owner read a file
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def trim_student(
    settings: TrimSettings, documents: Callable[[], Iterable[str]], *, show: Callable[[str], None]
) -> TrimmedStudent:
    """Cut a student's vocabulary; nothing is written yet.

    Args:
        settings: the flags.
        documents: gives the text from its beginning, each time the same.
        show: is told what is being done.

    Raises:
        StudentError: the model or its tokenizer cannot be loaded, or is of a kind that cannot be cut.
        SettingsError: the text uses next to nothing.
    """
    folder = Path(settings.student).expanduser()
    if not folder.is_dir():
        raise StudentError(
            f"there is no student directory {settings.student!r}: nothing can be trimmed; give --student the directory "
            "that kdtrain wrote (its --out) or any Hugging Face model directory"
        )
    check_family(folder)
    config, earlier = load_config(folder), read_kept_ids(folder)
    tokenizer = _tokenizer(folder, config)
    show("reading the text")
    counts_V = count_text(tokenizer, documents(), config.vocab_size)
    used = covering(counts_V, settings.coverage)
    kept = keep_ids(tokenizer, counts_V, used, config, folder, settings.student)
    show(f"cutting {config.vocab_size:,} ids to {len(kept):,}")
    trimmed = trim_tokenizer(tokenizer, kept, settings.student)
    model, make = _load(folder, config)
    small = trim_weights(model, kept, make)
    _check_same(model, small, kept, settings.student)
    show("comparing the pieces of the text")
    differences = compare_pieces(tokenizer, trimmed, kept, documents())
    whole = kept if earlier is None else earlier.of_kept(kept)
    report = TrimReport(
        student=settings.student,
        out=settings.out,
        text=settings.text,
        coverage=settings.coverage,
        tokens=int(counts_V.sum()),
        used=len(used),
        before=_size(model, _bytes_of(folder)),
        after=_size(small, 0),
        pieces=differences.to_json(),
        notes=(f"the text has {differences}",),
    )
    return TrimmedStudent(
        model=small,
        tokenizer=trimmed,
        kept=whole,
        provenance=_provenance(folder, whole, report),
        report=report,
    )


def _tokenizer(folder: Path, config: PreTrainedConfig) -> Any:
    try:
        with quiet_transformers():
            tokenizer = read_tokenizer(folder, config, local_files_only=True)
    except Exception as error:
        # the tokenizers library raises nothing more special
        raise StudentError(
            f"the tokenizer in {str(folder)!r} cannot be read ({type(error).__name__}: {first_line(error)}): which ids "
            "a text uses cannot be told; restore its files"
        ) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        # Transformers makes up an empty tokenizer where the files are missing
        raise StudentError(
            f"the tokenizer in {str(folder)!r} knows no words, as where its files are missing: which ids a text uses "
            "cannot be told; copy the tokenizer files of the model that the student comes from into the directory"
        )
    return tokenizer


def _load(
    folder: Path, config: PreTrainedConfig
) -> tuple[PreTrainedModel, Callable[[PreTrainedConfig], PreTrainedModel]]:
    """The model in the folder with all of its heads, in its own number type, and what makes another one like it."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    known = isinstance(named, type) and issubclass(named, PreTrainedModel)
    loader: Any = named if known else AutoModel
    # the family's base model may have been written without its pooler, which is nothing that could be trained
    poolers = (
        pooler_option(config)
        if config.architectures == [getattr(MODEL_MAPPING[type(config)], "__name__", None)]
        else {}
    )
    for options in ({}, poolers):
        try:
            with quiet_transformers():
                model, found = loader.from_pretrained(
                    folder,
                    config=config,
                    dtype="auto",
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
        except Exception as error:
            # a file of anybody's: what is wrong with it shows in many ways
            raise StudentError(
                f"the model in {str(folder)!r} cannot be loaded ({type(error).__name__}: {first_line(error)}): there "
                "is nothing to trim; give a folder with config.json and model.safetensors"
            ) from error
        if not found["missing_keys"] and not found["unexpected_keys"]:
            kind: Any = type(model)
            nn.Module.eval(model)
            return model, partial(kind, **options)
    raise StudentError(
        f"{str(folder)!r} has other weights than its architecture {config.architectures!r}: missing are "
        f"{sorted(found['missing_keys'])[:3]!r}, left over {sorted(found['unexpected_keys'])[:3]!r}; random numbers "
        "would be written in their place; give the folder of a complete model"
    )


@torch.no_grad()
def _check_same(model: PreTrainedModel, small: PreTrainedModel, kept: KeptIds, name: str) -> None:
    own_1T = torch.arange(_COMPARED)[None] * 7919 % len(kept)
    ours, theirs = _outputs(model, kept.ids_K[own_1T]), _outputs(small, own_1T)
    if len(ours) > 1:
        ours[1] = ours[1][:, kept.ids_K]
    allowed = _DIFFERENCE if model.dtype == torch.float32 else _HALF_DIFFERENCE
    for one, other in zip(ours, theirs, strict=True):
        difference = float(((one - other).norm(dim=1) / one.norm(dim=1).clamp_min(1e-30)).max())
        if not difference <= allowed:
            raise StudentError(
                f"{name!r} computes something else with fewer ids: its vectors differ by {difference:.2g} of their "
                f"length, where arithmetic makes {allowed:.2g} at most; please report this with the family "
                f"{model.config.model_type!r} and the Transformers version"
            )


def _outputs(model: PreTrainedModel, ids_1T: Tensor) -> list[Tensor]:
    """Final states [T, D] and, where there is a head over the vocabulary, logits [T, V] of a row."""
    nn.Module.eval(model)
    base = encoder_of(model)
    arguments = forward_arguments(base, torch.ones_like(ids_1T, dtype=torch.bool))
    found = [base(input_ids=ids_1T, **arguments).last_hidden_state[0].double()]
    if base is not model and model.get_output_embeddings() is not None:
        found.append(model(input_ids=ids_1T, **arguments).logits[0].double())
    return found


def _size(model: PreTrainedModel, size: int) -> ModelSize:
    return ModelSize(
        ids=model.config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding=sum(parameter.numel() for parameter in model.get_input_embeddings().parameters()),
        bytes=size,
    )


def _bytes_of(folder: Path) -> int:
    names = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"), *folder.glob("tokenizer*.json"))
    return sum(file.stat().st_size for file in names)


def _provenance(folder: Path, kept: KeptIds, report: TrimReport) -> Mapping[str, Any] | None:
    """The student's own, with what was kept; None where it has none, as that of any model."""
    file = folder / PROVENANCE
    if not file.exists():
        return None
    try:
        found = parse_record(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{str(file)!r} cannot be read ({error}): where the student comes from would be lost; restore the file, or "
            "delete it to go without"
        ) from error
    record = {
        "choice": f"kdeval trim --coverage {report.coverage:g}",
        "kept": len(kept),
        "of": kept.teacher_entries,
        "sha256": kept.sha256,
        "pieces": dict(report.pieces),
        "trimmed": run_provenance(),
    }
    return {**found, "vocabulary": record}
