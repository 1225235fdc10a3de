"""Corpus specifications -> documents: one string per line of text or record of a table, or one conversation.

A specification is a local file, a pipe, a glob, a folder, or the name of a dataset on the Hugging Face hub,
`name[:config[:split]]`. Local files are read by their suffix: .jsonl and .json, .csv and .tsv (each also .gz), and
.parquet; any other file is read as text, a document a line. They are streamed and leave nothing behind. A folder that
`datasets.save_to_disk` wrote is loaded by `datasets`, as are datasets of the hub, which go into its cache unless they
are streamed.

Conversations are read from tables that hold some (`conversations`), if they are to be: always (True), where a table
has them (None), or never (False).

Blank documents are left out and surrounding white space is dropped. Nothing is tokenised, mixed or shuffled here.
"""

from __future__ import annotations

import errno
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, cast

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from teacher_cache.corpus.columns import (
    Kind,
    Note,
    Record,
    json_kind,
    no_note,
    record_texts,
    text_column,
    written_kind,
)
from teacher_cache.corpus.conversations import (
    CHAT_COLUMNS,
    PAIR_COLUMNS,
    Chat,
    arrow_columns,
    read_chats,
    record_columns,
)
from teacher_cache.corpus.folders import SUFFIXES, Found, find_local, suffix_of
from teacher_cache.corpus.json_files import read_json
from teacher_cache.corpus.plain_text import read_plain_text
from teacher_cache.corpus.tables import read_csv, read_tsv
from teacher_cache.corpus.text_files import MOST_CHARACTERS
from teacher_cache.disk import system_error_number
from teacher_cache.errors import CorpusError, first_line
from teacher_cache.hub import HUB_ERRORS

_log = logging.getLogger(__name__)
RECORDS_AT_ONCE = 16  # enough to hide the cost of a call, few enough that a batch of novels stays small
READING_ERRORS = (OSError, ValueError, EOFError, zlib.error, pa.ArrowException, DatasetsError)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:.*)?")
HELP_LOCAL = "give the path of a local file instead (txt, txt.gz, jsonl, csv, parquet; a glob or a folder of them)"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without file locks answers


def read_documents(
    specs: Sequence[str], note: Note = no_note, *, chat: bool | None = False, streamed: bool = False
) -> Iterator[str | Chat]:
    """The documents of every specification, one after another, in a fixed order (files of a glob by name).

    Local files are looked up at once, so that a wrong path is found before anything is read; names on the hub are when
    their turn comes, and if `streamed` no more of them is fetched than is read. `note` is told what is left out of
    folders, and which column is read where its name does not say.

    Raises:
        CorpusError: nothing is at a specification, or what is there cannot be read as text, or has no conversations
            and must.
    """
    return chain.from_iterable([_find(spec, note, chat, streamed) for spec in specs])


def look_up(specs: Sequence[str], *, streamed: bool = False) -> None:
    """Whether local files are there and may be read, before anything that takes long: nothing is read of them.

    What is at names on the hub is only known when they are loaded.

    Raises:
        CorpusError: a file is not there, or may not be read, or a dataset cannot be streamed as it is to be.
    """
    for spec in specs:
        paths = _find_local(spec).paths
        if streamed and not paths and "[" in spec:
            raise CorpusError(
                f"the corpus {spec!r} asks for a part of a split, which only a downloaded dataset has, and "
                f"--shuffle-buffer streams it: give {spec.partition('[')[0]!r}, or leave out --shuffle-buffer"
            )
        for path in paths:
            if not path.is_file():  # a pipe can be opened once
                continue
            try:
                path.open("rb").close()
            except OSError as error:
                raise CorpusError(
                    f"the corpus file {str(path)!r} cannot be opened ({error.strerror}), so its text would be missing; "
                    "make it readable, or leave it out"
                ) from error


def _find(spec: str, note: Note, chat: bool | None, streamed: bool) -> Iterator[str | Chat]:
    found = _find_local(spec)
    found.tell(spec, note)
    if found.paths:
        return (document for path in found.paths for document in _read_path(path, note, chat))
    return _read_hub(spec, note, chat, streamed)


def _find_local(spec: str) -> Found:
    found = find_local(spec)
    if not found.paths and (_means_local(spec) or not HUB_NAME.fullmatch(spec)):
        raise CorpusError(
            f"no file matches the corpus {spec!r}: there is nothing to read; check the path (relative ones start from "
            f"{str(Path.cwd())!r})"
        )
    return found


def _means_local(spec: str) -> bool:
    name = spec.partition(":")[0]  # what follows may slice a split: train[:10%]
    return spec.startswith(("/", ".", "~")) or has_magic(name) or suffix_of(Path(spec)) in SUFFIXES


# ---- local files ----------------------------------------------------------------------------------------------------


def _read_path(path: Path, note: Note, chat: bool | None) -> Iterator[str | Chat]:
    suffix = suffix_of(path)
    _log.info("reading corpus file %s", path)
    if path.is_dir():
        return _read_saved(path, note, chat)
    if suffix == ".parquet":
        return _read_parquet(path, note, chat)
    if suffix in (".jsonl", ".json"):
        return _read_records(path, read_json(path, numbers=chat is not False), json_kind, note, chat)
    if suffix in (".csv", ".tsv"):
        return _read_records(path, (read_csv if suffix == ".csv" else read_tsv)(path), written_kind, note, chat)
    if chat:
        _refuse_text(str(path), "plain text")
    return _stripped(read_plain_text(path))


