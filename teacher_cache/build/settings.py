"""What a user may ask of `kdcache build` and `kdcache derive`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teacher_cache.contract.manifest import RowMode
from teacher_cache.contract.targets import MOST_DRAWS, LogitsForm, RelationMode, View, parse_precision
from teacher_cache.errors import SettingsError

DEFAULT_CORPUS = "Salesforce/wikitext:wikitext-103-raw-v1:train"
TARGETS = ("logits", "hidden", "attention")
_DEFAULT_ENTRIES = {"topk": 64, "sample": 50}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Run the teacher once over a corpus and write what students learn from."""

    teacher: str
    """Hugging Face id or folder of a masked-LM encoder."""
    revision: str | None = None
    """Revision of the teacher on the hub."""
    corpus: tuple[str, ...] = (DEFAULT_CORPUS,)
    """Files, globs or folders (txt, jsonl, csv, parquet, also .gz), or hub names NAME[:CONFIG[:SPLIT]]; several may
    each end in @WEIGHT, their share of the rows.
    """
    mix_alpha: float | None = None
    """Take rows of several --corpus in proportion to their tokens to this power, as XLM-R does with 0.3 (default: all
    rows alike).
    """
    out: str = "cache.zarr"
    """Folder of the store. An unfinished store of the same settings is continued."""
    seq_len: int | None = None
    """Tokens per row, special tokens included. Default: 512, or what the teacher can read if that is less."""
    max_rows: int = 20_000
    """Rows to keep: a prefix of the shuffle of the whole corpus."""
    part: str | None = None
    """Part i of n such as 2/8: build a store of these rows alone; several stores are read as one corpus."""
    rows: RowMode = "packed"
    """packed: rows are cut from joined documents. document: one truncated document a row."""
    targets: str | None = None
    """Comma-separated: logits, hidden, attention. Default: all that the checkpoint can give."""
    layers: str = "uniform+last"
    """Hidden states to keep: 2,4,6, all, uniform:6, last:6 or uniform:6+last (default: for the default student)."""
    attention_layer: int | None = None
    """Layer whose queries, keys and values are kept. Default: the last but one."""
    relations: RelationMode | None = None
    """hidden: keep the layer's input and its projections once; qkv: keep the vectors; matrix: keep the relations
    themselves in float16, 3 * 2 * HEADS * SEQ_LEN bytes a token, to compare with. Default: hidden where it is exact.
    """
    relation_heads: int | None = None
    """With --relations matrix: relation heads, fixed in the store. Default: the largest divisor of the teacher's width
    up to a sixteenth of it.
    """
    logits: LogitsForm = "topk"
    """topk: the most probable ids at each masked position, and the mass outside them as one number. sample: ids drawn
    from the whole distribution, one in each of K equal shares of its mass, with their counts: unbiased.
    """
    k: int | None = None
    """Ids kept at each masked position (default: 64), or drawn with --logits sample (default: 50, at most 255)."""
    precision: str = "nmse:1e-2"
    """float16, int8, int4, or nmse:X: hidden states and attention in as few bits as keep all but a share X of the
    variance.
    """
    views: int = 1
    """Masked views of each row; training cycles through them by epoch."""
    mlm_probability: float = 0.15
    """Share of a row's tokens that a masked view hides."""
    hs_view: View = "plain"
    """View that hidden states and attention are taken from."""
    temperature: float = 1.0
    """Softmax temperature of the cached distribution; fixed in the store."""
    batch_size: int | None = None
    """Rows per teacher forward. Default: by device and row length."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the teacher. auto: float32 on CPU, bfloat16 on GPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: the first GPU if there is one."""
    block_rows: int = 64
    """Rows per block: the unit of writing, commit, reading and shuffling."""
    force: bool = False
    """Build even if the disk seems too small."""
    seed: int = 0
    """Seed of row order and masks."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_rows", 1),
            ("k", 1),
            ("views", 1),
            ("relation_heads", 1),
            ("block_rows", 1),
            ("batch_size", 1),
            ("seq_len", 3),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"--{name.replace('_', '-')} {value!r} is too small: it must be at least {least}")
        if self.logits == "sample" and self.entries > MOST_DRAWS:
            raise SettingsError(
                f"--k {self.k!r} draws a position cannot be kept: a count has one byte; ask for 1 to {MOST_DRAWS}"
            )
        if self.relation_heads is not None and self.relations != "matrix":
            raise SettingsError(
                f"--relation-heads {self.relation_heads!r} would change nothing: only --relations matrix fixes the "
                "heads in the store; leave it out, and choose heads in training"
            )
        if not 0 < self.mlm_probability < 1:
            raise SettingsError(
                f"--mlm-probability {self.mlm_probability!r} is not between 0 and 1: it is the share of tokens "
                "hidden; try 0.15"
            )
        if self.mix_alpha is not None and not 0 <= self.mix_alpha <= 1:
            raise SettingsError(
                f"--mix-alpha {self.mix_alpha!r} would favour what there is most of, or least: give a power from 0 "
                "(all --corpus alike) to 1 (by their sizes), such as 0.3"
            )
        if not 0 < self.temperature < float("inf"):
            raise SettingsError(
                f"--temperature {self.temperature!r} cannot divide logits: give a positive number, usually 1"
            )
        if self.seed < 0:
            raise SettingsError(f"--seed {self.seed!r} is negative: give a whole number from 0")
        parse_precision(self.precision)
        self.target_names()
        self.part_numbers()

    @property
    def entries(self) -> int:
        """Ids kept or drawn at each masked position."""
        return _DEFAULT_ENTRIES[self.logits] if self.k is None else self.k

    def part_numbers(self) -> tuple[int, int] | None:
        """Which part of how many, the first being 1.

        Raises:
            SettingsError: there is no such part.
        """
        if self.part is None:
            return None
        number, slash, parts = self.part.partition("/")
        if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
            raise SettingsError(
                f"--part {self.part!r} names no part: rows would be left out or counted twice; give i/n with i from 1 "
                "to n, such as 2/8"
            )
        return int(number), int(parts)

    def target_names(self) -> tuple[str, ...] | None:
        """The targets asked for, or None for all that the teacher can give.

        Raises:
            SettingsError: a name is unknown.
        """
        return None if self.targets is None else _target_names(self.targets)


def _target_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise SettingsError(
            f"--targets {text!r} names {(unknown or [''])[0]!r}: no such target, so nothing could be kept; choose "
            "among " + ", ".join(TARGETS)
        )
    return names


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
    """Most probable ids to keep at each masked position; the mass of the others joins the tail. Default: as in SRC."""
    precision: str | None = None
    """nmse:X, not finer than in SRC; int8 or int4 where SRC has float16. X counts from the teacher, not from SRC; the
    finer SRC is, the less room the same X takes. Default: the codes of SRC.
    """
    row_range: str | None = None
    """Rows A:B of SRC: from A, counted from 0, up to B, which is left out. Default: all of them."""
    max_rows: int | None = None
    """Keep so many of the first rows."""

    def __post_init__(self) -> None:
        for name in ("k", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {value!r} is too small: it must be at least 1")
        if self.precision is not None:
            parse_precision(self.precision)
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
        return None if self.targets is None else _target_names(self.targets)

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
        return int(first or 0), int(last) if last else None
