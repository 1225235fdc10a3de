"""What a store keeps of the teacher's outputs: one specification per target. Standard library only.

`--targets`, `--layers`, `--relations` and `--precision` become these records once, when a build is planned; everything
after that reads them. Layers are 1-based; hidden state 0 is the embedding output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

View = Literal["plain", "masked"]
RelationMode = Literal["hidden", "replay", "qkv", "matrix"]
LogitsForm = Literal["topk", "sample"]
AttentionForm = Literal["shared", "input", "projected", "replayed", "vectors", "matrix"]

VIEWS: tuple[View, ...] = ("plain", "masked")
"""The views in the order in which they are read."""

FIXED_PRECISIONS = ("float16", "int8", "int4")
MOST_DRAWS = 255
"""How often an id was drawn, and how many ids are distinct, is kept in one byte."""
_NMSE = "nmse:"
_NMSE_RANGE = (1e-6, 0.5)


_CODEC_ERRORS = {
    "float16": "relative 2^-11",
    "int8": "at most 1/254 of the token's largest magnitude",
    "int4": "at most 1/14 of the largest magnitude among 32 components of the token",
    "root8": "of a probability at most 1.6% near 1, 2.8% at 0.01, 5.1% at 1e-4, 17% at 1e-8; 0 below 2e-22",
    "exact": "none in ids and counts; stratified draws, counts / draws are unbiased",
}
TARGETS = ("logits", "hidden", "attention")


def nmse_target(codec: str) -> float | None:
    """The normalised mean squared error that a codec `nmse:<x>` is calibrated to; None for every other codec."""
    return float(codec.removeprefix(_NMSE)) if codec.startswith(_NMSE) else None


def parse_precision(text: str) -> str:
    """The codec that `--precision` names, equal numbers written equally: `nmse:1e-2` is `nmse:0.01`.

    Raises:
        SettingsError: there is no such precision.
    """
    if text in FIXED_PRECISIONS:
        return text
    least, most = _NMSE_RANGE
    try:
        target = nmse_target(text)
    except ValueError:
        target = None
    if target is None or not least <= target <= most:
        raise SettingsError(
            f"--precision {text!r} is unknown: targets could be neither written nor read; "
            f"{did_you_mean(text, FIXED_PRECISIONS)} {', '.join(FIXED_PRECISIONS)} or nmse:X, X being the share of the "
            f"variance that may be lost, from {least:g} to {most:g}"
        )
    return f"{_NMSE}{target:g}"


@dataclass(frozen=True, kw_only=True)
class LogitsSpec:
    """The teacher's distribution at the masked positions.

    `topk`: its `entries` most probable ids and the mass outside them. `sample`: `entries` ids drawn from it, one in
    each of `entries` equal shares of its mass, so that a count over `entries` has the probability as its expectation.
    """

    entries: int
    codec: str
    form: LogitsForm = "topk"
    view: View = "masked"


@dataclass(frozen=True, kw_only=True)
class HiddenSpec:
    """Hidden state `layer`: what Transformers reports as `hidden_states[layer]` (0 is the embedding output)."""

    layer: int
    codec: str
    view: View = "plain"


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """What an attention layer does with what its projections give: heads of `head_width` components side by side.

    The first `rotated` components of each head of the queries and keys are turned by the token's position, one half of
    them against the other (RoFormer, Su et al., 2021, as Llama arranges it); the others and the values stay.
    """

    head_width: int
    rotated: int


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Queries, keys and values of layer `layer` (1-based), as its attention function receives them.

    How they are held:

    - `shared`: computed from hidden state `layer - 1`, which is a hidden-state target of the same view and codec;
    - `input`: computed from that hidden state, which is kept for this target alone;
    - `projected`: the same in an `nmse` codec, coded in the metric of the queries, keys and values;
    - `replayed`: computed from what the layer's projections read, behind its norm, which is kept for this target
      alone, and then turned by positions, as `replay` says; in an `nmse` codec coded in the metric of the three;
    - `vectors`: the three vectors themselves;
    - `matrix`: not the vectors but their relations in `heads` relation heads, softmax(x x^T / sqrt(d)), in float16.

    `widths` are those of the three vectors, all heads side by side, where they are not all as wide as the hidden
    states: a decoder whose query heads share keys and values, or an attention that is narrower. Such vectors are
    replayed, or kept themselves.
    """

    layer: int
    form: AttentionForm
    codec: str
    view: View = "plain"
    heads: int | None = None
    widths: tuple[int, int, int] | None = None
    replay: ReplaySpec | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what JSON has made of a specification; fields that came later may be absent."""
        widths, replay = data.get("widths"), data.get("replay")
        return cls(
            **{
                **data,
                "widths": None if widths is None else tuple(widths),
                "replay": None if replay is None else ReplaySpec(**replay),
            }
        )

    def vector_widths(self, hidden_size: int) -> tuple[int, int, int]:
        """Widths of queries, keys and values of a teacher whose hidden states are `hidden_size` wide."""
        return self.widths or (hidden_size, hidden_size, hidden_size)

    @property
    def mode(self) -> RelationMode:
        """What `--relations` calls it. How it is held is said by its streams, `contract/streams.py`."""
        modes: dict[AttentionForm, RelationMode] = {"replayed": "replay", "vectors": "qkv", "matrix": "matrix"}
        return modes.get(self.form, "hidden")


@dataclass(frozen=True, kw_only=True)
class TargetSpecs:
    """Everything that a store keeps of the teacher's outputs."""

    logits: LogitsSpec | None = None
    hidden: tuple[HiddenSpec, ...] = ()
    attention: tuple[AttentionSpec, ...] = ()

    def views(self) -> tuple[View, ...]:
        """The views that the teacher must read for these targets, `plain` first."""
        used = {spec.view for spec in self.hidden} | {spec.view for spec in self.attention}
        if self.logits is not None:
            used.add(self.logits.view)
        return tuple(view for view in VIEWS if view in used)

    def hidden_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states are kept, ascending."""
        return tuple(sorted(spec.layer for spec in self.hidden))

    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose queries, keys and values are kept, ascending."""
        return tuple(sorted(spec.layer for spec in self.attention))

    def find_hidden(self, layer: int) -> HiddenSpec | None:
        """The specification of hidden state `layer`, or None."""
        return next((spec for spec in self.hidden if spec.layer == layer), None)

    def find_attention(self, layer: int) -> AttentionSpec | None:
        """The specification of attention layer `layer`, or None."""
        return next((spec for spec in self.attention if spec.layer == layer), None)

    def united(self, other: TargetSpecs) -> TargetSpecs:
        """The targets of both."""
        return TargetSpecs(
            logits=self.logits or other.logits,
            hidden=tuple(sorted({*self.hidden, *other.hidden}, key=lambda spec: spec.layer)),
            attention=tuple(sorted({*self.attention, *other.attention}, key=lambda spec: spec.layer)),
        )

    def beyond(self, held: TargetSpecs) -> TargetSpecs:
        """The targets that `held` lacks, whatever their view and codec are there."""
        return TargetSpecs(
            logits=self.logits if held.logits is None else None,
            hidden=tuple(spec for spec in self.hidden if held.find_hidden(spec.layer) is None),
            attention=tuple(spec for spec in self.attention if held.find_attention(spec.layer) is None),
        )

    def within(self, held: TargetSpecs) -> TargetSpecs:
        """The targets that `held` has too, in whatever view and codec."""
        lacking = self.beyond(held)
        return TargetSpecs(
            logits=None if lacking.logits else self.logits,
            hidden=tuple(spec for spec in self.hidden if spec not in lacking.hidden),
            attention=tuple(spec for spec in self.attention if spec not in lacking.attention),
        )

    def settled(self, held: TargetSpecs) -> TargetSpecs:
        """These targets with the form of each attention target in `hidden` mode chosen, beside targets `held` already.

        A hidden state that is a target of the same view and codec is shared; else it is kept for the attention alone.
        """

        def settle(spec: AttentionSpec) -> AttentionSpec:
            if spec.mode != "hidden":
                return spec
            hidden = self.find_hidden(spec.layer - 1) or held.find_hidden(spec.layer - 1)
            if hidden is not None and (hidden.view, hidden.codec) == (spec.view, spec.codec):
                return replace(spec, form="shared")
            return replace(spec, form="input" if nmse_target(spec.codec) is None else "projected")

        return replace(self, attention=tuple(map(settle, self.attention)))

    def __bool__(self) -> bool:
        return bool(self.logits or self.hidden or self.attention)


