"""What the JSON objects of a store must be before anything is made of them: types, bounds, and what goes together.

A store may come from another program, another version, or somebody who means harm. Its manifest decides how much memory
is taken and what numbers mean, so every field is checked here first, and then the fields against each other. Bounds are
far beyond any model or corpus that there is; they keep a forged number from being allocated or looped over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from teacher_cache.codecs.packing import PACKINGS, ZERO
from teacher_cache.contract.positions import parse_positions
from teacher_cache.contract.targets import FIXED_PRECISIONS, MOST_DRAWS, nmse_target, parse_precision
from teacher_cache.errors import SettingsError
from teacher_cache.fields import MOST_LAYERS, Count, Layer, Sha256, StrictFields, Text, check_fields, shorten
from teacher_cache.format.attention_checks import check_relations, check_replay
from teacher_cache.storage.keys import is_safe_key

_MOST_IDS = 2**24
"""Ids are exact in three bytes."""
MOST_BLOCKS = 2**22
"""Of a store. Each is a dozen files, and a look at an unfinished store lists those that are missing."""
_LARGE_BLOCK = 2**16
"""Rows of a block that may be more than all rows: what a reader takes of memory grows with it."""

Number = Annotated[int, Field(ge=-(2**63), lt=2**64)]
ViewName = Literal["plain", "masked"]


class TeacherSchema(StrictFields):
    """`manifest.TeacherRecord`."""

    name: Text
    revision: Text | None
    weights_sha256: Sha256
    model_type: Annotated[str, Field(max_length=200)]
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    hidden_size: Annotated[int, Field(ge=1, le=2**20)]
    heads: Annotated[int, Field(ge=1, le=2**16)]
    vocab_size: Annotated[int, Field(ge=1, le=_MOST_IDS)]
    max_positions: Annotated[int, Field(ge=1, le=2**32)]
    has_mlm_head: bool
    kind: Literal["masked-lm", "causal-lm"] = "masked-lm"


class CorpusSchema(StrictFields):
    """`manifest.CorpusRecord`."""

    specs: Annotated[list[Text], Field(max_length=2**24)]
    fingerprint: Text
    documents: Count
    tokens: Count
    rows: Count
    shuffle_buffer: Count | None = None


class SinkSchema(StrictFields):
    """`manifest.SinkRecord`."""

    distance: Annotated[float, Field(gt=0)]
    share: Annotated[float, Field(gt=0, le=1)]
    variance: Annotated[float, Field(ge=0, le=1)]
    dtype: Literal["float16", "float32"]


class TransformSchema(StrictFields):
    """`manifest.TransformRecord`."""

    step: Annotated[float, Field(gt=0)]
    nmse: Annotated[float, Field(ge=0)]
    components: dict[Annotated[str, Field(max_length=40)], Annotated[int, Field(ge=0, le=2**22)]]
    earlier_steps: Annotated[list[Annotated[float, Field(gt=0)]], Field(max_length=1000)]
    sinks: SinkSchema | None = None


class LogitsSchema(StrictFields):
    """`targets.LogitsSpec`."""

    entries: Annotated[int, Field(ge=1, le=_MOST_IDS)]
    codec: Literal["float16", "root8", "exact"]
    form: Literal["topk", "sample"]
    view: ViewName


class HiddenSchema(StrictFields):
    """`targets.HiddenSpec`."""

    layer: Layer
    codec: Annotated[str, Field(max_length=40)]
    view: ViewName


class ReplaySchema(StrictFields):
    """`targets.ReplaySpec`."""

    head_width: Annotated[int, Field(ge=2, le=2**16)]
    rotated: Annotated[int, Field(ge=2, le=2**16)]


class AttentionSchema(StrictFields):
    """`targets.AttentionSpec`."""

    layer: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    form: Literal["shared", "input", "projected", "replayed", "vectors", "matrix"]
    codec: Annotated[str, Field(max_length=40)]
    view: ViewName
    heads: Annotated[int, Field(ge=1, le=2**16)] | None
    widths: Annotated[list[Annotated[int, Field(ge=1, le=2**20)]], Field(min_length=3, max_length=3)] | None = None
    replay: ReplaySchema | None = None


class TargetsSchema(StrictFields):
    """`targets.TargetSpecs`."""

    logits: LogitsSchema | None
    hidden: Annotated[list[HiddenSchema], Field(max_length=MOST_LAYERS + 1)]
    attention: Annotated[list[AttentionSchema], Field(max_length=MOST_LAYERS)]


class ManifestSchema(StrictFields):
    """`manifest.Manifest` as it stands in the attributes of a group, without its own checksum."""

    format: Literal["kdcache"]
    format_version: Annotated[int, Field(ge=1, le=1)]
    teacher: TeacherSchema
    tokenizer_sha256: Text
    corpus: CorpusSchema
    seq_len: Annotated[int, Field(ge=1, le=2**24)]
    row_mode: Literal["packed", "document"]
    rows: Annotated[int, Field(ge=1, le=2**48)]
    block_rows: Annotated[int, Field(ge=1, le=2**32)]
    seed: Number
    views: Annotated[int, Field(ge=1, le=2**16)]
    mlm_probability: Annotated[float, Field(gt=0, le=1)]
    temperature: Annotated[float, Field(gt=0, le=1e6)]
    dtype: Literal["float32", "bfloat16", "float16"]
    targets: TargetsSchema
    first_row: Count
    inputs_held: Annotated[list[ViewName], Field(max_length=2)]
    calibration: dict[Annotated[str, Field(max_length=200)], TransformSchema]
    software: dict[Text, Text]
    command: Text
    created: Text
    segments: Literal["joined", "isolated"] = "joined"
    positions: Annotated[str, Field(max_length=40)] | None = None
    imported: Annotated[str, Field(max_length=40)] | None = None


class DigestSchema(StrictFields):
    """`protocol.ObjectDigest`."""

    size: Count
    sha256: Sha256


class CommitSchema(StrictFields):
    """`protocol.Commit`."""

    block: Count
    rows: Annotated[list[Count], Field(min_length=2, max_length=2)]
    shards: dict[str, DigestSchema]


_GIVEN_UP = r"^(logits|masked|(hidden|attention)/(0|[1-9][0-9]{0,3}))$"


class GivenUpSchema(StrictFields):
    """What `given_up.py` writes."""

    folders: Annotated[list[Annotated[str, Field(pattern=_GIVEN_UP)]], Field(min_length=1, max_length=3 * MOST_LAYERS)]


class SealSchema(StrictFields):
    """`protocol.Seal`."""

    format: Literal["kdcache"]
    format_version: Annotated[int, Field(ge=1, le=1)]
    rows: Annotated[int, Field(ge=1, le=2**48)]
    blocks: Annotated[int, Field(ge=1, le=2**48)]
    bytes_per_array: dict[str, Count]
    objects: dict[str, DigestSchema]


def _in_teacher_folder(key: str) -> str:
    folder, _, name = key.partition("/")
    if folder != "teacher" or "/" in name or not is_safe_key(key):
        raise ValueError(f"{key!r} is no file of the folder teacher/")
    return key


class TeacherFilesSchema(StrictFields):
    """The list of the teacher's files."""

    files: dict[Annotated[str, AfterValidator(_in_teacher_folder)], DigestSchema]


