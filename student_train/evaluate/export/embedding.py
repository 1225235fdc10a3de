"""The files by which sentence-transformers loads a student, and how alike student and teacher embed.

The folder of a teacher that embeds sentences says in modules.json what follows its encoder: pooling, normalising, a
dense layer. A store keeps the encoder and its tokenizer alone, so these come from the teacher's own folder. The
student's are the teacher's, at the student's width. Its longest sentence is the teacher's, as far as the student reads
it: not a row of the training.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from safetensors.torch import save_file

from student_train.evaluate.export.source import Source
from teacher_cache.errors import StudentError, first_line
from teacher_cache.hub import HUB_ERRORS
from teacher_cache.models.families import quiet_transformers
from teacher_cache.outside import parse_json

MODULES, SENTENCES, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
LEAST_SENTENCES, MOST_SENTENCES = 8, 256
INSTALL = "pip install 'kdcache[sentence-transformers]'"
_ENDS = re.compile(r"(?<=[.!?])\s+")
_PASSED_ON = ("prompts", "default_prompt_name", "similarity_fn_name")
_WIDTHS = ("word_embedding_dimension", "embedding_dimension")
"""What a pooling's configuration calls the width of the encoder, in versions of the library."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Embeddings of sentences by student and teacher; `held_out` where they are known to be so from the training.

    `cosine` is the mean cosine of the two embeddings of a sentence, None where their widths differ. `correlation` is
    that of the cosines of all pairs of sentences, `error` the mean absolute difference of these cosines.
    """

    sentences: int
    cosine: float | None
    correlation: float
    error: float
    held_out: bool = False


def embedding_folder(asked: str | None, recorded: str | None) -> Path | None:
    """The folder of a teacher that embeds sentences; None where none is asked for, and the recorded one is none.

    Raises:
        StudentError: what is asked for cannot be had, or is no such teacher.
    """
    if asked is None:
        # without what --teacher asks for nothing is wrong, and nothing is fetched
        local = None if recorded is None else Path(recorded).expanduser()
        return local if local is not None and (local / MODULES).is_file() else None
    folder = Path(asked).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(asked))
        except HUB_ERRORS as error:
            raise StudentError(
                f"--teacher {asked!r} is no folder and cannot be had from the hub ({first_line(error)}): its pooling "
                "cannot be taken over; give the teacher's folder, or leave --teacher out for an export of the encoder "
                "alone"
            ) from error
    if not (folder / MODULES).is_file():
        raise StudentError(
            f"--teacher {asked!r} has no {MODULES}: it is no model of sentence-transformers, and how its tokens become "
            "one embedding is not said; give a teacher that embeds sentences, or leave --teacher out"
        )
    return folder


def write_embedding(source: Source, teacher: Path, folder: Path) -> int:
    """Write the files beside the student's own; returns how many tokens of a sentence are read.

    Raises:
        StudentError: the teacher's files cannot be read, or its embedding does not fit the student.
    """
    if source.kind.pipeline not in ("feature-extraction", "fill-mask"):
        raise StudentError(
            f"student {str(source.folder)!r} is for {source.kind.pipeline}: the pooling of --teacher {str(teacher)!r} "
            "makes embeddings of an encoder; leave --teacher out"
        )
    modules = _read(teacher / MODULES, list)
    settings: dict[str, Any] = {}
    for module in modules:
        _take_over(module, source, teacher, folder)
        if _kind(module) == "Transformer":
            settings |= _settings_in(teacher / module["path"])
            # older versions of the library kept the encoder in a folder of its own: here it lies beside the card
            module["path"] = ""
    _write(folder / MODULES, modules)
    asked, reads = settings.get("max_seq_length"), source.positions
    longest = min(asked, reads) if isinstance(asked, int) and reads is not None else asked or reads
    _write(folder / SENTENCES, {"max_seq_length": longest, "do_lower_case": settings.get("do_lower_case") is True})
    prompts = _read(teacher / PROMPTS, dict) if (teacher / PROMPTS).exists() else {}
    _write(folder / PROMPTS, {name: prompts[name] for name in _PASSED_ON if name in prompts})
    return int(longest or 0)


def _take_over(module: Any, source: Source, teacher: Path, folder: Path) -> None:
    if not isinstance(module, dict) or not all(isinstance(module.get(name), str) for name in ("path", "type")):
        raise _unreadable(teacher / MODULES, f"an entry is {str(module)[:80]!r}")
    kind, place = _kind(module), module["path"]
    if kind not in ("Transformer", "Pooling", "Normalize", "Dense") or not _is_inside(place):
        raise StudentError(
            f"{str(teacher / MODULES)!r} names {module['type']!r} in {place!r}: only Transformer, Pooling, Normalize "
            "and Dense can be taken over to another encoder; leave --teacher out for an export of the encoder alone"
        )
    if kind in ("Transformer", "Normalize"):
        return
    (folder / place).mkdir()
    config = _read(teacher / place / "config.json", dict)
    width = source.model.config.hidden_size
    if kind == "Pooling":
        _write(folder / place / "config.json", {**config, **{name: width for name in _WIDTHS if name in config}})
        return
    if config.get("in_features") != width:
        raise StudentError(
            f"the embedding of --teacher {str(teacher)!r} ends in a dense layer that reads "
            f"{config.get('in_features')!r} numbers, and the student has {width}: the layer means nothing to it; "
            "train a student of that width, or leave --teacher out"
        )
    _write(folder / place / "config.json", config)
    _copy_weights(teacher / place, folder / place)


def _kind(module: Any) -> str:
    """`Transformer` of a module of whichever version of the library."""
    return str(module["type"].rpartition(".")[2])


def _settings_in(folder: Path) -> dict[str, Any]:
    """What an encoder's folder says of sentences; some versions of the library put its family into the file's name."""
    files = (folder / SENTENCES, *sorted(folder.glob("sentence_*_config.json")))
    file = next(filter(Path.exists, files), None)
    return {} if file is None else dict(_read(file, dict))


def _copy_weights(layer: Path, copy: Path) -> None:
    if (layer / "model.safetensors").exists():
        shutil.copyfile(layer / "model.safetensors", copy / "model.safetensors")
        return
    try:
        state = torch.load(layer / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except Exception as error:
        # a pickle of anybody's
        raise _unreadable(layer / "pytorch_model.bin", first_line(error)) from error
    save_file(state, copy / "model.safetensors")


def missing_package() -> bool:
    """Whether sentence-transformers is not installed."""
    return importlib.util.find_spec("sentence_transformers") is None


def sentences_of(texts: Sequence[str]) -> list[str]:
    """Sentences of a length to compare, in order, each once."""
    found = [sentence.strip() for text in texts for sentence in _ENDS.split(text)[1:-1]]
    return [each for each in dict.fromkeys(found) if 4 <= len(each.split()) <= 60][:MOST_SENTENCES]


def check_embeds(folder: Path) -> None:
    """Load a folder that was written, and embed with it.

    Raises:
        StudentError: that cannot be done.
    """
    _embed(folder, ["A sentence."])


def compare_embeddings(student: Path, teacher: Path, sentences: Sequence[str]) -> Similarity:
    """Load both folders with sentence-transformers, and compare what they make of the sentences, 8 or more.

    Raises:
        StudentError: one of them cannot be loaded or run.
    """
    found = [_embed(folder, sentences) for folder in (student, teacher)]
    ours, theirs = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in found)
    upper = np.triu_indices(len(sentences), 1)
    pairs = [(each @ each.T)[upper] for each in (ours, theirs)]
    return Similarity(
        sentences=len(sentences),
        cosine=float((ours * theirs).sum(1).mean()) if ours.shape == theirs.shape else None,
        correlation=float(np.corrcoef(*pairs)[0, 1]),
        error=float(np.abs(pairs[0] - pairs[1]).mean()),
    )


def _embed(folder: Path, sentences: Sequence[str]) -> NDArray[np.float64]:
    try:
        from sentence_transformers import SentenceTransformer

        with quiet_transformers():
            model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        return np.asarray(model.encode(list(sentences), show_progress_bar=False), np.float64)
    except Exception as error:
        # a library that lays no errors down
        raise StudentError(
            f"sentence-transformers cannot embed with {folder.name!r} ({type(error).__name__}: "
            f"{first_line(error)}): the export would not be what its card says; leave --teacher out, or mend the "
            "teacher's folder"
        ) from error


def _is_inside(place: str) -> bool:
    return re.fullmatch(r"[\w.-]*", place) is not None and place not in (".", "..")


def _read(file: Path, kind: type[Any]) -> Any:
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(file, first_line(error)) from error
    if not isinstance(content, kind):
        raise _unreadable(file, f"it holds {str(content)[:60]!r}")
    return content


def _unreadable(file: Path, why: str) -> StudentError:
    return StudentError(
        f"{str(file)!r} cannot be read as sentence-transformers writes it ({why}): how the teacher embeds cannot be "
        "told; restore it, or leave --teacher out"
    )


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
