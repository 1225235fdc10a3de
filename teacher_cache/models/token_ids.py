"""The ids that the files of a tokenizer give to tokens, compared with how many ids there are before it is loaded.

The libraries believe an id: they make room for all below it, so that one number in a file of a few kilobytes can take
gigabytes. The standard library is enough to tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def check_token_ids(files: Iterable[Path], entries: int) -> None:
    """Check that every id that these files of a tokenizer give to a token is below `entries`; other files are ignored.

    Raises:
        ValueError: one is not, or a file cannot be read; the message begins with the name of the file.
    """
    for path in sorted(files):
        if path.name not in _FILES:
            continue
        try:
            fields = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name} is no JSON ({type(error).__name__}: {error})") from error
        for what, token_id in _FILES[path.name](fields) if isinstance(fields, dict) else ():
            if type(token_id) is not int or not 0 <= token_id < entries:
                raise ValueError(
                    f"{path.name} gives {what} the id {repr(token_id)[:40]}: ids are whole numbers from 0 to "
                    f"{entries - 1}"
                )


def _of_tokenizer(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    model = fields.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # of unigrams there is a list, whose places are the ids
    yield from _of_vocabulary(vocabulary if isinstance(vocabulary, dict) else {})
    added = fields.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and "id" in token:
            yield f"the added token {str(token.get('content'))[:40]!r}", token["id"]


def _of_vocabulary(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for token, token_id in fields.items():
        yield f"the token {token[:40]!r}", token_id


def _of_configuration(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    added = fields.get("added_tokens_decoder")
    for key, token in added.items() if isinstance(added, dict) else ():
        content = token.get("content") if isinstance(token, dict) else token
        written = len(key) < 20 and key.isascii() and key.isdecimal()
        yield f"the added token {str(content)[:40]!r}", int(key) if written else key


_FILES = {
    "tokenizer.json": _of_tokenizer,
    "vocab.json": _of_vocabulary,
    "added_tokens.json": _of_vocabulary,
    "tokenizer_config.json": _of_configuration,
}