def check_manifest(fields: Mapping[str, Any]) -> None:
    """Check a manifest's fields, and that they go together.

    Raises:
        ValueError: one is not what it must be; the message names the field, its value, and what it must be.
    """
    check_fields(ManifestSchema, fields)
    teacher, targets = fields["teacher"], fields["targets"]
    _check_positions(teacher.get("kind") == "causal-lm", fields.get("positions"), fields["seq_len"])
    _check_layers(teacher["layers"], targets)
    _check_views(teacher.get("kind") == "causal-lm", targets)
    for name in ("hidden", "attention"):
        for number, spec in enumerate(targets[name]):
            _check_codec(f"targets.{name}.{number}.codec", spec["codec"])
    for number, spec in enumerate(targets["attention"]):
        check_relations(f"targets.attention.{number}", spec)
        check_replay(f"targets.attention.{number}", spec, teacher["hidden_size"])
    if (logits := targets["logits"]) is not None:
        _check_logits(logits, teacher["vocab_size"], "plain" if fields.get("positions") else "masked")
    if fields["block_rows"] > max(_LARGE_BLOCK, fields["rows"]):
        raise ValueError(
            f"the field 'block_rows' is {fields['block_rows']} for {fields['rows']} rows: a block would be mostly "
            "room for rows that are not there"
        )
    blocks = -(-fields["rows"] // fields["block_rows"])
    if blocks > MOST_BLOCKS:
        raise ValueError(
            f"the field 'rows' is {fields['rows']}: in blocks of {fields['block_rows']} they would be {blocks} blocks, "
            f"more than the {MOST_BLOCKS} that a store can have"
        )
    if fields["seq_len"] > teacher["max_positions"]:
        raise ValueError(f"the field 'seq_len' is {fields['seq_len']}: the teacher reads {teacher['max_positions']}")
    _check_calibration(fields["calibration"], teacher["hidden_size"], targets)


def _check_layers(layers: int, targets: Mapping[str, Any]) -> None:
    for name in ("hidden", "attention"):
        named = [spec["layer"] for spec in targets[name]]
        beyond = [layer for layer in named if layer > layers]
        if beyond:
            raise ValueError(f"the field 'targets.{name}' has layer {beyond[0]}: the teacher has {layers}")
        if len(set(named)) < len(named):
            raise ValueError(f"the field 'targets.{name}' has the layers {named}: one of them twice")


def _check_views(causal: bool, targets: Mapping[str, Any]) -> None:
    for name in ("hidden", "attention"):
        for number, spec in enumerate(targets[name]):
            if causal and spec["view"] != "plain":
                place = f"targets.{name}.{number}.view"
                raise ValueError(f"the field '{place}' is {spec['view']!r}: a causal teacher reads rows as they are")


def _check_codec(place: str, codec: str) -> None:
    try:
        known = parse_precision(codec) == codec
    except SettingsError:
        known = False
    if not known:
        raise ValueError(f"the field {place!r} is {codec!r}: it must be one of {', '.join(FIXED_PRECISIONS)} or nmse:X")


def _check_positions(causal: bool, positions: str | None, seq_len: int) -> None:
    if causal and seq_len < 2:
        raise ValueError(f"the field 'seq_len' is {seq_len}: rows of a causal teacher have 2 tokens at least")
    if causal != (positions is not None):
        raise ValueError(f"the field 'positions' is {positions!r}: causal teachers have some, others none")
    try:
        known = positions is None or parse_positions(positions) == positions
    except SettingsError:
        known = False
    if not known:
        raise ValueError(f"the field 'positions' is {positions!r}: it must be all, every:N or share:X")


def _check_logits(logits: Mapping[str, Any], vocabulary: int, view: str) -> None:
    entries, sampled = logits["entries"], logits["form"] == "sample"
    most = MOST_DRAWS if sampled else vocabulary
    if entries > most:
        raise ValueError(f"the field 'targets.logits.entries' is {entries}: there can be {most} at most")
    if sampled != (logits["codec"] == "exact"):
        raise ValueError(f"the field 'targets.logits.codec' is {logits['codec']!r}: not of the form {logits['form']!r}")
    if logits["view"] != view:
        raise ValueError(f"the field 'targets.logits.view' is {logits['view']!r}: distributions are of the {view} view")


def _check_calibration(calibration: Mapping[str, Any], width: int, targets: Mapping[str, Any]) -> None:
    calibrated = {f"hidden/{spec['layer']}": width for spec in targets["hidden"] if _is_calibrated(spec)}
    for spec in filter(_is_calibrated, targets["attention"]):
        names: Sequence[str] = {"shared": [], "vectors": ["query", "key", "value"]}.get(spec["form"], [spec["form"]])
        widths = (spec.get("widths") if spec["form"] == "vectors" else None) or [width] * len(names)
        calibrated |= {f"attention/{spec['layer']}/{name}": each for name, each in zip(names, widths, strict=True)}
    for path, record in calibration.items():
        if path not in calibrated:
            raise ValueError(f"the field 'calibration' has {path!r}: no target is coded there in an nmse codec")
        components, packings = record["components"], {packing.name for packing in PACKINGS}
        if components.keys() - {ZERO} != packings or sum(components.values()) != calibrated[path]:
            raise ValueError(
                f"the field 'calibration.{path}.components' is {shorten(components)}: it must have a count for each of "
                f"{', '.join(sorted(packings))}, {calibrated[path]} together"
            )


def _is_calibrated(spec: Mapping[str, Any]) -> bool:
    return nmse_target(spec["codec"]) is not None
