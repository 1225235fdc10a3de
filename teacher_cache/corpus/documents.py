"""Corpus specifications -> documents: one string per line of text or record of a table.

A specification is a local file, a glob, a folder, or the name of a dataset on the Hugging Face hub,
`name[:config[:split]]`. Local files are read by their suffix: .txt, .jsonl, .json, .csv (each also .gz) and .parquet;
any other file is read as text. Everything goes through `datasets`: local files are streamed, about 10 MB (or one line,
one Parquet row group) at a time, and leave nothing in its cache; hub datasets are downloaded into its cache.

Blank documents are left out and surrounding white space is dropped. Nothing is tokenised, mixed or shuffled here.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from teacher_cache.errors import CorpusError, first_line
from teacher_cache.hub import HUB_ERRORS

TEXT_COLUMNS = ("text", "content", "document", "sentence", "article")
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # a document that reads NA or null is a document
    ".csv": ("csv", {"encoding": "utf-8-sig", "keep_default_na": False}),
    ".parquet": ("parquet", {}),
}
RECORDS_AT_ONCE = 16  # enough to hide the cost of a call, few enough that a batch of novels stays small
SNIFFED_BYTES = 1 << 20
READING_ERRORS = (OSError, ValueError, EOFError, zlib.error, pa.ArrowException, DatasetsError)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:.*)?")
HELP_LOCAL = "give the path of a local file instead (txt, txt.gz, jsonl, csv, parquet; a glob or a folder of them)"


def read_documents(specs: Sequence[str]) -> Iterator[str]:
    """The documents of every specification, one after another, in a fixed order (files of a glob by name).

    Local files are looked up at once, so that a wrong path is found before anything is read; names on the hub are when
    their turn comes.

    Raises:
        CorpusError: nothing is at a specification, or what is there cannot be read as text.
    """
    return chain.from_iterable([_find(spec) for spec in specs])


def _find(spec: str) -> Iterator[str]:
    paths = _local_files(spec)
    if paths:
        return (document for path in paths for document in _read_file(path))
    if _means_local(spec) or not HUB_NAME.fullmatch(spec):
        raise CorpusError(
            f"no file matches the corpus {spec!r}: there is nothing to read; check the path (relative ones start from "
            f"{str(Path.cwd())!r})"
        )
    return _read_hub(spec)


# ---- local files ----------------------------------------------------------------------------------------------------


def _local_files(spec: str) -> list[Path]:
    """The files that a specification names, sorted; empty if there is nothing by that name."""
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _format(file) is not None)
        if not files:
            raise CorpusError(
                f"the folder {spec!r} holds no file to read: a corpus folder has files ending in "
                f"{', '.join(READERS)} (or .gz of these); name the files themselves if they end otherwise"
            )
        return files
    if path.exists():
        return [path]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
    return sorted(file for file in map(Path, matches) if file.is_file())


def _means_local(spec: str) -> bool:
    name = spec.partition(":")[0]  # what follows may slice a split: train[:10%]
    return spec.startswith(("/", ".", "~")) or glob.has_magic(name) or _format(Path(spec)) is not None


def _format(path: Path) -> str | None:
    """The suffix that decides how a file is read, without .gz; None if it is not one that we know."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in READERS else None


def _read_file(path: Path) -> Iterator[str]:
    suffix = _format(path) or ".txt"
    builder, options = READERS[suffix]
    try:
        if suffix != ".parquet" and _is_blank(path):
            return
        with tempfile.TemporaryDirectory() as scratch, _quiet():
            records = datasets.load_dataset(
                builder,
                data_files=[str(_safe_name(path, suffix, Path(scratch)))],
                split="train",
                streaming=True,
                cache_dir=scratch,
                **options,
            )
            yield from _texts(records, str(path))
    except READING_ERRORS as error:
        _refuse_file(path, error)


def _safe_name(path: Path, suffix: str, folder: Path) -> Path:
    """A link to the file: datasets takes names for patterns and URLs, and would miss one with brackets in silence."""
    link = folder / f"corpus{suffix}{'.gz' if path.name.endswith('.gz') else ''}"
    link.symlink_to(path.absolute())
    return link


def _is_blank(path: Path) -> bool:
    """Whether the file holds white space only; refuses one that is visibly not text before minutes are spent on it."""
    with _open(path) as file:
        head = file.read(SNIFFED_BYTES)
        zero = head.find(b"\0")
        if zero >= 0:
            _refuse_binary(path, zero, "a NUL byte")
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return not head.strip() and not file.read(1)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _refuse_file(path: Path, error: Exception) -> NoReturn:
    if isinstance(error, UnicodeDecodeError):
        _refuse_binary(path, _first_undecodable(path), "bytes that are not UTF-8")
    if isinstance(error, PermissionError):
        raise CorpusError(
            f"the corpus file {str(path)!r} may not be read by this user: permission denied; change its permissions or "
            "copy it"
        ) from error
    raise CorpusError(
        f"the corpus file {str(path)!r} cannot be read ({first_line(error)}): it is damaged, or its suffix does not "
        f"say what it is; files are read by suffix ({', '.join(READERS)}, each but the last also .gz), others as plain "
        "text"
    ) from error


def _refuse_binary(path: Path, offset: int, what: str) -> NoReturn:
    raise CorpusError(
        f"the corpus file {str(path)!r} is not text: {what} at byte {offset}; give UTF-8 text (`iconv -f ENCODING -t "
        "UTF-8` converts other encodings), unpacked or .gz"
    )


def _first_undecodable(path: Path) -> int:
    """Offset of the first byte (of the unpacked file) that cannot be read as UTF-8."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path) as file:
        while chunk := file.read(SNIFFED_BYTES):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return offset - waiting + error.start
            offset += len(chunk)
    return offset


# ---- the hub --------------------------------------------------------------------------------------------------------


def _read_hub(spec: str) -> Iterator[str]:
    name, config, split = [*spec.split(":", 2), "", ""][:3]
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train")
        yield from _texts(records, spec)
    except (*READING_ERRORS, *HUB_ERRORS) as error:
        raise CorpusError(
            f"the corpus {spec!r} is not a local file, and as a dataset of the hub (name[:config[:split]]) it cannot "
            f"be read ({first_line(error)}): check the name and the network, or {HELP_LOCAL}"
        ) from error


# ---- records --------------------------------------------------------------------------------------------------------


def _texts(records: Any, origin: str) -> Iterator[str]:
    number = 0
    for table in records.with_format("arrow").iter(batch_size=RECORDS_AT_ONCE):
        for text in table.column(text_column(table.schema, origin)).to_pylist():
            number += 1
            document = (text or "").strip()
            if "\0" in document:
                raise CorpusError(
                    f"record {number} of the corpus {origin!r} holds a NUL character: this is not text; give UTF-8 text"
                )
            if document:
                yield document


def text_column(schema: pa.Schema, origin: str) -> str:
    """The column that holds the documents: one named like text, else the only column of strings.

    Raises:
        CorpusError: no column, or more than one, could be it.
    """
    strings = [column.name for column in schema if _is_string(column.type)]
    for name in TEXT_COLUMNS:
        for column in strings:
            if column.casefold() == name:
                return str(column)
    if len(strings) == 1:
        return str(strings[0])
    columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
    raise CorpusError(
        f"the corpus {origin!r} has no text column: its columns are {columns}, and it is not clear which holds the "
        f"documents; name a column of strings {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}, or keep only one"
    )


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep datasets from logging what we report ourselves, in our own words."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
