"""What a derived store holds, and which stream of its source each of its streams is made from.

The source's manifest and the settings -> the manifest of the derived store, or a refusal that names what cannot be. A
stream of vectors goes one of three ways:

    kept       same codec: its codes and constants are those of the source
    coarsened  nmse:a -> nmse:b: same rotation, a larger step
    recoded    float16 -> int8, int4, and any of these -> nmse:b: decoded and coded anew

Where attention shared a hidden state that the derived store leaves out, it keeps the codes of that hidden state for
itself, in the form `input`. Nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal

from teacher_cache.contract.layers import parse_layers
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VectorStream
from teacher_cache.contract.targets import (
    FIXED_PRECISIONS,
    AttentionForm,
    AttentionSpec,
    HiddenSpec,
    LogitsSpec,
    TargetSpecs,
    describe_targets,
    nmse_target,
    parse_precision,
)
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import SettingsError, TargetsError
from teacher_cache.format.layout import StoreLayout
from teacher_cache.wording import command_line


@dataclass(frozen=True, kw_only=True)
class StreamOrigin:
    """A stream of the derived store, not yet calibrated, and the one of the source that it is made from."""

    target: VectorStream
    source: VectorStream

    @property
    def way(self) -> Literal["kept", "coarsened", "recoded"]:
        """What is done to it."""
        if self.target.codec == self.source.codec:
            return "kept"
        return "recoded" if self.source.target_nmse is None else "coarsened"


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A derived store before it is calibrated: its rows are those from `first` on of the source."""

    source: StoreLayout
    manifest: Manifest
    first: int

    @cached_property
    def origins(self) -> tuple[StreamOrigin, ...]:
        """Where each stream comes from."""
        held = {stream.path for stream in self.source.streams}
        return tuple(
            StreamOrigin(target=stream, source=self.source.stream(self._source_path(stream, held)))
            for stream in StoreLayout.of(self.manifest).streams
        )

    def _source_path(self, stream: VectorStream, held: Iterable[str]) -> str:
        if stream.path in held:
            return stream.path
        # the input of an attention layer, under another name
        shared = self.source.attention_input(stream.layer + 1)
        assert shared is not None
        return shared.path


