"""What `--vocabulary` says: which of the teacher's ids a student gets. Standard library only.

In: text. Out: a `VocabularyChoice`. What it comes to is known once a text or the rows of a cache have been read
(`train/vocabulary.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class VocabularyChoice:
    """The ids that `files` use or one lists, or those that make up `share` of the cache's tokens; else all of them."""

    text: str
    files: tuple[str, ...] = ()
    share: float | None = None

    @property
    def all(self) -> bool:
        """Whether every id stays."""
        return not self.files and self.share is None


def read_vocabulary(text: str) -> VocabularyChoice:
    """Read `all`, `trim:FILE`, `trim:FILE,FILE` and so on, or `coverage:SHARE`.

    Raises:
        SettingsError: the text cannot be read, or there can be no such share.
    """
    kind, colon, value = text.partition(":")
    if text == "all":
        return VocabularyChoice(text=text)
    if kind == "trim" and all(files := value.split(",")):
        if len(files) > 1 and (lists := [file for file in files if file.endswith(".json")]):
            raise SettingsError(
                f"--vocabulary {text!r} joins {lists[0]!r}, which lists the ids of a student, to other files: its "
                "digits would be read as text; give it alone, or text files alone"
            )
        return VocabularyChoice(text=text, files=tuple(files))
    if kind == "coverage" and colon:
        return VocabularyChoice(text=text, share=read_share(f"--vocabulary {text!r}", value))
    raise SettingsError(
        f"--vocabulary {text!r} cannot be read: give all, coverage:0.9999 for the most frequent ids of the cache's "
        "rows, or trim:FILE for those that a text file uses, such as trim:de.txt,en.txt with one for each language"
    )


def read_share(what: str, value: str | float) -> float:
    """A share of all tokens, above 0 and up to 1.

    Raises:
        SettingsError: it is none; `what` says where it stands.
    """
    try:
        share = float(value)
    except ValueError:
        share = float("nan")
    # written so that NaN fails too
    if not 0 < share <= 1:
        raise SettingsError(
            f"{what}: {value!r} is no share of a text's tokens, so which ids stay cannot be told; give a number above "
            "0 and up to 1, such as 0.9999"
        )
    return share
