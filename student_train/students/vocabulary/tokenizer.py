"""A tokenizer with fewer ids: the pieces that are kept, numbered anew, and everything that names an id after them.

In: a tokenizer of Transformers that stands on the tokenizers library, and the kept ids. Out: another one, which has
been written and read as anyone would read it. Special tokens, the post-processor and padding follow. Cost: its files
are written to a temporary folder and read again, one to two seconds for 250,000 ids.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.needed import Description, piece_ids
from teacher_cache.errors import StudentError, first_line
from teacher_cache.models.families import quiet_transformers
from teacher_cache.models.tokenizers import read_tokenizer

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


def description_of(tokenizer: Any, name: str) -> dict[str, Any]:
    """What a tokenizer is, as the tokenizers library describes it.

    Raises:
        StudentError: it does not stand on that library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise StudentError(
            f"the tokenizer of {name!r} is a slow one ({type(tokenizer).__name__}), written in Python: what it needs "
            "of its vocabulary cannot be seen; save it as a fast one (tokenizer.json) first, or leave the vocabulary "
            "whole"
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def trim_tokenizer(tokenizer: Any, kept: KeptIds, name: str) -> Any:
    """The same tokenizer with the kept ids alone.

    Raises:
        StudentError: it is a slow one, or its class makes something else of the files when it reads them.
    """
    description = trimmed_description(description_of(tokenizer, name), kept)
    with tempfile.TemporaryDirectory(prefix="kdcache-tokenizer-") as temporary, quiet_transformers():
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        for file in {*getattr(tokenizer, "vocab_files_names", {}).values()} - {_FILE}:
            # vocabularies in an older form would have all ids
            (folder / file).unlink(missing_ok=True)
        (folder / "added_tokens.json").unlink(missing_ok=True)
        (folder / _FILE).write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if isinstance(config.get("added_tokens_decoder"), Mapping):
            config["added_tokens_decoder"] = {
                str(own): token
                for key, token in config["added_tokens_decoder"].items()
                if (own := kept.own(int(key))) is not None
            }
            (folder / _CONFIG).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        try:
            trimmed = read_tokenizer(folder, local_files_only=True)
        except Exception as error:
            # the tokenizers library raises nothing more special
            raise _spoilt(name, f"{type(error).__name__}: {first_line(error)}") from error
    expected = {token: own for token, old in tokenizer.get_vocab().items() if (own := kept.own(old)) is not None}
    differing = dict(trimmed.get_vocab().items() ^ expected.items())
    if differing:
        raise _spoilt(name, f"{len(differing)} tokens such as {min(differing)!r} have other ids")
    return trimmed


def _spoilt(name: str, why: str) -> StudentError:
    return StudentError(
        f"the tokenizer of {name!r} cannot be read again with fewer ids ({why}): its class reads its files in a way of "
        "its own; leave the vocabulary whole, and please report this with the family and the Transformers version"
    )


def trimmed_description(description: Description, kept: KeptIds) -> dict[str, Any]:
    """What the tokenizer is with the kept ids alone."""
    found = {**description, "model": _model(description["model"], kept)}
    found["added_tokens"] = [
        {**token, "id": own} for token in description["added_tokens"] if (own := kept.own(token["id"])) is not None
    ]
    if description.get("post_processor") is not None:
        found["post_processor"] = _post_processor(description["post_processor"], kept)
    padding = description.get("padding")
    if padding is not None:
        found["padding"] = {**padding, "pad_id": kept.own(padding["pad_id"]) or 0}
    return found


def _model(model: Mapping[str, Any], kept: KeptIds) -> dict[str, Any]:
    vocabulary, found = model["vocab"], dict(model)
    if isinstance(vocabulary, list):
        found["vocab"] = [vocabulary[old] for old in kept.ids_K.tolist() if old < len(vocabulary)]
        found["unk_id"] = kept.own(model["unk_id"])
        return found
    tokens = {piece: own for piece, old in piece_ids(model).items() if (own := kept.own(old)) is not None}
    found["vocab"] = tokens
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        found["merges"] = [
            [first, second]
            for first, second in model["merges"]
            if first in tokens and second in tokens and first + second.removeprefix(prefix) in tokens
        ]
    return found


def _post_processor(processor: Mapping[str, Any], kept: KeptIds) -> dict[str, Any]:
    found = dict(processor)
    if "processors" in found:
        found["processors"] = [_post_processor(each, kept) for each in found["processors"]]
    for name in ("sep", "cls"):
        if isinstance(found.get(name), list):
            token, old = found[name]
            found[name] = [token, kept.own(old)]
    if isinstance(found.get("special_tokens"), Mapping):
        found["special_tokens"] = {
            token: {**each, "ids": [kept.own(old) for old in each["ids"]]}
            for token, each in found["special_tokens"].items()
        }
    return found
