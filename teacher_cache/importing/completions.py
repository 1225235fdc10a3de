"""What an OpenAI-like server answers for a completion with `echo` and `logprobs` -> rows.

`logprobs` holds, for T tokens, `tokens` as text, `token_logprobs`, and `top_logprobs`, a mapping of texts to
log-probabilities each. Entry t is that of token t given those before it, and the first is null: what is kept after
position t - 1 is entry t (https://platform.openai.com/docs/api-reference/completions; vLLM, llama.cpp and others give
the same). A text is an id only where one token alone is written so: servers that can say ids do (`token_id:123`, which
vLLM calls return_tokens_as_token_ids), and where a row's ids stand beside it they count. A listed text that several
tokens share is left out, and its mass is in the tail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SourceError
from teacher_cache.importing.files import Record
from teacher_cache.importing.source import SourceRow, refuse
from teacher_cache.importing.values import gather, has_ids, read_ids, to_id

_ID = "token_id:"
_SAME = 1e-3
"""How far two values that a server gives of one log-probability may be apart."""


class TokenTexts:
    """The ids that texts may stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.shared = 0
        """How many listed texts were left out, because several tokens are written so."""

    @cached_property
    def _ids(self) -> Mapping[str, set[int]]:
        found = defaultdict(set)
        for piece, number in self._tokenizer.get_vocab().items():
            # some servers keep the space of a piece of SentencePiece and others lose it in decoding, and a piece of
            # bytes is no text before it: a token may be written in each of these ways
            for text in (piece, piece.replace("▁", " "), self._tokenizer.decode([number])):
                found[text].add(number)
        return found

    def read(self, text: Any, where: str) -> set[int]:
        """The ids that a text may stand for, at least one.

        Raises:
            SourceError: it stands for none.
        """
        if isinstance(text, str) and text.startswith(_ID) and text.removeprefix(_ID).isdecimal():
            return {to_id(text.removeprefix(_ID), where)}
        found = self._ids.get(text) if isinstance(text, str) else None
        if not found:
            raise SourceError(
                f"{where}: {text!r:.60} is no token of the tokenizer: which id it is cannot be told; give the "
                "tokenizer of the model that answered, or ask the server for ids (return_tokens_as_token_ids)"
            )
        return found


def is_completion(record: Record) -> bool:
    """Whether a record is of this shape."""
    return {"tokens", "top_logprobs"} <= _logprobs_of(record).keys()


def read_completion(record: Record, texts: TokenTexts, where: str) -> SourceRow:
    """The row of one completion.

    Raises:
        SourceError: it is not what such a server answers.
    """
    listed = _logprobs_of(record)
    tokens, own_of, tops = (_list(listed, name, where) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not len(tokens) == len(own_of) == len(tops):
        refuse(
            where,
            f"{len(tokens)} 'tokens', {len(own_of)} 'token_logprobs' and {len(tops)} 'top_logprobs': which belong "
            "together cannot be told; give as many of each",
        )
    if tops and tops[0]:
        refuse(
            where,
            "the first of 'top_logprobs' is not null: what came before that token is not there, as where only the "
            "answer is; ask the server with echo, which returns the prompt too",
        )
    input_ids_T = _ids(record, tokens, texts, where)
    entries = []
    for token, (own, top) in enumerate(zip(own_of, tops, strict=True)):
        if top:
            found = _read_top(top, texts, f"{where}, entry {token}")
            _check_own(found, int(input_ids_T[token]), own, f"{where}, entry {token}")
            if found:
                entries.append((token - 1, len(found), list(found), list(found.values())))
    return SourceRow(input_ids_T=input_ids_T, distributions=gather(entries))


def _logprobs_of(record: Record) -> Record:
    inside = record.get("logprobs")
    return inside if isinstance(inside, Mapping) else record


def _list(listed: Record, name: str, where: str) -> Sequence[Any]:
    values = listed.get(name)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise SourceError(f"{where}: {name!r} is a {type(values).__name__} where a list should be")
    return values


def _ids(record: Record, tokens: Sequence[Any], texts: TokenTexts, where: str) -> NDArray[np.int64]:
    """The ids of a row: those that are given, or those that its texts stand for."""
    if has_ids(record):
        ids_T = read_ids(record, where)
        if len(ids_T) != len(tokens):
            refuse(where, f"{len(ids_T)} ids for {len(tokens)} 'tokens': give as many, those of the answer included")
        return ids_T
    found = [texts.read(text, f"{where}, token {number}") for number, text in enumerate(tokens)]
    shared = next((number for number, ids in enumerate(found) if len(ids) > 1), None)
    if shared is not None:
        refuse(
            f"{where}, token {shared}",
            f"{tokens[shared]!r:.60} may be any of {len(found[shared])} tokens that are written so: the row's ids are "
            "not known; ask the server for ids (return_tokens_as_token_ids), or give them as input_ids",
        )
    return np.array([ids.pop() for ids in map(set, found)], dtype=np.int64)


def _read_top(top: Any, texts: TokenTexts, where: str) -> dict[int, float]:
    if not isinstance(top, Mapping | list):
        refuse(where, f"{top!r:.60} is no mapping of texts to log-probabilities; give what the server returns")
    pairs = top.items() if isinstance(top, Mapping) else top
    found: dict[int, float] = {}
    for pair in pairs:
        text, log_prob = pair if isinstance(pair, tuple) and len(pair) == 2 else (pair, None)
        if type(log_prob) not in (float, int):
            refuse(where, f"{text!r:.60} has {log_prob!r:.60} for a log-probability; give what the server returns")
        ids = texts.read(text, where)
        if len(ids) > 1:
            texts.shared += 1
            continue
        (number,) = ids
        if number in found:
            refuse(where, f"id {number} is listed twice: which of its probabilities counts is not said")
        found[number] = float(log_prob)  # type: ignore[arg-type]
    return found


def _check_own(found: Mapping[int, float], own_id: int, own: Any, where: str) -> None:
    """A token that is among the listed has one log-probability, which stands in both lists."""
    there = found.get(own_id)
    if there is None or type(own) not in (float, int):
        return
    if abs(there - own) > _SAME * max(1.0, abs(own)):
        refuse(
            where,
            f"'token_logprobs' has {own:g} for token {own_id}, and 'top_logprobs' {there:g}: entries and tokens seem "
            "not to belong together; give both as the server returned them",
        )
