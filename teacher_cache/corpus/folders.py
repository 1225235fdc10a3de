"""Specifications of local text -> what is to be read, and what lies beside it and is not.

A folder gives the files below it that end in one of `SUFFIXES`, and the datasets that `datasets.save_to_disk` wrote
there. All else in it is left out, and said: hidden files and folders, what archives and libraries put beside data,
other suffixes, and links to folders, which could lead anywhere. A file that is named itself, or by a pattern, is read
whatever it is called.
"""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from teacher_cache.corpus.columns import Note
from teacher_cache.errors import CorpusError, first_line
from teacher_cache.wording import some

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
"""Endings of the files that a folder gives, each also with .gz."""
_HIDDEN, _BESIDE, _OTHER = "hidden", "that describe or accompany data", "with other endings"
_LINK, _NO_FILE, _FOLDER = (
    "linking to folders",
    "that lead nowhere or are no files",
    "folders, which a pattern does not open",
)
_BESIDE_NAMES = frozenset(
    "config.json dataset_dict.json dataset_info.json dataset_infos.json state.json _temporary _delta_log".split()
)
_SAVED, _SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"


@dataclass
class Found:
    """Files and saved datasets in the order in which they are read, and names of what is left out by the reason."""

    paths: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def tell(self, spec: str, note: Note) -> None:
        """Say what is left out, a line for each reason."""
        for reason, names in self.left_out.items():
            note(f"left out of {spec}: {len(names)} {reason} ({some(sorted(names))})")


def find_local(spec: str) -> Found:
    """What a specification names on this machine; no path if there is nothing by that name.

    Raises:
        CorpusError: it names nothing at all, a whole disk, or a folder without a file to read.
    """
    if not spec.strip():
        raise CorpusError(
            f"the corpus {spec!r} is an empty name, which would mean every file below the folder one happens to be in; "
            "a shell variable may be unset: give the path, or . for this folder"
        )
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(spec, path)
    found = Found()
    if path.exists():
        found.paths.append(path)
        return found
    for match in map(Path, glob.glob(str(path), recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute patterns
        if match.is_dir():
            # with ** the folders are only what is on the way to the files
            if is_saved_dataset(match):
                found.paths.append(match)
            elif "**" not in spec:
                found.left_out[_FOLDER].append(match.name)
        elif match.exists():
            found.paths.append(match)
        else:
            found.left_out[_NO_FILE].append(match.name)
    found.paths.sort()
    return found


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (folder / _SAVED_SPLITS).is_file() or all((folder / name).is_file() for name in _SAVED)


def suffix_of(path: Path) -> str:
    """The ending that decides how a file is read, without .gz, in lower case."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _folder(spec: str, folder: Path) -> Found:
    if folder.resolve() == folder.resolve().parent:
        raise CorpusError(
            f"the corpus {spec!r} is the whole disk: every text file on it would be read; a shell variable in front of "
            "it may be unset: give the path of a folder"
        )
    found = Found()
    if is_saved_dataset(folder):
        found.paths.append(folder)
        return found
    for path, reason in _walk(folder):
        if reason is None:
            found.paths.append(path)
        else:
            found.left_out[reason].append(str(path.relative_to(folder)))
    found.paths.sort()
    if not found.paths:
        beside = "; ".join(f"{len(names)} {reason} ({some(sorted(names))})" for reason, names in found.left_out.items())
        raise CorpusError(
            f"the folder {spec!r} holds no file to read: a corpus folder has files ending in {', '.join(SUFFIXES)} (or "
            f".gz of these), and this one {beside or 'nothing'}; name the files themselves if they end otherwise"
        )
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Everything below a folder that is read (no reason), and what is not, a left-out folder as a whole."""

    def refuse(error: OSError) -> None:
        raise CorpusError(
            f"the folder {str(folder)!r} cannot be read as a whole ({first_line(error)}): text would be left out; make "
            f"{error.filename!r} readable, or name the files themselves"
        ) from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in list(folders):
            path = Path(parent, name)
            reason = _aside(name) or (_LINK if path.is_symlink() else None)
            if reason is not None:
                yield path, reason
            elif is_saved_dataset(path):
                yield path, None
            else:
                continue
            folders.remove(name)
        for name in files:
            path = Path(parent, name)
            reason = _aside(name)
            if reason is None and not path.is_file():
                reason = _NO_FILE
            if reason is None and suffix_of(path) not in SUFFIXES:
                reason = _OTHER
            yield path, reason


def _aside(name: str) -> str | None:
    if name.startswith("."):
        return _HIDDEN
    return _BESIDE if name.startswith("__") or name in _BESIDE_NAMES else None
