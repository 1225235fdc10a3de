"""What a manifest implies, against arrays and places that were worked out by hand for a store of 2 rows a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from teacher_cache.codecs.logits import SampleCodec, TopkCodec
from teacher_cache.contract.manifest import Manifest, SinkRecord, TransformRecord
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, LogitsSpec, TargetSpecs
from teacher_cache.format.arrays import ArraySpec
from teacher_cache.format.layout import StoreLayout

SmallManifest = Callable[..., Manifest]
HIDDEN = HiddenSpec(layer=2, codec="int8", view="masked")
TOPK = LogitsSpec(entries=3, codec="root8")
RECORD = TransformRecord(
    step=0.5, nmse=0.01, components={"wide": 0, "byte": 8, "pair": 16, "triple": 0, "five": 0, "zero": 8}
)
PROJECTIONS = tuple(
    f"attention/3/projection/{name}/{part}" for name in ("query", "key", "value") for part in ("weight", "bias")
)


def shapes(layout: StoreLayout) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {path: (spec.dtype, spec.block_shape) for path, spec in layout.arrays.items()}


INPUTS = {
    "input_ids": ("int32", (2, 4)),
    "length": ("int32", (2,)),
    "row_id": ("int64", (2,)),
    "document": ("int64", (2,)),
}
MASKS = {
    "masked/positions": ("int32", (4, 1)),
    "masked/original_ids": ("int32", (4, 1)),
    "masked/replacement_ids": ("int32", (4, 1)),
    "masked/count": ("int32", (4,)),
}


def test_hidden_states_and_the_most_probable_ids(small_manifest: SmallManifest) -> None:
    layout = StoreLayout.of(small_manifest(TargetSpecs(logits=TOPK, hidden=(HIDDEN,))))
    assert shapes(layout) == {
        **INPUTS,
        **MASKS,
        "logits/ids/low": ("uint8", (3, 4)),
        "logits/ids/middle": ("uint8", (3, 4)),
        "logits/log_probs": ("uint8", (3, 4)),
        "logits/log_tail": ("float16", (4,)),
        "hidden/2/codes": ("int8", (32, 16)),
        "hidden/2/scale": ("float32", (16,)),
    }
    assert layout.arrays["hidden/2/codes"].chunk_shape == (32, 8), "a chunk holds one view"
    assert tuple(layout.constants) == ("hidden/2/variance",)
    assert layout.logits == TopkCodec(entries=3, vocab_size=300, log_probs="root8") and not layout.draw_paths
    assert layout.codecs["hidden/2"].name == "int8" and not layout.nmse_streams


def test_what_an_earlier_group_holds_is_not_held_twice(small_manifest: SmallManifest) -> None:
    targets = TargetSpecs(hidden=(HIDDEN,))
    assert set(shapes(StoreLayout.of(small_manifest(targets, inputs_held=("plain",))))) == {
        *MASKS, "hidden/2/codes", "hidden/2/scale",
    }  # fmt: skip
    assert set(shapes(StoreLayout.of(small_manifest(targets, inputs_held=("plain", "masked"))))) == {
        "hidden/2/codes", "hidden/2/scale",
    }  # fmt: skip


def test_drawn_ids_lie_one_view_to_a_row_and_are_counted_by_their_places(small_manifest: SmallManifest) -> None:
    layout = StoreLayout.of(small_manifest(TargetSpecs(logits=LogitsSpec(form="sample", entries=5, codec="exact"))))
    assert layout.logits == SampleCodec(draws=5, vocab_size=300)
    assert shapes(layout)["logits/draws/distinct"] == ("uint8", (4,))
    assert layout.draw_paths == {name: f"logits/draws/{name}" for name in ("ids/low", "ids/middle", "counts")}
    for path in layout.draw_paths.values():
        assert layout.arrays[path].block_shape == (2, 2**15)
        assert layout.arrays[path].counted_by == "logits/draws/distinct"
        assert list(layout.arrays).index(path) > list(layout.arrays).index("logits/draws/distinct")


def test_an_nmse_stream_has_arrays_once_it_is_calibrated(small_manifest: SmallManifest) -> None:
    spec = AttentionSpec(layer=3, form="projected", codec="nmse:0.01")
    before = small_manifest(TargetSpecs(attention=(spec,)))
    layout = StoreLayout.of(before)
    assert shapes(layout) == INPUTS and not layout.codecs
    assert [stream.path for stream in layout.uncalibrated] == ["attention/3/projected"]
    assert tuple(layout.constants) == (
        *(f"attention/3/projected/{name}" for name in ("basis", "mean", "step")),
        *PROJECTIONS,
    )
    layout = StoreLayout.of(replace(before, calibration={"attention/3/projected": RECORD}))
    assert not layout.uncalibrated and layout.stream("attention/3/projected").calibration == RECORD
    packed = {path: one for path, one in shapes(layout).items() if path not in INPUTS}
    escapes = {"count": ("int32", (1,)), "index": ("int32", (1, 2**14)), "value": ("int16", (1, 2**14))}
    assert packed == {
        "attention/3/projected/codes/byte": ("int8", (8, 8)),
        "attention/3/projected/codes/pair": ("uint8", (16, 4)),
        **{f"attention/3/projected/escapes/{name}": one for name, one in escapes.items()},
    }
    assert layout.arrays_in("attention/3/projected") == list(packed)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("tokens, room", [(800, 333), (100, 64), (8, 8)])
def test_tokens_that_are_kept_as_they_are_have_room_for_four_times_their_share(
    small_manifest: SmallManifest, dtype: str, tokens: int, room: int
) -> None:
    """Of 800 tokens a view, 4/10 + 1/64 of them, rounded up, and 64 at least; queries, keys and values side by side."""
    spec = AttentionSpec(layer=3, form="projected", codec="nmse:0.01")
    sinks = SinkRecord(distance=3.0, share=0.1, variance=0.9, dtype=dtype)  # type: ignore[arg-type]
    path = "attention/3/projected"
    manifest = small_manifest(TargetSpecs(attention=(spec,)))
    manifest = replace(manifest, block_rows=tokens // manifest.seq_len)
    without, layout = (
        StoreLayout.of(replace(manifest, calibration={path: record}))
        for record in (RECORD, replace(RECORD, sinks=sinks))
    )
    added = {name: one for name, one in shapes(layout).items() if name not in without.arrays}
    assert added == {
        f"{path}/sinks/count": ("int32", (1,)),
        f"{path}/sinks/index": ("int32", (1, room)),
        f"{path}/sinks/value": (dtype, (1, room, 96)),
    }
    value = layout.arrays[f"{path}/sinks/value"]
    assert value.counted_by == f"{path}/sinks/count" and value.part_of_view(0) == (
        slice(0, 1),
        slice(0, room),
        slice(0, 96),
    )


def test_arrays_in_a_folder_do_not_include_those_of_one_whose_name_goes_on(small_manifest: SmallManifest) -> None:
    hidden = tuple(HiddenSpec(layer=layer, codec="float16") for layer in (1, 10))
    layout = StoreLayout.of(small_manifest(TargetSpecs(hidden=hidden)))
    assert layout.arrays_in("hidden/1") == ["hidden/1/codes"]
    assert layout.arrays_in("length", "hidden/10") == ["length", "hidden/10/codes"]
    assert layout.arrays_in() == []
    with pytest.raises(KeyError):
        layout.stream("hidden/2")


def test_places_of_rows_and_views_are_those_of_the_axes_they_are_named_after(small_manifest: SmallManifest) -> None:
    """Numbers that say which view, row and token they belong to, found again by `rows_of` and `part_of_view`."""
    layout = StoreLayout.of(small_manifest(TargetSpecs(logits=TOPK, hidden=(HIDDEN,))))
    view_WRT, row_WRT, token_WRT = np.indices((2, 2, 4))
    number_WRT = 100 * view_WRT + 10 * row_WRT + token_WRT
    codes_DN = np.broadcast_to(number_WRT.reshape(1, -1), layout.arrays["hidden/2/codes"].block_shape)
    assert codes_DN[layout.rows_of("hidden/2/codes", 3, 4)][0].tolist() == [110, 111, 112, 113], "row 1 of view 1"
    scale_N = number_WRT.ravel()
    assert scale_N[layout.rows_of("hidden/2/scale", 1, 3)].tolist() == [10, 11, 12, 13, 100, 101, 102, 103]
    assert scale_N[layout.arrays["hidden/2/scale"].part_of_view(1)].tolist() == number_WRT[1].ravel().tolist()
    count_R = np.array([0, 10, 100, 110])
    assert count_R[layout.rows_of("masked/count", 2, 4)].tolist() == [100, 110]
    assert count_R[layout.arrays["masked/count"].part_of_view(1)].tolist() == [100, 110]
    assert layout.arrays["input_ids"].part_of_view(1) == (slice(0, 2), slice(0, 4)), "the same ids for every view"
    tail_P = np.array([0, 10, 100, 110])
    assert tail_P[layout.rows_of("logits/log_tail", 1, 3)].tolist() == [10, 100]


def test_a_ragged_array_gives_all_the_room_of_a_view() -> None:
    spec = ArraySpec(
        path="a/index",
        dtype="int32",
        block_shape=(3, 8),
        chunk_shape=(1, 4),
        view_axis=0,
        views=3,
        counted_by="a/count",
    )
    assert spec.part_of_view(2) == (slice(2, 3), slice(0, 8))


def attention(form: str, codec: str = "float16", **changes: object) -> AttentionSpec:
    return AttentionSpec(layer=3, form=form, codec=codec, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec, paths, computed",
    [
        (attention("shared"), ["hidden/2"], True),
        (attention("input"), ["attention/3/input"], True),
        (attention("projected", "nmse:0.01"), ["attention/3/projected"], True),
        (attention("vectors"), [f"attention/3/{name}" for name in ("query", "key", "value")], False),
        (attention("matrix", heads=4), [f"attention/3/relations/{name}" for name in ("query", "key", "value")], False),
    ],
    ids=lambda value: value.form if isinstance(value, AttentionSpec) else "",
)
def test_attention_is_read_from_the_streams_of_its_form(
    small_manifest: SmallManifest, spec: AttentionSpec, paths: list[str], computed: bool
) -> None:
    layout = StoreLayout.of(small_manifest(TargetSpecs(attention=(spec,))))
    streams = layout.attention[3]
    assert [stream.path for stream in streams] == paths
    assert [stream.layer for stream in streams] == ([2] if computed else [3, 3, 3])
    assert layout.attention_input(3) == (streams[0] if computed else None)
    assert set(PROJECTIONS) <= set(layout.constants) or not computed
    # a hidden state that is shared is stored where it is a target of its own
    assert layout.streams == (() if spec.form == "shared" else streams)
    assert [stream.projected for stream in streams] == [spec.form == "projected"] * len(streams)


def test_relations_are_matrices_of_whole_rows(small_manifest: SmallManifest) -> None:
    layout = StoreLayout.of(small_manifest(TargetSpecs(attention=(attention("matrix", heads=4, view="masked"),))))
    path = "attention/3/relations/key"
    assert layout.coded_paths(path) == {"": path} and layout.stream(path).width == 4 * 4
    assert shapes(layout)[path] == ("float16", (4, 4, 4, 4)), "two views of two rows, four heads of four tokens"
    assert layout.arrays[path].chunk_shape == (1, 4, 4, 4)
    assert layout.rows_of(path, 2, 3) == (slice(2, 3),)
    assert layout.arrays[path].part_of_view(1)[0] == slice(2, 4)
