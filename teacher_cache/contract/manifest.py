"""The records that cross from the building side to the training side, and nothing else.

A `Manifest` says what a store holds: which teacher read which rows in which views, which of its outputs were kept and
how they are coded. It is written as JSON into the root attributes of the zarr group, is the only thing a reader needs
to know before touching an array, and is what a resumed build is compared with. Standard library only, so that every
part of the system, and any other program, can import it at no cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from teacher_cache.contract.positions import places_per_row
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, LogitsSpec, TargetSpecs, View, describe_targets
from teacher_cache.errors import StoreError

FORMAT_NAME = "kdcache"
FORMAT_VERSION = 1

RowMode = Literal["packed", "document"]
ModelKind = Literal["masked-lm", "causal-lm"]
Segments = Literal["joined", "isolated"]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TeacherRecord:
    """Which model the targets come from, and the sizes that students and readers need.

    `has_mlm_head` says whether the checkpoint brought its language-modelling head, of whichever kind.
    """

    name: str
    revision: str | None
    weights_sha256: str
    model_type: str
    layers: int
    hidden_size: int
    heads: int
    vocab_size: int
    max_positions: int
    has_mlm_head: bool
    kind: ModelKind = "masked-lm"

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token, and not masked ones."""
        return self.kind == "causal-lm"

    @property
    def distribution_view(self) -> View:
        """The view whose places have a distribution."""
        return "plain" if self.causal else "masked"


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """Which text the rows come from. The fingerprint covers the token ids of every document, in order.

    With a `shuffle_buffer` all is of the beginning of the corpus, as far as the rows and so many more take.
    """

    specs: tuple[str, ...]
    fingerprint: str
    documents: int
    tokens: int
    rows: int
    shuffle_buffer: int | None = None


