"""Settings and a loaded teacher -> exactly what will be stored: target specifications and the manifest.

Every default that depends on the teacher is resolved here, and everything that the teacher cannot give is refused here,
before a row is read.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from teacher_cache.build.block_rows import USUAL, with_block_rows
from teacher_cache.build.settings import BuildSettings
from teacher_cache.codecs.logits import id_planes
from teacher_cache.contract.layers import default_attention_layer, default_relation_heads, parse_layers
from teacher_cache.contract.manifest import Manifest, Segments
from teacher_cache.contract.positions import parse_positions
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import (
    TARGETS,
    AttentionSpec,
    HiddenSpec,
    LogitsSpec,
    RelationMode,
    ReplaySpec,
    TargetSpecs,
    parse_precision,
)
from teacher_cache.corpus.corpus import Rows, tokenizer_fingerprint
from teacher_cache.errors import SettingsError, TeacherError
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.storage.base import open_storage
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.wording import command_line

_DEFAULT_SEQ_LEN = 512
_MUCH_MEMORY = 2**30
_SMALL_BLOCK = 1024
"""Rows of a block that may have room for more than there are."""
_FLAGS_OF = {
    "logits": ("logits", "k", "temperature"),
    "hidden": ("layers",),
    "attention": ("attention_layer", "relations", "relation_heads"),
}
"""The flags that are about one target alone."""


def plan_targets(
    settings: BuildSettings, teacher: Teacher, note: Callable[[str], None]
) -> tuple[TargetSpecs, dict[int, AttentionProjections]]:
    """What will be kept, and the projections of attention layers that are computed from what they read.

    Raises:
        TeacherError: the teacher cannot give a target that was asked for.
        SettingsError: a layer does not exist, or more ids are to be kept than the vocabulary has.
    """
    names, codec = settings.target_names(), parse_precision(settings.precision)
    causal = teacher.record.causal
    if names is None and causal and teacher.record.has_mlm_head:
        # every layer would cost ten times as much as the draws at each position
        names = ("logits",)
    if names is None:
        names = TARGETS if teacher.record.has_mlm_head else tuple(name for name in TARGETS if name != "logits")
        if not teacher.record.has_mlm_head:
            note(f"{settings.teacher} has no language-modelling head: building {', '.join(names)} (no logits)")
    _note_flags_of_others(settings, names, note)
    logits = _logits_spec(settings, teacher) if "logits" in names else None
    hidden: tuple[HiddenSpec, ...] = ()
    if "hidden" in names:
        layers = parse_layers(settings.layers, teacher.record.layers)
        hidden = tuple(HiddenSpec(layer=n, codec=codec, view=settings.hs_view) for n in layers)
    attention: tuple[AttentionSpec, ...] = ()
    projections: dict[int, AttentionProjections] = {}
    if "attention" in names:
        layer = _attention_layer(settings, teacher)
        mode, found = _relation_mode(settings, teacher, layer)
        attention = (_attention_spec(settings, teacher, layer, mode, found, note),)
        if found is not None:
            projections[layer] = found
    targets = TargetSpecs(logits=logits, hidden=hidden, attention=attention).settled(TargetSpecs())
    _check_mask_token(teacher, targets)
    return targets, projections


def _note_flags_of_others(settings: BuildSettings, names: Sequence[str], note: Callable[[str], None]) -> None:
    """No error, as it is in `derive`: a store gets more targets by its own command with other --targets."""
    for target, fields in _FLAGS_OF.items():
        given = {name: value for name in fields if (value := getattr(settings, name)) != getattr(BuildSettings, name)}
        if given and target not in names:
            flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
            note(
                f"{flags} is not used: it is about {target}, and this build keeps {', '.join(names)} alone; add "
                f"{target} to --targets if it is meant"
            )


def _logits_spec(settings: BuildSettings, teacher: Teacher) -> LogitsSpec:
    if not teacher.record.has_mlm_head:
        raise TeacherError(
            f"teacher {settings.teacher!r} has no language-modelling head in its checkpoint: its logits would come "
            "from random weights; use --targets hidden,attention, or a checkpoint that was saved with its head"
        )
    id_planes(teacher.record.vocab_size)
    teacher.probe_head()
    causal, view = teacher.record.causal, teacher.record.distribution_view
    asked = settings.entries(causal=causal)
    if settings.logits_form(causal=causal) == "sample":
        return LogitsSpec(form="sample", entries=asked, codec="exact", view=view)
    vocabulary = teacher.record.vocab_size
    entries = min(asked, vocabulary) if settings.k is None else asked
    if entries > vocabulary:
        raise SettingsError(f"--k {entries} is more than the {vocabulary} ids of the vocabulary: give a smaller number")
    # a share of the variance or a largest component means nothing for log-probabilities: one byte each
    return LogitsSpec(entries=entries, codec="float16" if settings.precision == "float16" else "root8", view=view)


def _attention_layer(settings: BuildSettings, teacher: Teacher) -> int:
    layer = settings.attention_layer
    if layer is None:
        return default_attention_layer(teacher.record.layers)
    if not 1 <= layer <= teacher.record.layers:
        raise SettingsError(
            f"--attention-layer {layer} does not exist: the teacher has layers 1 to {teacher.record.layers}; the last "
            f"but one ({default_attention_layer(teacher.record.layers)}) is the default"
        )
    return layer


def _attention_spec(
    settings: BuildSettings,
    teacher: Teacher,
    layer: int,
    mode: RelationMode,
    projections: AttentionProjections | None,
    note: Callable[[str], None],
) -> AttentionSpec:
    if mode == "hidden":
        return AttentionSpec(
            layer=layer, form="input", codec=parse_precision(settings.precision), view=settings.hs_view
        )
    if mode != "matrix":
        widths = teacher.probe_widths(layer) if projections is None else projections.widths
        replay = None if projections is None else projections.replay
        return AttentionSpec(
            layer=layer,
            form="vectors" if replay is None else "replayed",
            codec=parse_precision(settings.precision),
            view=settings.hs_view,
            widths=None if set(widths) == {teacher.record.hidden_size} else widths,
            replay=None if replay is None else ReplaySpec(head_width=replay.head_width, rotated=replay.rotated),
        )
    if teacher.record.causal:
        raise SettingsError(
            f"--relations matrix: teacher {settings.teacher!r} is a causal LM, whose relations are compared under a "
            "mask that is chosen in training, and in other numbers of heads for queries than for keys and values: one "
            "set of matrices would fit neither; use --relations qkv"
        )
    width = math.gcd(*teacher.probe_widths(layer))
    heads = settings.relation_heads or default_relation_heads(width, width)
    if width % heads:
        raise SettingsError(
            f"--relation-heads {heads} does not divide the teacher's width {width}: every relation head must get the "
            f"same number of components; {default_relation_heads(width, width)} is the default"
        )
    views = settings.views if settings.hs_view == "masked" else 1
    rows = settings.block_rows or USUAL
    per_block = 2 * len(VECTORS) * heads * resolve_seq_len(settings, teacher) ** 2 * rows * views
    if per_block > _MUCH_MEMORY:
        note(
            f"relation matrices take {per_block / 2**30:.1f} GiB of memory for each block of {rows} "
            "rows, in building and in reading: a smaller --block-rows takes less"
        )
    return AttentionSpec(layer=layer, form="matrix", codec="float16", view=settings.hs_view, heads=heads)


def _relation_mode(
    settings: BuildSettings, teacher: Teacher, layer: int
) -> tuple[RelationMode, AttentionProjections | None]:
    """How attention is kept: `hidden`, `replay`, `qkv` or `matrix`; of the first two also what computes it again.

    Unless another is asked for: `hidden` where the vectors are exact linear maps of the layer's input, `replay` where
    those of a decoder can be computed again from what its projections read, else `qkv`.
    """
    found = teacher.probe_attention(layer)
    if settings.relations in ("qkv", "matrix"):
        return settings.relations, None
    if found is not None and settings.relations != "replay":
        return "hidden", found
    if settings.relations != "hidden" and (settings.relations == "replay" or teacher.record.causal):
        replayed = teacher.probe_replay(layer, resolve_seq_len(settings, teacher))
        if replayed is not None:
            return "replay", replayed
    if settings.relations == "replay":
        raise TeacherError(
            f"family {teacher.record.model_type!r} does not make the queries, keys and values of attention layer "
            f"{layer} by three linear maps and rotary positions in halves of a head (there may be a norm of each head, "
            "one map for all three, no positions there, or some that depend on the length of the row): they could not "
            "be computed again from what these maps read; use --relations qkv"
        )
    if settings.relations == "hidden":
        raise TeacherError(
            f"family {teacher.record.model_type!r} does not compute attention layer {layer} from hidden state "
            f"{layer - 1} alone (a norm or rotary positions stand between, or its vectors have another width): its "
            "queries and keys could not be recomputed; use --relations qkv"
        )
    return "qkv", None


def make_manifest(
    settings: BuildSettings, teacher: Teacher, targets: TargetSpecs, rows: Rows, seq_len: int
) -> Manifest:
    """The manifest of the store that these settings build.

    Raises:
        SettingsError: a block would be far larger than all rows together.
    """
    refuse_large_block(settings.block_rows, len(rows))
    manifest = Manifest(
        teacher=teacher.record,
        tokenizer_sha256=tokenizer_fingerprint(teacher.tokenizer),
        corpus=rows.record,
        seq_len=seq_len,
        row_mode=settings.rows,
        rows=len(rows),
        block_rows=USUAL,
        first_row=rows.first_row,
        seed=settings.seed,
        views=settings.views,
        mlm_probability=settings.mlm_probability,
        temperature=settings.temperature,
        dtype=teacher.dtype,
        targets=targets,
        segments=resolve_segments(settings, teacher),
        positions=parse_positions(settings.positions or "all") if teacher.record.causal else None,
        software=software_versions(),
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return with_block_rows(manifest, settings.block_rows, open_storage(settings.out))


def software_versions() -> dict[str, str]:
    """What a store records of the programs that made it."""
    names = ("kdcache", "torch", "transformers", "tokenizers", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def refuse_large_block(block_rows: int | None, rows: int) -> None:
    """Refuse blocks far larger than all rows together.

    Raises:
        SettingsError: they would be.
    """
    if block_rows is not None and block_rows > (most := max(_SMALL_BLOCK, rows)):
        raise SettingsError(
            f"--block-rows {block_rows} is more than the {rows} rows that there are: a block is held in memory whole, "
            f"with room for rows that never come; give at most {most}, 64 is usual"
        )


def refuse_other_kind(settings: BuildSettings, teacher: Teacher) -> None:
    """Refuse what only masked LMs, or only causal LMs, can be asked for.

    Raises:
        SettingsError: a flag means nothing to this teacher.
    """
    kinds = {"causal-lm": "a causal LM, which reads rows as they are", "masked-lm": "a masked LM"}
    asked = {
        "--views": settings.views != BuildSettings.views,
        "--mlm-probability": settings.mlm_probability != BuildSettings.mlm_probability,
        "--hs-view masked": settings.hs_view == "masked",
    }
    help_with = "leave it out; --positions says after which positions the distribution is kept"
    if not teacher.record.causal:
        asked = {"--positions": settings.positions is not None, "--chat": settings.chat}
        help_with = "leave it out, or choose a causal LM such as Llama, Qwen or GPT-2"
    wrong = next((flag for flag, given in asked.items() if given), None)
    if wrong is not None:
        raise SettingsError(
            f"{wrong}: teacher {settings.teacher!r} is {kinds[teacher.record.kind]}, so that this would change "
            f"nothing; {help_with}"
        )


def resolve_segments(settings: BuildSettings, teacher: Teacher) -> Segments:
    """Whether documents that share a row see each other: as asked for, else not where the teacher is causal."""
    return settings.segments or ("isolated" if teacher.record.causal else "joined")


def resolve_seq_len(settings: BuildSettings, teacher: Teacher) -> int:
    """Tokens per row: as asked for, or 512 where the teacher can read that many.

    Raises:
        SettingsError: the teacher has fewer positions.
    """
    limit = teacher.record.max_positions
    if settings.seq_len is None:
        return min(_DEFAULT_SEQ_LEN, limit)
    if settings.seq_len > limit:
        raise SettingsError(
            f"--seq-len {settings.seq_len} is beyond the {limit} positions of teacher {settings.teacher!r}: it has no "
            f"embeddings for the rest; give at most {limit}"
        )
    return settings.seq_len


def _check_mask_token(teacher: Teacher, targets: TargetSpecs) -> None:
    if "masked" in targets.views() and teacher.tokenizer.mask_token_id is None:
        raise TeacherError(
            f"the tokenizer of teacher {teacher.record.name!r} has no mask token: masked views cannot be made; use "
            "--targets hidden,attention with --hs-view plain"
        )
