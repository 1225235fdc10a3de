"""Every row is read once in each view, in whatever batches, and as the teacher reads it alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.build.passes import TeacherPass, run_streams, run_views
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS, vector_streams
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, LogitsSpec, TargetSpecs
from teacher_cache.corpus.corpus import Rows
from teacher_cache.corpus.masking import mask_rows
from teacher_cache.teacher.teacher import Teacher

Plain = Callable[..., Manifest]


@pytest.fixture(scope="module")
def manifest(plain_manifest: Plain) -> Manifest:
    """Hidden states of the plain view, queries, keys and values of the masked ones."""
    targets = TargetSpecs(
        logits=LogitsSpec(entries=8, codec="root8"),
        hidden=(HiddenSpec(layer=2, codec="float16"), HiddenSpec(layer=0, codec="float16")),
        attention=(AttentionSpec(layer=3, form="vectors", codec="float16", view="masked"),),
    )
    return plain_manifest(targets, views=2)


def read(manifest: Manifest, teacher: Teacher, rows: Rows, batch_rows: int, count: int = 11) -> list[TeacherPass]:
    block = rows.read(3, 3 + count)
    return list(run_views(manifest, teacher, vector_streams(manifest), block, batch_rows, ("plain", "masked")))


@settings(max_examples=8)
@given(batch_rows=st.integers(1, 13))
def test_batches_hold_every_row_once_in_every_view(
    manifest: Manifest, small_teacher: Teacher, small_rows: Rows, batch_rows: int
) -> None:
    passes = read(manifest, small_teacher, small_rows, batch_rows)
    length_B = torch.from_numpy(small_rows.read(3, 14).length_B)
    for view, masked_view in (("plain", 0), ("masked", 0), ("masked", 1)):
        mine = [one for one in passes if (one.view, one.masked_view) == (view, masked_view)]
        assert [one.first for one in mine] == list(range(0, 11, batch_rows))
        real_BT = torch.cat([one.real_BT for one in mine])
        assert torch.equal(real_BT.sum(dim=1), length_B.long())
    assert len(passes) == 3 * -(-11 // batch_rows)


def test_what_is_read_does_not_depend_on_the_batch(
    manifest: Manifest, small_teacher: Teacher, small_rows: Rows
) -> None:
    alone, together = (read(manifest, small_teacher, small_rows, batch_rows) for batch_rows in (1, 11))
    for one in together:
        for other in (part for part in alone if (part.view, part.masked_view) == (one.view, one.masked_view)):
            real_T = other.real_BT[0]
            for layer, values_BTD in one.outputs.hidden.items():
                have_TD, want_TD = values_BTD[other.first], other.outputs.hidden[layer][0]
                assert torch.allclose(have_TD[real_T], want_TD[real_T], atol=1e-4)
            assert one.outputs.attention.keys() == other.outputs.attention.keys()


def test_each_view_gives_the_streams_that_are_taken_from_it(
    manifest: Manifest, small_teacher: Teacher, small_rows: Rows
) -> None:
    for one in read(manifest, small_teacher, small_rows, 11):
        assert set(one.outputs.hidden) == ({0, 2} if one.view == "plain" else set())
        assert set(one.outputs.attention) == ({3} if one.view == "masked" else set())
        assert (one.masked is None) == (one.view == "plain")


def test_masks_are_those_of_the_rows_in_each_masked_view(
    manifest: Manifest, small_teacher: Teacher, small_rows: Rows
) -> None:
    """And the teacher reads the row with them: its embeddings differ from the plain ones where the ids do."""
    block, tokenizer = small_rows.read(3, 14), small_teacher.tokenizer
    for one in read(manifest, small_teacher, small_rows, 11):
        if one.masked is None:
            continue
        want = mask_rows(
            block.input_ids_BT, block.length_B, block.row_id_B, special_ids=tokenizer.all_special_ids,
            mask_id=tokenizer.mask_token_id, vocab_size=200, places=4, probability=0.15, seed=0, view=one.masked_view,
        )  # fmt: skip
        for name, values in vars(want).items():
            assert np.array_equal(getattr(one.masked, name), values)
        ids_BT = torch.from_numpy(want.apply(block.input_ids_BT)).long()
        again = small_teacher.run(ids_BT, torch.from_numpy(block.length_B), attention_layers=[3])
        for name in VECTORS:
            have, direct = (getattr(one_.attention[3], f"{name}_BTD") for one_ in (one.outputs, again))
            assert torch.equal(have, direct)


def test_streams_of_some_rows_with_the_row_that_each_batch_begins_with(
    manifest: Manifest, small_teacher: Teacher, small_rows: Rows
) -> None:
    """Views that no stream is taken from are not run."""
    hidden = [stream for stream in vector_streams(manifest) if stream.source == "hidden"]
    seen: list[tuple[int, str]] = []
    parts: dict[str, list[Any]] = {stream.path: [] for stream in hidden}
    for first, stream, values_BTD, real_BT in run_streams(manifest, small_teacher, hidden, small_rows, range(5, 12), 3):
        assert stream.view == "plain" and values_BTD.shape[:2] == real_BT.shape
        seen.append((first, stream.path))
        parts[stream.path].append(values_BTD)
    assert sorted(seen) == sorted((first, stream.path) for first in (5, 8, 11) for stream in hidden)
    block = small_rows.read(5, 12)
    want = small_teacher.run(
        torch.from_numpy(block.input_ids_BT).long(), torch.from_numpy(block.length_B), hidden_layers=[0, 2]
    )
    for stream in hidden:
        have = torch.cat(parts[stream.path])
        real_BT = torch.arange(24) < torch.from_numpy(block.length_B)[:, None]
        assert torch.allclose(have[real_BT], want.hidden[stream.layer][real_BT], atol=1e-4)


def test_nothing_is_read_for_no_rows_or_no_streams(
    manifest: Manifest, small_teacher: Teacher, small_rows: Rows
) -> None:
    streams = vector_streams(replace(manifest, targets=replace(manifest.targets, attention=())))
    assert not list(run_streams(manifest, small_teacher, streams, small_rows, range(4, 4), 3))
    assert not list(run_streams(manifest, small_teacher, [], small_rows, range(4, 9), 3))


def test_streams_of_several_views_come_from_the_passes_of_their_own(
    manifest: Manifest, small_teacher: Teacher, small_rows: Rows
) -> None:
    """Two batches: each stream of the plain view twice, each of the two masked views four times."""
    streams = vector_streams(manifest)
    found = Counter(
        stream.path for _, stream, _, _ in run_streams(manifest, small_teacher, streams, small_rows, range(4), 2)
    )
    assert found == {stream.path: 2 if stream.view == "plain" else 4 for stream in streams}
