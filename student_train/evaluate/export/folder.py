"""The model's own files of an export: weights, configuration, tokenizer, and of what generates, how it begins and ends.

In: a `Source`. Out: files in a folder, none of which names a place on this machine. Weights are copied byte for byte
where they are safetensors; pickled ones, which can run code on whoever loads them, are written anew. The tokenizer
reads as much as the model: what it cuts off, users would lose in silence.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from student_train.evaluate.export.source import Source, load_whole
from student_train.evaluate.load import weight_files
from teacher_cache.errors import StudentError, first_line
from teacher_cache.models.families import quiet_transformers
from teacher_cache.outside import parse_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNBOUNDED = int(1e30)
"""What Transformers writes as the longest text of a model that nothing limits."""
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_NAMES_OF_PLACES = ("_name_or_path", "name_or_path")
_OF_OTHER_CALLS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")
"""What a tokenizer keeps of how it was last called and loaded: nothing that others should inherit."""
_PART = r"[^\s\\/](?:[^\\/\r\n\t]*[^\s\\/])?"
_PLACE = re.compile(
    rf"(?:(?:file:[\\/]*|[A-Za-z]:[\\/]+|[\\/]{{1,2}}){_PART}|~[^\s\\/]*)[\\/]+(?:{_PART}[\\/]+)*(?:{_PART})?"
)
"""An absolute path of two parts or more, or one from somebody's home; there may be spaces within its parts."""
_WORDS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "id2label", "label2id")
"""Entries of a configuration whose texts are tokens and labels, whatever they look like."""


def write_model(source: Source, folder: Path) -> list[str]:
    """Write the model's files; returns notes on what was changed in them.

    Raises:
        StudentError: a file of the student cannot be read.
    """
    _write_weights(source, folder)
    _copy_config(source.folder / "config.json", folder / "config.json")
    if source.kind.pipeline == "text-generation":
        _write_generation(source, folder)
    notes = list(_write_tokenizer(source, folder))
    for name in _CONFIGS:
        if (folder / name).exists():
            left_out = _drop_places(folder / name)
            notes += [f"{name}: {key!r} named a place on this machine and was left out" for key in left_out]
    return notes


def check_loads(source: Source, folder: Path) -> None:
    """Load what was written as any user would.

    Raises:
        StudentError: it is not the student.
    """
    loaded = load_whole(folder, source.kind)
    ours, theirs = source.model.state_dict(), loaded.state_dict()
    wrong = [name for name in ours if name not in theirs or not ours[name].equal(theirs[name])]
    if wrong:
        raise StudentError(
            f"the export of {str(source.folder)!r} loads with other weights, {wrong[0]!r} among them: please report "
            f"this with the family {loaded.config.model_type!r} and the Transformers version"
        )


def _write_weights(source: Source, folder: Path) -> None:
    for file in _published(source.folder):
        if not file.is_file():
            raise StudentError(
                f"{str(file)!r} is missing, and weights are in it: restore it, or train the student anew"
            )
        shutil.copyfile(file, folder / file.name)
    if not any(folder.iterdir()):
        with quiet_transformers():
            load_whole(source.folder, source.kind, dtype="auto").save_pretrained(folder, max_shard_size="1TB")


def _published(folder: Path) -> list[Path]:
    """The safetensors files that make the model, others that may lie beside them left out."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        return [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    try:
        names = {str(name) for name in parse_json((folder / INDEX).read_bytes())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StudentError(
            f"{str(folder / INDEX)!r} cannot be read ({first_line(error)}): which files hold the weights cannot be "
            "told; restore it"
        ) from error
    return [folder / INDEX, *(folder / Path(name).name for name in sorted(names))]


def _copy_config(file: Path, copy: Path) -> None:
    # as it is: read and written by Transformers, it would have all defaults of this version in it
    shutil.copyfile(file, copy)


def _write_generation(source: Source, folder: Path) -> None:
    try:
        settled = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError, TypeError):
        settled = GenerationConfig.from_model_config(source.model.config)
    settled.save_pretrained(folder)


def _write_tokenizer(source: Source, folder: Path) -> Iterator[str]:
    tokenizer = source.read_tokenizer()
    before = tokenizer.model_max_length
    tokenizer.model_max_length = source.positions or UNBOUNDED
    # its arguments say what is saved, and the attribute with which value
    tokenizer.init_kwargs["model_max_length"] = tokenizer.model_max_length
    for name in _OF_OTHER_CALLS:
        tokenizer.init_kwargs.pop(name, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # of whoever used it last: programs that read tokenizer.json alone would cut every text there
        backend.no_truncation()
        backend.no_padding()
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    if before != tokenizer.model_max_length and before < UNBOUNDED:
        longest = "any length" if source.positions is None else f"{source.positions} tokens"
        yield f"the tokenizer reads {longest}, as the student does; the student's own stops at {before}"


def _drop_places(file: Path) -> list[str]:
    """Leave out the entries of a configuration that name a place on a machine; their names."""
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StudentError(f"{file.name!r} of the student cannot be read ({error}): restore it") from error
    left_out: list[str] = []
    kept = _without_places(content, left_out)
    if kept != content:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return left_out


def _without_places(content: Any, left_out: list[str], within: str = "") -> Any:
    """An object or a list without what names a place, however deep; the keys that lead there go to `left_out`."""
    if isinstance(content, list):
        return list(_without_places(dict(enumerate(content)), left_out, within).values())
    kept = {}
    for key, value in content.items():
        if isinstance(value, str) and _PLACE.fullmatch(value) and not str(key).endswith("_token"):
            left_out.append(f"{within}{key}")
        elif isinstance(value, (dict, list)) and key not in _WORDS:
            kept[key] = _without_places(value, left_out, f"{within}{key}.")
        elif key not in _NAMES_OF_PLACES:
            kept[key] = value
    return kept