@dataclass(frozen=True, kw_only=True)
class SinkRecord:
    """The few tokens of a stream that would own its variance, and are kept beside the codes as they are.

    They are the tokens whose `distance` from the stream's mean is greater than this. In the calibration sample they
    were this `share` of the tokens, with this share of the `variance` of all of them. Their values are of this type.
    """

    distance: float
    share: float
    variance: float
    dtype: Literal["float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class TransformRecord:
    """What calibration fixed for one stream of vectors in an `nmse` codec.

    `nmse` is the error measured on rows of the calibration sample that neither rotation nor step saw; `components`
    counts the components of each packing, in packing order. `earlier_steps` are those to which the same coordinates had
    been rounded before, in order, where the store was derived from a finer one. Where there are `sinks`, everything
    else is about the other tokens.
    """

    step: float
    nmse: float
    components: Mapping[str, int]
    earlier_steps: tuple[float, ...] = ()
    sinks: SinkRecord | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `_without_defaults` and JSON have made of a record."""
        sinks = data.get("sinks")
        return cls(
            **{
                **data,
                "earlier_steps": tuple(data["earlier_steps"]),
                "sinks": None if sinks is None else SinkRecord(**sinks),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds. `rows` are its rows; `corpus.rows` are the rows that the whole text would give.

    The rows are those from `first_row` on of the shuffled text. `calibration` has one record per stream in an `nmse`
    codec, by path, once the build has calibrated them. Targets that were added to a finished store have a manifest of
    their own, with `inputs_held` naming the views whose inputs the store holds already.

    `segments`: whether documents that share a row see each other (`joined`) or not (`isolated`). `positions`, of causal
    teachers alone: after which positions of a row the distribution is kept (`contract/positions.py`). `imported`: the
    shape of the files that the targets came from, where something else computed them; the store then has no weights of
    its teacher, and `weights_sha256` is a hash of the teacher's name, tokenizer and configuration. Fields that came
    later than the first stores are written only where they say something.
    """

    teacher: TeacherRecord
    tokenizer_sha256: str
    corpus: CorpusRecord
    seq_len: int
    row_mode: RowMode
    rows: int
    block_rows: int
    seed: int
    views: int
    mlm_probability: float
    temperature: float
    dtype: str
    targets: TargetSpecs
    first_row: int = 0
    inputs_held: tuple[View, ...] = ()
    calibration: Mapping[str, TransformRecord] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    segments: Segments = "joined"
    positions: str | None = None
    imported: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def blocks(self) -> int:
        """Number of blocks, the last of which may be short."""
        return -(-self.rows // self.block_rows)

    def block_range(self, block: int) -> tuple[int, int]:
        """First row of `block`, and one past its last row."""
        return block * self.block_rows, min((block + 1) * self.block_rows, self.rows)

    def rows_in(self, blocks: Iterable[int]) -> int:
        """How many rows some blocks have together."""
        return sum(last - first for first, last in map(self.block_range, blocks))

    @property
    def masked_per_row(self) -> int:
        """M: places kept per row for masked positions, max(1, round(mlm_probability * seq_len))."""
        return max(1, round(self.mlm_probability * self.seq_len))

    def places_of(self, view: View) -> int:
        """M: places of a row in this view whose distribution can be kept; 0 where there are none."""
        if view == "masked":
            return self.masked_per_row
        return 0 if self.positions is None else places_per_row(self.positions, self.seq_len)

    @property
    def tokens_per_row(self) -> int:
        """How many tokens a row has for calibration; imported ones may be far shorter than the longest."""
        if self.imported is None:
            return self.seq_len
        return min(self.seq_len, max(1, self.corpus.tokens // self.rows))

    @property
    def widest(self) -> int:
        """The most numbers that any stream of vectors can have for a token: queries may be wider than hidden states."""
        kept = (spec.vector_widths(self.teacher.hidden_size) for spec in self.targets.attention)
        return max(self.teacher.hidden_size, *(width for widths in kept for width in widths), 0)

    def views_of(self, view: View) -> int:
        """How many inputs of this view each row has: one plain, `views` masked ones."""
        return self.views if view == "masked" else 1

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return {"format": FORMAT_NAME, **_without_defaults(self)}

    @staticmethod
    def check_version(data: Mapping[str, Any]) -> None:
        """Check that this is a manifest of the format version that this program reads.

        Raises:
            StoreError: it is not.
        """
        if data.get("format") != FORMAT_NAME:
            raise StoreError(
                f"no {FORMAT_NAME} manifest in these attributes (format={data.get('format')!r}): this is some other "
                "zarr group; give the path of a store that `kdcache build` wrote"
            )
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"the store has format version {version!r}, this program reads version {FORMAT_VERSION}: its arrays "
                "would be misread; install the kdcache release that wrote it, or build the store again"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            StoreError: see `check_version`.
        """
        cls.check_version(data)
        fields = {key: value for key, value in data.items() if key != "format"}
        targets = fields["targets"]
        logits = targets["logits"]
        corpus = fields["corpus"]
        fields["teacher"] = TeacherRecord(**fields["teacher"])
        fields["corpus"] = CorpusRecord(**{**corpus, "specs": tuple(corpus["specs"])})
        fields["targets"] = TargetSpecs(
            logits=LogitsSpec(**logits) if logits else None,
            hidden=tuple(HiddenSpec(**spec) for spec in targets["hidden"]),
            attention=tuple(AttentionSpec.from_json(spec) for spec in targets["attention"]),
        )
        fields["inputs_held"] = tuple(fields["inputs_held"])
        calibration = fields.get("calibration", {})
        fields["calibration"] = {path: TransformRecord.from_json(record) for path, record in calibration.items()}
        return cls(**fields)

    def identity(self) -> dict[str, Any]:
        """What makes two builds the same build, flat: a resumed build must agree in every entry.

        Paths, software versions, batch size, device and command lines are free; where the teacher or the text were
        found does not matter as long as their contents are the same.
        """
        teacher, corpus = asdict(self.teacher), asdict(self.corpus)
        return {
            "teacher weights": teacher["weights_sha256"],
            "tokenizer": self.tokenizer_sha256,
            "corpus" if self.imported is None else "source files": corpus["fingerprint"],
            "--seq-len": self.seq_len,
            "--rows": self.row_mode,
            "number of rows (--max-rows)": self.rows,
            "first row (--part)": self.first_row,
            "--block-rows": self.block_rows,
            "--seed": self.seed,
            "--views": self.views,
            "--mlm-probability": self.mlm_probability,
            "--temperature": self.temperature,
            "--dtype": self.dtype,
            **({} if self.segments == "joined" else {"--segments": self.segments}),
            **({} if self.positions is None else {"--positions": self.positions}),
            **describe_targets(self.targets),
        }

    def differences(self, other: Manifest) -> list[tuple[str, Any, Any]]:
        """Entries of `identity` in which `self` and `other` differ, with both values, hashes beside what has them."""
        mine, theirs = ({**_LATER_ENTRIES, **one.identity()} for one in (self, other))
        return [
            (name, self._named(name, mine.get(name)), other._named(name, theirs.get(name)))
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def _named(self, name: str, value: Any) -> Any:
        """`text.txt (SHA-256 0f3a...)`: the teacher and files as the command that made the store named them."""
        files = " ".join(self.corpus.specs)
        if self.corpus.shuffle_buffer is not None:
            files += f" as far as --shuffle-buffer {self.corpus.shuffle_buffer}"
        origin = {
            "teacher weights": self.teacher.name,
            "tokenizer": f"that of {self.teacher.name}",
            "corpus": files,
            "source files": files,
        }.get(name)
        return value if origin is None or value is None else f"{origin} (SHA-256 {str(value)[:12]}...)"


_NONE_BEFORE = ("positions", "sinks", "imported", "widths", "replay", "shuffle_buffer")
_LATER_FIELDS = {"segments": "joined", "kind": "masked-lm", **dict.fromkeys(_NONE_BEFORE)}
"""Fields that stores of before do not have, with what they would say there: stores that mean that stay as they were."""


_LATER_ENTRIES = {"--segments": "joined"}
"""Entries of an identity that are left out where they say what all stores of before were."""


def _without_defaults(record: Any) -> dict[str, Any]:
    """`asdict`, but without later fields that say nothing new."""

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name not in _LATER_FIELDS or value != _LATER_FIELDS[name]}

    return asdict(record, dict_factory=keep)


def merge_manifests(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of a store from those of its groups, the first one first: all targets and all calibrations."""
    merged = manifests[0]
    for one in manifests[1:]:
        merged = replace(
            merged, targets=merged.targets.united(one.targets), calibration={**merged.calibration, **one.calibration}
        )
    return merged
