"""The flags of `kdeval trim`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from student_train.vocabulary_choice import read_share
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class TrimSettings:
    """Cut a student's vocabulary to the ids that a text uses: embedding, head and tokenizer lose the others.

    Everything that the tokenizer needs to give the same pieces stays: special tokens, bytes and single characters, the
    merges of kept pieces. The text is tokenised before and after, and every difference is counted. What is written
    names the ids that were kept in kept_ids.json, so that a cache of the teacher can still be read beside it.
    """

    text: tuple[str, ...]
    """Text in the languages that are to stay: files, globs, folders or hub names, as kdcache build --corpus takes "
    "them."""

    out: str
    """Directory to write, which must not hold anything yet."""

    student: str = "student"
    """Directory of the student: what kdtrain wrote, or any Hugging Face model with a fast tokenizer."""

    coverage: float = 1.0
    """Keep the most frequent ids that make up this share of the text's tokens; 1 keeps every id that it uses."""

    json: bool = False
    """Print one JSON record on standard output instead of a table."""

    def __post_init__(self) -> None:
        if not self.text:
            raise SettingsError("--text names nothing, so no id would be kept: give a file or more")
        if "://" in self.out:
            raise SettingsError(f"--out {self.out!r} is an address: a student is written to a folder; give one")
        read_share("--coverage", self.coverage)

    def check_out(self) -> Path:
        """The folder to write.

        Raises:
            SettingsError: it holds something.
        """
        out = Path(self.out).expanduser()
        try:
            holds = out.exists() and (not out.is_dir() or any(out.iterdir()))
        except OSError as error:
            raise SettingsError(f"--out {self.out!r} cannot be looked into ({error.strerror}): give another") from error
        if holds:
            raise SettingsError(
                f"--out {self.out!r} holds something already, which is not written over: give a new folder, or delete "
                "that one"
            )
        return out
