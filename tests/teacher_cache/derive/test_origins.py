"""What a derived store holds and where each of its streams comes from, or why it cannot be.."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.contract.manifest import Manifest, TransformRecord
from teacher_cache.contract.targets import FIXED_PRECISIONS, AttentionSpec, HiddenSpec, LogitsSpec, TargetSpecs
from teacher_cache.derive.origins import Derivation, plan_derivation
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import DistillationError, SettingsError, TargetsError
from teacher_cache.format.layout import StoreLayout

Plain = Callable[..., Manifest]
RECORD = TransformRecord(
    step=0.5, nmse=0.01, components={"wide": 0, "byte": 32, "pair": 0, "triple": 0, "five": 0, "zero": 0}
)


def held(codec: str, form: str = "shared", logits: str = "topk") -> TargetSpecs:
    """Logits, hidden states 2 and 4 and attention 3, which reads hidden state 2."""
    return TargetSpecs(
        logits=LogitsSpec(entries=8, codec="float16" if codec == "float16" else "root8", form=logits),  # type: ignore[arg-type]
        hidden=(HiddenSpec(layer=2, codec=codec), HiddenSpec(layer=4, codec=codec)),
        attention=(AttentionSpec(layer=3, form=form, codec=codec),),  # type: ignore[arg-type]
    )


def plan(source: Manifest, **flags: Any) -> Derivation:
    return plan_derivation(StoreLayout.of(source), DeriveSettings(src="in.zarr", dst="out.zarr", **flags))


def ways(derivation: Derivation) -> dict[str, tuple[str, str]]:
    return {origin.target.path: (origin.source.path, origin.way) for origin in derivation.origins}


def test_without_flags_everything_is_kept(plain_manifest: Plain) -> None:
    source = plain_manifest(held("nmse:0.01"), calibration={"hidden/2": RECORD, "hidden/4": RECORD})
    derivation = plan(source)
    assert ways(derivation) == {"hidden/2": ("hidden/2", "kept"), "hidden/4": ("hidden/4", "kept")}
    assert derivation.manifest.targets == source.targets
    assert derivation.manifest.calibration == {}, "it is written once the constants are"
    assert (derivation.first, derivation.manifest.rows) == (0, 40)


@pytest.mark.parametrize(
    "have, asked, way",
    [
        ("float16", "int8", "recoded"),
        ("float16", "nmse:0.01", "recoded"),
        ("int4", "nmse:0.1", "recoded"),
        ("nmse:0.01", "nmse:0.02", "coarsened"),
        ("nmse:0.01", "nmse:1e-2", "kept"),
    ],
)
def test_a_stream_goes_one_of_three_ways(plain_manifest: Plain, have: str, asked: str, way: str) -> None:
    derivation = plan(plain_manifest(held(have)), precision=asked, targets="hidden")
    assert ways(derivation) == {"hidden/2": ("hidden/2", way), "hidden/4": ("hidden/4", way)}


@pytest.mark.parametrize(
    "have, precision, form",
    [("float16", None, "input"), ("nmse:0.01", None, "input"), ("float16", "nmse:0.1", "projected")],
)
def test_attention_takes_the_hidden_state_along_that_it_shared(
    plain_manifest: Plain, have: str, precision: str | None, form: str
) -> None:
    """Its codes lie under another name then, in another metric only where they are made anew."""
    derivation = plan(plain_manifest(held(have)), targets="attention", precision=precision)
    (origin,) = derivation.origins
    assert (origin.target.path, origin.source.path) == (f"attention/3/{form}", "hidden/2")
    assert origin.target.projected == (form == "projected")
    # and it goes on sharing while that hidden state stays
    assert plan(plain_manifest(held(have)), layers="2").manifest.targets.attention[0].form == "shared"


def test_relation_matrices_stay_as_they_are(plain_manifest: Plain) -> None:
    spec = AttentionSpec(layer=3, form="matrix", codec="float16", heads=4)
    derivation = plan(plain_manifest(TargetSpecs(attention=(spec,))), precision="nmse:0.1")
    assert derivation.manifest.targets.attention == (spec,)
    assert {way for _, way in ways(derivation).values()} == {"kept"}


@given(first=st.integers(0, 39), count=st.integers(1, 40), begins=st.integers(0, 1000))
def test_rows_are_counted_from_the_start_of_the_text(
    plain_manifest: Plain, first: int, count: int, begins: int
) -> None:
    stop = min(first + count, 40)
    source = plain_manifest(held("float16"), first_row=begins)
    derivation = plan(source, row_range=f"{first}:{stop}")
    assert (derivation.first, derivation.manifest.rows) == (first, stop - first)
    assert derivation.manifest.first_row == begins + first


@pytest.mark.parametrize("flags, rows", [({"row_range": "30:"}, 10), ({"row_range": ":7"}, 7), ({"max_rows": 99}, 40)])
def test_open_ranges_end_with_the_source(plain_manifest: Plain, flags: dict[str, Any], rows: int) -> None:
    assert plan(plain_manifest(held("float16")), **flags).manifest.rows == rows


def test_fewer_ids_in_a_byte_beside_coarser_vectors(plain_manifest: Plain) -> None:
    source = plain_manifest(held("float16"))
    assert plan(source, k=3).manifest.targets.logits == LogitsSpec(entries=3, codec="float16")
    assert plan(source, precision="int8").manifest.targets.logits == LogitsSpec(entries=8, codec="root8")


def test_a_derived_store_says_what_it_was_made_from(plain_manifest: Plain) -> None:
    source = plain_manifest(held("float16"), created="2024-01-01", command="kdcache build --seed 3")
    derivation = plan(replace(source, inputs_held=("masked",)))
    assert derivation.manifest.command.endswith("in.zarr was made 2024-01-01 by: kdcache build --seed 3")
    assert derivation.manifest.inputs_held == (), "it is one group, whatever the source was"


@pytest.mark.parametrize(
    "flags, error, message",
    [
        ({"layers": "1,2,3"}, TargetsError, "lacks hidden 1, hidden 3.*It has logits, hidden 2, hidden 4, attention 3"),
        ({"attention_layer": 1}, TargetsError, "lacks attention 1"),
        ({"layers": "9"}, SettingsError, "names layer 9, the teacher has layers 1 to 4"),
        ({"targets": "hidden", "k": 4}, SettingsError, "--k 4 is about logits, which .*--targets hidden"),
        ({"targets": "logits", "layers": "2"}, SettingsError, "--layers 2 is about hidden"),
        ({"targets": "logits", "attention_layer": 3}, SettingsError, "--attention-layer 3 is about attention"),
        ({"k": 9}, SettingsError, "--k 9 is more than the 8 ids"),
        ({"precision": "nmse:1e-3"}, SettingsError, "nmse:0.001 is finer than nmse:0.01, in which .* holds hidden 2"),
        ({"precision": "int8"}, SettingsError, "int8 for hidden 2, which .* in nmse:0.01: .* nmse:X with X above 0.01"),
        ({"row_range": "40:"}, SettingsError, "'40:' is not within the 40 rows"),
        ({"row_range": "8:8"}, SettingsError, "'8:8' holds no row"),
        ({"row_range": "8:41"}, SettingsError, "'8:41' is not within"),
    ],
)
def test_what_the_source_cannot_give_is_refused_by_name(
    plain_manifest: Plain, flags: dict[str, Any], error: type[DistillationError], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(plain_manifest(held("nmse:0.01")), **flags)


def test_a_target_that_the_source_has_none_of_is_refused(plain_manifest: Plain) -> None:
    source = plain_manifest(TargetSpecs(hidden=(HiddenSpec(layer=2, codec="int8"),)))
    with pytest.raises(TargetsError, match="lacks logits, attention: .* It has hidden 2;"):
        plan(source, targets="logits,hidden,attention")


@pytest.mark.parametrize("have", FIXED_PRECISIONS)
@pytest.mark.parametrize("asked", FIXED_PRECISIONS)
def test_only_half_precision_becomes_another_fixed_precision(plain_manifest: Plain, have: str, asked: str) -> None:
    """What int8 has lost is more than int4 declares; and nothing becomes finer."""
    source, order = plain_manifest(held(have)), FIXED_PRECISIONS.index
    if asked == have or have == "float16":
        assert plan(source, precision=asked).manifest.targets.hidden[0].codec == asked
        return
    message = f"{asked} is finer than {have}" if order(asked) < order(have) else f"more than {asked} declares"
    with pytest.raises(SettingsError, match=message):
        plan(source, precision=asked)


def test_draws_cannot_be_thinned_out(plain_manifest: Plain) -> None:
    source = plain_manifest(held("int8", logits="sample"))
    with pytest.raises(SettingsError, match="cannot thin out the 8 draws"):
        plan(source, k=4)
    assert plan(source, k=8).manifest.targets.logits == source.targets.logits