def _read_records(
    path: Path, records: Iterator[Record], kind_of: Callable[[Any], Kind], note: Note, chat: bool | None
) -> Iterator[str | Chat]:
    first = next(records, None)
    if first is None:
        return
    records = chain([first], records)
    columns = () if chat is False else record_columns(first[1])
    if columns:
        yield from read_chats(str(path), records, columns, note)
        return
    if chat:
        _refuse_text(str(path), f"columns {', '.join(first[1])}")
    yield from _stripped(record_texts(path, records, kind_of, note))


def _stripped(texts: Iterable[str]) -> Iterator[str]:
    return filter(None, map(str.strip, texts))


def _refuse_text(origin: str, what: str) -> NoReturn:
    raise CorpusError(
        f"the corpus {origin!r} has {what}, and --chat asks for conversations: which tokens are answers would not be "
        f"known; give a table with a column {' or '.join(CHAT_COLUMNS)}, or {' and '.join(PAIR_COLUMNS)}, or leave out "
        "--chat to read text as well"
    )


def _read_parquet(path: Path, note: Note, chat: bool | None) -> Iterator[str | Chat]:
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)

            def read(columns: Sequence[str]) -> Iterable[pa.RecordBatch]:
                return cast("Iterable[pa.RecordBatch]", table.iter_batches(RECORDS_AT_ONCE, columns=columns))

            yield from _read_table(table.schema_arrow, read, str(path), note, chat)
    except READING_ERRORS as error:
        raise CorpusError(
            f"the corpus file {str(path)!r} cannot be read as Parquet ({first_line(error)}): it is damaged or "
            "packed, may not be read, or its ending does not say what it is; unpack, write or copy it again"
        ) from error


def _read_saved(folder: Path, note: Note, chat: bool | None) -> Iterator[str | Chat]:
    """A folder that `datasets.save_to_disk` wrote; of several splits, train."""
    try:
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            splits = list(saved)
            if len(splits) > 1 and "train" not in splits:
                raise CorpusError(
                    f"the corpus {str(folder)!r} is a saved dataset of several splits ({', '.join(splits)}), none of "
                    f"them train: which to read is not said; name its folder, such as {str(folder / splits[0])!r}"
                )
            chosen = splits[0] if len(splits) == 1 else "train"
            if len(splits) > 1:
                note(f"{folder}: of its splits {', '.join(splits)}, train is read")
            saved = saved[chosen]
        yield from _read_dataset(saved, str(folder), note, chat)
    except (*READING_ERRORS, KeyError, TypeError) as error:
        raise CorpusError(
            f"the corpus {str(folder)!r} looks like a folder of datasets.save_to_disk and cannot be loaded "
            f"({first_line(error)}): it is damaged or incomplete; save it again"
        ) from error


# ---- datasets -------------------------------------------------------------------------------------------------------


def _read_hub(spec: str, note: Note, chat: bool | None, streamed: bool) -> Iterator[str | Chat]:
    _log.info("%s corpus %s from the hub, or its cache on this machine", "streaming" if streamed else "reading", spec)
    name, config, split = [*spec.split(":", 2), "", ""][:3]
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train", streaming=streamed)
        yield from _read_dataset(dataset, spec, note, chat)
    except (*READING_ERRORS, *HUB_ERRORS) as error:
        if system_error_number(error) in _NO_LOCKS:
            raise CorpusError(
                f"the corpus {spec!r} cannot be put into the cache of datasets in "
                f"{str(datasets.config.HF_DATASETS_CACHE)!r}: that folder lies where files cannot be locked "
                f"({first_line(error)}), as on some network disks; set HF_DATASETS_CACHE to a folder on another disk"
            ) from error
        raise CorpusError(
            f"the corpus {spec!r} is not a local file, and as a dataset of the hub (name[:config[:split]]) it cannot "
            f"be read ({first_line(error)}): check the name and the network, or {HELP_LOCAL}"
        ) from error


def _read_dataset(
    records: datasets.Dataset | datasets.IterableDataset, origin: str, note: Note, chat: bool | None
) -> Iterator[str | Chat]:
    if isinstance(records, datasets.IterableDataset) and records.features is None:
        # files that say nothing of their columns: the first records do
        records = records._resolve_features()

    def read(columns: Sequence[str]) -> Iterable[pa.Table]:
        tables = records.select_columns(list(columns)).with_format("arrow").iter(batch_size=RECORDS_AT_ONCE)
        return cast("Iterable[pa.Table]", tables)

    return _read_table(records.features.arrow_schema, read, origin, note, chat)


def _read_table(
    schema: pa.Schema,
    read: Callable[[Sequence[str]], Iterable[pa.Table | pa.RecordBatch]],
    origin: str,
    note: Note,
    chat: bool | None,
) -> Iterator[str | Chat]:
    """What a table with types holds, given how to read some of its columns."""
    columns = () if chat is False else arrow_columns(schema)
    if columns:
        wanted = [*columns, *(name for name in ("tools",) if name in schema.names)]
        rows = (row for table in read(wanted) for row in table.to_pylist())
        yield from read_chats(origin, enumerate(rows, 1), columns, note)
        return
    if chat:
        _refuse_text(origin, f"columns {', '.join(schema.names)}")
    yield from _stripped(_column(read([text_column(schema, origin, note)]), origin))


def _column(tables: Iterable[pa.Table | pa.RecordBatch], origin: str) -> Iterator[str]:
    """The texts in tables of one column."""
    number = 0
    for table in tables:
        for text in table.column(0).to_pylist():
            number += 1
            if text is None:
                continue
            if "\0" in text or len(text) > MOST_CHARACTERS:
                what = "holds a NUL character" if "\0" in text else f"has more than {MOST_CHARACTERS} characters"
                raise CorpusError(
                    f"record {number} of the corpus {origin!r} {what}: this is no document; give UTF-8 text, one "
                    "document per record"
                )
            yield text
