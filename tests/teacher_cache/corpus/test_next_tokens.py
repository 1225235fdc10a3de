"""Places against their definition, alone and among others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.contract.positions import places_per_row
from teacher_cache.corpus.corpus import RowBlock
from teacher_cache.corpus.next_tokens import next_token_places
from teacher_cache.errors import SettingsError
from teacher_cache.random_bits import uniform_bits

SEED = 11


def make_rows(rows: int, length: int, seed: int, *, isolated: bool, chat: bool) -> RowBlock:
    """Rows of one id: nothing may be inferred from ids."""
    draw = np.random.default_rng(seed)
    length_B = draw.integers(1, length + 1, rows).astype(np.int32)
    real_BT = np.arange(length) < length_B[:, None]
    starts_BT = (draw.random((rows, length)) < 0.2) & real_BT
    starts_BT[:, 0] = True
    return RowBlock(
        input_ids_BT=np.full((rows, length), 3, dtype=np.int32),
        length_B=length_B,
        row_id_B=draw.permutation(10 * rows)[:rows].astype(np.int64),
        document_B=np.zeros(rows, dtype=np.int64),
        starts_BT=starts_BT if isolated else None,
        learnt_BT=(draw.random((rows, length)) < 0.5) & real_BT if chat else None,
    )


def plain_places(block: RowBlock, row: int, positions: str) -> list[int]:
    places = []
    for at in range(int(block.length_B[row]) - 1):
        starts = block.starts_BT is not None and block.starts_BT[row, at + 1]
        learnt = block.learnt_BT is None or block.learnt_BT[row, at + 1]
        if learnt and not starts:
            places.append(at)
    name, _, value = positions.partition(":")
    if name == "every":
        return places[:: int(value)]
    if name == "share" and places:
        places.sort(key=lambda at: int(uniform_bits(SEED, int(block.row_id_B[row]), 0, at, 4)))
        return sorted(places[: max(1, round(float(value) * len(places)))])
    return places


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5), length=st.integers(2, 40), seed=st.integers(0, 99), isolated=st.booleans(),
    chat=st.booleans(), positions=st.sampled_from(["all", "every:1", "every:3", "every:50", "share:0.3", "share:1e-9"]),
)  # fmt: skip
def test_places_follow_the_definition(rows, length, seed, isolated, chat, positions) -> None:
    block = make_rows(rows, length, seed, isolated=isolated, chat=chat)
    kept_BT = next_token_places(block, positions=positions, seed=SEED)
    assert kept_BT.dtype == bool
    assert kept_BT.shape == (rows, length)
    for row in range(rows):
        assert np.flatnonzero(kept_BT[row]).tolist() == plain_places(block, row, positions)
    assert kept_BT.sum(axis=1).max() <= places_per_row(positions, length)


@pytest.mark.parametrize("positions", ["all", "every:3", "share:0.4"])
def test_a_row_has_the_same_places_in_any_company_and_order(positions: str) -> None:
    block = make_rows(40, 33, 1, isolated=True, chat=True)
    whole_BT = next_token_places(block, positions=positions, seed=SEED)
    for chosen in ([7], [30, 2, 9], list(range(39, -1, -1))):
        some = RowBlock(**{name: value[chosen] for name, value in vars(block).items()})
        np.testing.assert_array_equal(next_token_places(some, positions=positions, seed=SEED), whole_BT[chosen])


def test_a_share_is_drawn_evenly_and_anew_for_each_seed() -> None:
    block = make_rows(4000, 20, 2, isolated=False, chat=False)
    full = RowBlock(**{**vars(block), "length_B": np.full(4000, 20, dtype=np.int32)})
    kept_BT = next_token_places(full, positions="share:0.25", seed=SEED)
    assert (kept_BT.sum(axis=1) == round(0.25 * 19)).all()
    # 5 of 19 places: 1052 +- 28 of 4000 rows each
    counts = kept_BT.sum(axis=0)
    assert counts[-1] == 0
    assert abs(counts[:-1] - 4000 * 5 / 19).max() < 5 * 28
    assert not np.array_equal(kept_BT, next_token_places(full, positions="share:0.25", seed=SEED + 1))


def test_rows_where_nothing_is_to_be_learnt_have_no_place() -> None:
    block = make_rows(3, 12, 0, isolated=True, chat=False)
    silent = RowBlock(**{**vars(block), "learnt_BT": np.zeros((3, 12), dtype=bool)})
    for positions in ("all", "every:2", "share:0.5"):
        assert not next_token_places(silent, positions=positions, seed=SEED).any()


def test_other_positions_are_refused() -> None:
    with pytest.raises(SettingsError, match="--positions 'some' is unknown"):
        next_token_places(make_rows(1, 4, 0, isolated=False, chat=False), positions="some", seed=0)
