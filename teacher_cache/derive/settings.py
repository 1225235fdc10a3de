"""What `kdcache derive` is asked for, checked when it is made. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.contract.layers import read_layers
from teacher_cache.contract.targets import parse_precision, target_names_of
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class DeriveSettings:
    """Make a smaller store from a larger one without the teacher: fewer layers, targets, ids or rows, coarser codes."""

    src: str
    """Finished store to derive from; it stays as it is."""
    dst: str
    """Folder of the new store. An unfinished one of the same settings is continued."""
    targets: str | None = None
    """Comma-separated: logits, hidden, attention. Default: all that SRC has."""
    layers: str | None = None
    """Hidden states to keep, as for a build: 2,4,6, uniform:6, last:6 or uniform:6+last. Default: all that SRC has."""
    attention_layer: int | None = None
    """Keep the attention of this layer alone. Default: all that SRC has."""
    k: int | None = None
    """Most probable ids to keep at each place; the mass of the others joins the tail. Default: as in SRC."""
    precision: str | None = None
    """nmse:X, not finer than in SRC; int8 or int4 where SRC has float16. X counts from the teacher, not from SRC; the
    finer SRC is, the less room the same X takes. Default: the codes of SRC.
    """
    row_range: str | None = None
    """Rows A:B of SRC: from A, counted from 0, up to B, which is left out. Default: all of them."""
    max_rows: int | None = None
    """Keep so many of the first rows."""

    def __post_init__(self) -> None:
        for name in ("k", "max_rows", "attention_layer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {value!r} is too small: it must be at least 1")
        if self.precision is not None:
            parse_precision(self.precision)
        if self.layers is not None:
            read_layers(self.layers)
        if self.row_range is not None and self.max_rows is not None:
            raise SettingsError(
                f"--row-range {self.row_range} and --max-rows {self.max_rows} both say which rows to keep: give one"
            )
        self.target_names()
        self.rows_asked()

    def target_names(self) -> tuple[str, ...] | None:
        """The targets asked for, or None for all that the source has.

        Raises:
            SettingsError: a name is unknown.
        """
        return None if self.targets is None else target_names_of(self.targets)

    def rows_asked(self) -> tuple[int, int | None]:
        """The first row, and one past the last; None for the end of the source.

        Raises:
            SettingsError: the range cannot be read.
        """
        if self.row_range is None:
            return 0, self.max_rows
        first, colon, last = self.row_range.partition(":")
        if not colon or not all(text == "" or text.isdecimal() for text in (first, last)):
            raise SettingsError(
                f"--row-range {self.row_range!r} cannot be read: give A:B, such as 0:1000, A: or :B, counted from 0"
            )
        if last and int(last) <= int(first or 0):
            raise SettingsError(
                f"--row-range {self.row_range!r} holds no row: rows from A up to B are kept, B is left out; give A:B "
                "with A < B"
            )
        return int(first or 0), int(last) if last else None
