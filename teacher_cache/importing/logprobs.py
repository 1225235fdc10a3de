"""Records of token ids with log-probabilities -> rows: vLLM's `prompt_logprobs`, and plain columns.

What vLLM gives for a prompt of T tokens is a list of T entries. The first is None, as nothing comes before the first
token; entry t holds the distribution of token t given those before it: a mapping of ids to {logprob, rank,
decoded_token}, in JSON with the ids as text. The prompt's own token is always listed, as one more where it is not among
the most probable ones (https://docs.vllm.ai, `SamplingParams.prompt_logprobs`). A store keeps the distribution after a
position, so that entry t is kept at position t - 1.

Plain columns hold `input_ids` [T], `top_ids` and `top_logprobs` [T, K]. With T - 1 entries, entry t is that after token
t. With T of them, the first of which is empty, they are as vLLM's; where none is empty, that has to be said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.contract.manifest import sha256_of_json
from teacher_cache.errors import SettingsError, SourceError
from teacher_cache.importing.completions import TokenTexts, is_completion, read_completion
from teacher_cache.importing.distillkit import Packing, is_packed, read_packed
from teacher_cache.importing.files import Record, Records
from teacher_cache.importing.settings import EntriesAre
from teacher_cache.importing.source import Distributions, SourceRow, refuse
from teacher_cache.importing.values import gather, read_ids, to_id, unwrap, whole_numbers


def shape_of(record: Record, where: str) -> str:
    """The shape whose names a record has.

    Raises:
        SourceError: none has them.
    """
    record = unwrap(record, where)
    names = {name for name, value in record.items() if value is not None}
    if "prompt_logprobs" in names:
        return "vllm"
    if {"top_ids", "top_logprobs"} <= names:
        return "columns"
    if is_completion(record):
        return "openai"
    if is_packed(record):
        return "distillkit"
    raise SourceError(
        f"{where}: a record of {', '.join(sorted(map(repr, names))) or 'nothing'} is of no known shape; it must have "
        "prompt_token_ids (or input_ids) and prompt_logprobs, or logprobs with tokens and top_logprobs, or input_ids, "
        "top_ids and top_logprobs, or input_ids, compressed_logprobs and bytepacked_indices"
    )


_MUCH = 1.05
"""Probability from which on a packed distribution is worth a word."""


class LogprobSource:
    """Files of records in one of these shapes."""

    def __init__(
        self,
        records: Records,
        shape: str,
        tokenizer: Any,
        *,
        entries: EntriesAre | None = None,
        packing: Packing | None = None,
    ) -> None:
        """`entries` is of columns alone, `packing` of what DistillKit packed.

        Raises:
            SettingsError: one is given that means nothing to this shape, or lacks.
        """
        if entries is not None and shape != "columns":
            raise SettingsError(
                f"--entries {entries} would change nothing: what an entry of {shape} is the distribution of is known; "
                "leave it out"
            )
        if (packing is None) == (shape == "distillkit"):
            raise SettingsError(
                f"--packing would change nothing: {shape} is not packed; leave it out"
                if packing is not None
                else "the files are packed as DistillKit does, and how is not in them: give --packing FILE, the "
                "compression_config.yaml that lies beside them, or a training's configuration with logprob_compressor"
            )
        self.shape = shape
        self.files = records.files
        self.unit_R = records.unit_R
        self.fingerprint = sha256_of_json(
            {
                "shape": shape,
                "entries": entries,
                "files": records.hashes,
                **({} if packing is None else {"packing": asdict(packing)}),
            }
        )
        self._records, self._entries, self._packing, self.texts = records, entries, packing, TokenTexts(tokenizer)
        self._scaled = 0

    def where(self, row: int) -> str:
        return self._records.where(row)

    def notes(self) -> Iterator[str]:
        """What was left out or changed of all rows that have been read."""
        if self._scaled:
            yield (
                f"{self._scaled} distributions were packed as more than {_MUCH:g} of probability, because a polynomial "
                "stands for their values: they are scaled to 1"
            )
        if self.texts.shared:
            yield (
                f"{self.texts.shared} listed texts are left out: several tokens are written so; ask the server for ids "
                "(return_tokens_as_token_ids) to keep them"
            )

    def read(self, row: int) -> SourceRow:
        where = self.where(row)
        record = unwrap(self._records.read(row), where)
        if (found := shape_of(record, where)) != self.shape:
            refuse(where, f"a record of the shape {found} among records of the shape {self.shape}: give files of one")
        if self.shape == "openai":
            return read_completion(record, self.texts, where)
        input_ids_T = read_ids(record, where)
        if self.shape == "vllm":
            return SourceRow(input_ids_T=input_ids_T, distributions=_read_prompt(record, input_ids_T, where))
        if self._packing is not None:
            packed = read_packed(record, len(input_ids_T), self._packing, where)
            mass_P = np.exp(packed.log_probs_E).reshape(-1, self._packing.k).sum(axis=1)
            self._scaled += int((mass_P > _MUCH).sum())
            return SourceRow(input_ids_T=input_ids_T, distributions=packed)
        return SourceRow(
            input_ids_T=input_ids_T, distributions=_read_columns(record, len(input_ids_T), self._entries, where)
        )


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def _read_prompt(record: Record, input_ids_T: NDArray[np.int64], where: str) -> Distributions:
    listed = record["prompt_logprobs"]
    if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) != len(input_ids_T):
        count = len(listed) if isinstance(listed, Sequence) else type(listed).__name__
        refuse(
            where,
            f"'prompt_logprobs' has {count} entries for {len(input_ids_T)} tokens: entry t is that of token t, the "
            "first being null, so that there must be one for each",
        )
    if listed and listed[0]:
        refuse(
            where,
            "the first entry of 'prompt_logprobs' is not null: nothing comes before the first token, so that the list "
            "seems to be moved by one; give it as vLLM returns it",
        )
    entries = []
    for token, (own_id, entry) in enumerate(zip(input_ids_T.tolist(), listed, strict=True)):
        if entry:
            place = f"{where}, entry {token}"
            ids, log_probs, ranks = _read_entry(entry, place)
            if own_id not in ids:
                refuse(
                    place,
                    f"token {own_id}, which stands there, is not listed: an engine always lists it, so that entries "
                    "and tokens seem not to belong together; give both as the engine returned them",
                )
            entries.append((token - 1, _count_top(ranks), ids, log_probs))
    return gather(entries)


def _read_entry(entry: Any, where: str) -> tuple[list[int], list[float], list[Any]]:
    """Ids, log-probabilities and ranks of one entry; parquet gives a mapping as a list of pairs."""
    pairs = list(entry.items()) if isinstance(entry, Mapping) else entry if isinstance(entry, list) else []
    ids, log_probs, ranks = [], [], []
    for pair in pairs:
        key, value = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
        log_prob = value.get("logprob") if isinstance(value, Mapping) else value
        if type(log_prob) not in (float, int) or not str(key).isdecimal():
            refuse(where, f"{key!r}: {value!r} is no token id with its logprob; give what vLLM returns")
        ids.append(to_id(str(key), where))
        log_probs.append(float(log_prob))  # type: ignore[arg-type]
        ranks.append(value.get("rank") if isinstance(value, Mapping) else None)
    if not ids:
        refuse(where, f"{entry!r:.60} holds no token ids; give a mapping of ids to logprob")
    return ids, log_probs, ranks


def _count_top(ranks: Sequence[Any]) -> int:
    """How many of an entry are its most probable ids: ranks 1, 2, …; the token itself may be listed beside those."""
    known = set(ranks)
    if None in known:
        return len(ranks)
    return next(number for number in range(len(ranks) + 1) if number + 1 not in known)


# ---- columns --------------------------------------------------------------------------------------------------------


def _read_columns(record: Record, tokens: int, entries_are: EntriesAre | None, where: str) -> Distributions:
    # columns of bytes come as arrays
    columns = (record["top_ids"], record["top_logprobs"])
    ids_of, log_probs_of = (each.tolist() if isinstance(each, np.ndarray) else each for each in columns)
    for name, listed in (("top_ids", ids_of), ("top_logprobs", log_probs_of)):
        if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) not in (tokens, tokens - 1):
            count = len(listed) if isinstance(listed, Sequence) else type(listed).__name__
            refuse(where, f"{name!r} has {count} entries for {tokens} tokens: give one for each, or for all but one")
    if len(ids_of) != len(log_probs_of):
        refuse(where, f"'top_ids' has {len(ids_of)} entries and 'top_logprobs' {len(log_probs_of)}: give as many")
    moved = _moved(len(ids_of) == tokens, bool(ids_of and ids_of[0]), entries_are, where)
    entries = []
    for number, (ids, log_probs) in enumerate(zip(ids_of, log_probs_of, strict=True)):
        position = number - moved
        place = f"{where}, entry {number}"
        if any(each is not None and not _is_list(each) for each in (ids, log_probs)):
            refuse(place, "one value where a list of ids, and one of log-probabilities, should be; give K of each")
        if not (ids or log_probs) or not 0 <= position < tokens - 1:
            continue
        ids, log_probs = ids or [], log_probs or []
        if len(ids) != len(log_probs):
            refuse(place, f"{len(ids)} ids and other log-probabilities than as many; give as many of both")
        wrong = next((one for one in log_probs if type(one) not in (float, int)), 0.0)
        if type(wrong) not in (float, int):
            refuse(place, f"{wrong!r} is no log-probability")
        entries.append((position, len(ids), whole_numbers(ids, place).tolist(), log_probs))
    return gather(entries)


def _is_list(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str)


def _moved(one_each: bool, first_given: bool, entries_are: EntriesAre | None, where: str) -> int:
    """By how much an entry's number is beyond the position after which it is kept."""
    if not one_each:
        if entries_are == "this":
            refuse(where, "one entry less than tokens cannot be --entries this: entry t is that after token t")
        return 0
    if not first_given:
        if entries_are == "next":
            refuse(where, "the first entry is empty, as where an entry is that of its own token, not --entries next")
        return 1
    if entries_are is None:
        refuse(
            where,
            "there is an entry for every token, the first included: whether entry t is the distribution of token t or "
            "of the one after it is not to be seen, and a shift by one would train on wrong targets; say it with "
            "--entries this or --entries next (what a model gives as logits is next)",
        )
    return 1 if entries_are == "this" else 0