def plan_derivation(layout: StoreLayout, settings: DeriveSettings) -> Derivation:
    """What the settings make of a source.

    Raises:
        TargetsError: the source lacks a layer or target that is asked for.
        SettingsError: more rows, more entries or a finer precision are asked for than the source has.
    """
    source = layout.manifest
    first, stop = _row_range(source, settings)
    manifest = replace(
        source,
        rows=stop - first,
        first_row=source.first_row + first,
        targets=_choose_targets(source, settings),
        inputs_held=(),
        calibration={},
        command=f"{command_line()}; {settings.src} was made {source.created} by: {source.command[:100_000]}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Derivation(source=layout, manifest=manifest, first=first)


def _row_range(source: Manifest, settings: DeriveSettings) -> tuple[int, int]:
    first, stop = settings.rows_asked()
    stop = source.rows if stop is None else stop
    if settings.max_rows is not None:
        stop = min(stop, source.rows)
    if not first < stop <= source.rows:
        raise SettingsError(
            f"--row-range {settings.row_range!r} is not within the {source.rows} rows of {settings.src!r}: there would "
            f"be nothing to keep; rows are counted from 0, so give A:B with A < B <= {source.rows}"
        )
    return first, stop


def _choose_targets(source: Manifest, settings: DeriveSettings) -> TargetSpecs:
    held = source.targets
    names = settings.target_names()
    if names is None:
        names = tuple(dict.fromkeys(name.split()[0] for name in describe_targets(held)))
    _refuse_flags_of_others(settings, names)
    layers, attention_layers = held.hidden_layers(), held.attention_layers()
    if settings.layers is not None:
        layers = parse_layers(settings.layers, source.teacher.layers)
    if settings.attention_layer is not None:
        attention_layers = (settings.attention_layer,)
    wanted = {
        "logits": ("logits",),
        "hidden": tuple(f"hidden {n}" for n in layers) or ("hidden",),
        "attention": tuple(f"attention {n}" for n in attention_layers) or ("attention",),
    }
    lacking = [what for name in names for what in wanted[name] if what not in describe_targets(held)]
    if lacking:
        raise TargetsError(
            f"{settings.src!r} lacks {', '.join(lacking)}: without the teacher it cannot be made. It has "
            f"{', '.join(describe_targets(held))}; ask for some of these, or add the others to {settings.src!r} with "
            "`kdcache build`"
        )
    hidden: tuple[HiddenSpec, ...] = ()
    if "hidden" in names:
        hidden = tuple(_coarser_hidden(spec, settings) for spec in held.hidden if spec.layer in layers)
    attention: tuple[AttentionSpec, ...] = ()
    if "attention" in names:
        chosen = [spec for spec in held.attention if spec.layer in attention_layers]
        attention = tuple(_coarser_attention(spec, hidden, settings) for spec in chosen)
    logits = _fewer_entries(held.logits, settings) if "logits" in names and held.logits is not None else None
    return TargetSpecs(logits=logits, hidden=hidden, attention=attention)


def _refuse_flags_of_others(settings: DeriveSettings, names: tuple[str, ...]) -> None:
    """A flag for a target that is left out is a mistake in one of the two."""
    for target, flag, value in (
        ("logits", "--k", settings.k),
        ("hidden", "--layers", settings.layers),
        ("attention", "--attention-layer", settings.attention_layer),
    ):
        if value is not None and target not in names:
            raise SettingsError(
                f"{flag} {value} is about {target}, which the derived store would not have (--targets "
                f"{','.join(names)}): it would change nothing; leave {flag} out or add {target} to --targets"
            )


def _fewer_entries(spec: LogitsSpec, settings: DeriveSettings) -> LogitsSpec:
    entries = spec.entries if settings.k is None else settings.k
    if spec.form == "sample" and entries != spec.entries:
        raise SettingsError(
            f"--k {entries} cannot thin out the {spec.entries} draws a position in {settings.src!r}: they stand for "
            "equal shares of the distribution, and some of them alone would be biased; leave --k out"
        )
    if entries > spec.entries:
        raise SettingsError(
            f"--k {entries} is more than the {spec.entries} ids a position in {settings.src!r}: the probabilities of "
            "the others are lost; give a smaller number"
        )
    # as in a build: one byte is enough beside any precision but float16
    coarser = spec.codec == "float16" and settings.precision not in (None, "float16")
    return replace(spec, entries=entries, codec="root8" if coarser else spec.codec)


def _coarser_hidden(spec: HiddenSpec, settings: DeriveSettings) -> HiddenSpec:
    return replace(spec, codec=_coarser(f"hidden {spec.layer}", spec.codec, settings))


def _coarser_attention(spec: AttentionSpec, hidden: Iterable[HiddenSpec], settings: DeriveSettings) -> AttentionSpec:
    if spec.form == "matrix":  # as in a build, relations keep half precision
        return spec
    codec = _coarser(f"attention {spec.layer}", spec.codec, settings)
    form: AttentionForm = spec.form
    if form == "shared" and spec.layer - 1 not in {one.layer for one in hidden}:
        form = "input"
    if form == "input" and nmse_target(codec) is not None and nmse_target(spec.codec) is None:
        form = "projected"
    return replace(spec, form=form, codec=codec)


def _coarser(what: str, have: str, settings: DeriveSettings) -> str:
    """The codec of a stream in the derived store."""
    if settings.precision is None or (wanted := parse_precision(settings.precision)) == have:
        return have
    before, after = nmse_target(have), nmse_target(wanted)
    if before is not None and after is None:
        raise SettingsError(
            f"--precision {wanted} for {what}, which {settings.src!r} holds in {have}: a fixed precision would take "
            f"more room for nothing more exact; give nmse:X with X above {before:g}"
        )
    if before is not None and after is not None:
        finer = after < before
    else:
        finer = after is None and FIXED_PRECISIONS.index(wanted) < FIXED_PRECISIONS.index(have)
    if after is None and not finer and have != "float16":
        raise SettingsError(
            f"--precision {wanted} for {what}, which {settings.src!r} holds in {have}: what both round away is more "
            f"than {wanted} declares; give nmse:X, the error of which is measured and counts from the teacher"
        )
    if finer:
        raise SettingsError(
            f"--precision {wanted} is finer than {have}, in which {settings.src!r} holds {what}: what was rounded away "
            "is lost, and it would only take more room; give a coarser one, or leave --precision out"
        )
    return wanted