def declared_error(codec: str) -> str:
    """How far what a codec gives back may be from what it was given, in words."""
    target = nmse_target(codec)
    return _CODEC_ERRORS[codec] if target is None else f"{target:g} of the variance on average"


def declared_errors(targets: TargetSpecs) -> dict[str, str]:
    """The declared error of each target, under the names of `describe_targets`."""
    errors = {} if targets.logits is None else {"logits": declared_error(targets.logits.codec)}
    errors |= {f"hidden {spec.layer}": declared_error(spec.codec) for spec in targets.hidden}
    return errors | {f"attention {spec.layer}": declared_error(spec.codec) for spec in targets.attention}


def describe_targets(targets: TargetSpecs) -> dict[str, str]:
    """One line per target, in words a user knows: `{"hidden 4": "plain view, int8"}`."""
    lines: dict[str, str] = {}
    if targets.logits is not None:
        spec = targets.logits
        lines["logits"] = f"{spec.form} {spec.entries}, {spec.view} view, {spec.codec}"
    for hidden in targets.hidden:
        lines[f"hidden {hidden.layer}"] = f"{hidden.view} view, {hidden.codec}"
    for attention in targets.attention:
        mode = attention.mode if attention.heads is None else f"{attention.mode} of {attention.heads} relation heads"
        lines[f"attention {attention.layer}"] = f"{mode}, {attention.view} view, {attention.codec}"
    return lines


def target_names_of(text: str) -> tuple[str, ...]:
    """The targets that `--targets` names, in the order in which they are built.

    Raises:
        SettingsError: one of them does not exist, or none is named.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise SettingsError(
            f"--targets {text!r} names {(unknown or [''])[0]!r}: no such target, so nothing could be kept; "
            f"{did_you_mean((unknown or [''])[0], TARGETS)} one or more of {', '.join(TARGETS)}"
        )
    return names
