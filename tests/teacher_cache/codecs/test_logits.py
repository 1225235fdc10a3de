"""What is stored of a distribution comes back: ids exactly, probabilities within the declared error, in few bytes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numcodecs import zstd

from teacher_cache.codecs.logits import (
    LOG_PROBABILITY_CODECS,
    LogProbabilityCodec,
    SampleCodec,
    TopkCodec,
    TopkEntries,
    id_planes,
)
from teacher_cache.codecs.sparse_logits import draw_samples, sample_points, topk_log_probabilities
from teacher_cache.errors import SettingsError, TeacherError

codecs = pytest.mark.parametrize("name", LOG_PROBABILITY_CODECS)


def tensors(coded: object) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in coded.items()}  # type: ignore[attr-defined]


def size_on_disk(*arrays: np.ndarray, chunk: int = 2**16) -> int:
    """Bytes of these arrays in chunks as the store has them: zstd level 1, 4 bytes of checksum and 16 of index each."""
    total = 0
    for array in arrays:
        data = np.ascontiguousarray(array).tobytes()
        total += sum(len(zstd.compress(data[i : i + chunk], 1)) + 20 for i in range(0, len(data), chunk))
    return total


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@codecs
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), sharpness=st.floats(0.01, 60), entries=st.integers(1, 50))
@example(seed=42, sharpness=30.014996610134702, entries=27)  # a value in the middle of two codes, as float32 sees it
def test_probabilities_are_within_the_declared_error(name: str, seed: int, sharpness: float, entries: int) -> None:
    logits_PV = torch.randn(17, 50, generator=torch.Generator().manual_seed(seed)) * sharpness
    log_probs_PK = logits_PV.log_softmax(1).topk(entries).values
    codec = LogProbabilityCodec(name)
    have_PK = codec.decode(torch.from_numpy(codec.encode(log_probs_PK)))
    assert have_PK.dtype == torch.float32 and have_PK.shape == log_probs_PK.shape
    error_PK = (have_PK.double().exp() - log_probs_PK.double().exp()).abs()
    assert bool((error_PK <= codec.error_bound(log_probs_PK)).all())
    assert bool((have_PK[:, 1:] <= have_PK[:, :-1]).all())


@codecs
def test_the_declared_error_is_tight_and_small(name: str) -> None:
    """A bound that nothing comes near would let a worse codec pass."""
    log_probs_P1 = torch.linspace(-20, 0, 20_001)[:, None]
    codec = LogProbabilityCodec(name)
    have_P1 = codec.decode(torch.from_numpy(codec.encode(log_probs_P1)))
    share_P1 = (have_P1.double().exp() - log_probs_P1.double().exp()).abs() / codec.error_bound(log_probs_P1)
    assert float(share_P1.max()) > 0.9
    relative = {p: float(codec.error_bound(torch.tensor(p).log()) / p) for p in (1.0, 1e-2, 1e-4, 1e-8)}
    assert all(
        relative[p] < limit for p, limit in zip(relative, (0.016, 0.029, 0.051, 0.17), strict=True)
    )  # what the docstring says


@codecs
def test_probabilities_of_zero_and_one_are_exact(name: str) -> None:
    codec = LogProbabilityCodec(name)
    log_probs_PK = torch.tensor([[0.0, float("-inf"), float("-inf")]])
    assert torch.equal(codec.decode(torch.from_numpy(codec.encode(log_probs_PK))), log_probs_PK)


@codecs
def test_undefined_probabilities_are_refused(name: str) -> None:
    with pytest.raises(TeacherError, match="undefined or infinite logits"):
        LogProbabilityCodec(name).encode(torch.tensor([[0.0, float("nan")]]))


def test_unknown_codecs_are_refused() -> None:
    with pytest.raises(SettingsError, match="'int8'.*float16, root8"):
        LogProbabilityCodec("int8")


# ---- most probable ids ----------------------------------------------------------------------------------------------


def topk_round_trip(codec: TopkCodec, topk: TopkEntries) -> TopkEntries:
    coded = codec.encode(topk)
    specs = {spec.name: spec for spec in codec.arrays()}
    assert coded.keys() == specs.keys()
    for name, array in coded.items():
        components, places = specs[name].components, len(topk.ids_PK)
        assert array.dtype == np.dtype(specs[name].dtype)
        assert array.shape == ((places,) if components is None else (components, places))
    return codec.decode(tensors(coded))


@codecs
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 12.0])
def test_kept_mass_and_tail_are_one(name: str, sharpness: float) -> None:
    logits_PV = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0)) * sharpness
    topk = topk_log_probabilities(logits_PV, 64, 1.0)
    have = topk_round_trip(TopkCodec(entries=64, vocab_size=3000, log_probs=name), topk)
    assert torch.equal(have.ids_PK, topk.ids_PK)
    mass_P = have.log_probs_PK.double().exp().sum(1) + have.log_tail_P.double().exp()
    bound_P = LogProbabilityCodec(name).error_bound(topk.log_probs_PK).sum(1)
    tail_bound_P = LogProbabilityCodec("float16").error_bound(topk.log_tail_P)
    assert bool(((mass_P - 1).abs() <= bound_P + tail_bound_P + 1e-6).all())
    # roundings of single entries cancel
    assert float((mass_P - 1).abs().mean()) < 0.01


@codecs
def test_a_tail_without_mass_stays_without(name: str) -> None:
    topk = topk_log_probabilities(torch.randn(3, 40), 40, 1.0)
    have = topk_round_trip(TopkCodec(entries=40, vocab_size=40, log_probs=name), topk)
    assert torch.isneginf(have.log_tail_P).all()


def test_an_undefined_tail_is_refused() -> None:
    topk = TopkEntries(
        ids_PK=torch.zeros(1, 2, dtype=torch.int64),
        log_probs_PK=torch.zeros(1, 2),
        log_tail_P=torch.tensor([float("nan")]),
    )
    with pytest.raises(TeacherError, match="undefined or infinite logits"):
        TopkCodec(entries=2, vocab_size=5, log_probs="root8").encode(topk)


@settings(max_examples=60, deadline=None)
@given(vocab_size=st.sampled_from([2, 256, 257, 2**16, 2**16 + 1, 250_002, 2**24]), data=st.data())
def test_ids_come_back_exactly(vocab_size: int, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=6, max_size=6))
    ids_PK = torch.tensor([*ids, 0, vocab_size - 1, vocab_size // 2]).reshape(3, 3)
    topk = TopkEntries(ids_PK=ids_PK, log_probs_PK=torch.zeros(3, 3), log_tail_P=torch.zeros(3))
    have = topk_round_trip(TopkCodec(entries=3, vocab_size=vocab_size, log_probs="root8"), topk)
    assert torch.equal(have.ids_PK, ids_PK)


def test_only_planes_that_ids_need() -> None:
    assert id_planes(256) == ("low",)
    assert id_planes(257) == id_planes(2**16) == ("low", "middle")
    assert id_planes(2**16 + 1) == id_planes(2**24) == ("low", "middle", "high")
    with pytest.raises(SettingsError, match="16777217 ids.*--targets hidden,attention"):
        id_planes(2**24 + 1)


def test_64_of_250002_ids_in_less_than_220_bytes() -> None:
    """Ids without any pattern, 18 bits each, and probabilities that fall slowly and differently at each place."""
    generator = np.random.default_rng(0)
    ids_PK = torch.from_numpy(generator.integers(0, 250_002, (4928, 64)))
    falls_PK = torch.from_numpy(generator.exponential(0.15, (4928, 64))).float()
    log_probs_PK = -falls_PK.cumsum(1) - torch.from_numpy(generator.exponential(2, (4928, 1))).float()
    topk = TopkEntries(ids_PK=ids_PK, log_probs_PK=log_probs_PK, log_tail_P=torch.randn(4928) - 5)
    coded = TopkCodec(entries=64, vocab_size=250_002, log_probs="root8").encode(topk)
    assert size_on_disk(*coded.values()) / 4928 < 185


# ---- draws ----------------------------------------------------------------------------------------------------------


def random_draws(seed: int, places: int, draws: int, vocab_size: int) -> np.ndarray:
    """Ascending ids with repetitions, now and then the largest one, and places without any."""
    generator = np.random.default_rng(seed)
    few = generator.integers(0, vocab_size, (places, 5))
    ids_PN = np.take_along_axis(few, generator.integers(0, 5, (places, draws)), axis=1)
    wild = generator.random((places, draws)) < 0.3
    ids_PN = np.where(wild, generator.integers(0, vocab_size, (places, draws)), ids_PN)
    ids_PN[generator.random(places) < 0.2, -1] = vocab_size - 1
    ids_PN = np.sort(ids_PN, axis=1)
    ids_PN[generator.random(places) < 0.3] = -1
    return ids_PN.astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    places=st.integers(1, 30),
    draws=st.integers(1, 60) | st.just(255),
    vocab_size=st.sampled_from([1, 200, 30_522, 250_002, 2**24]),
    data=st.data(),
)
def test_any_range_of_draws_comes_back(
    seed: int, places: int, draws: int, vocab_size: int, data: st.DataObject
) -> None:
    ids_PN = random_draws(seed, places, draws, vocab_size)
    codec = SampleCodec(draws=draws, vocab_size=vocab_size)
    packed = codec.pack(ids_PN)
    assert tuple(packed.entries) == codec.entry_names()
    total = int(packed.distinct_P.sum(dtype=np.int64))
    assert all(values.dtype == np.uint8 and values.shape == (total,) for values in packed.entries.values())
    # a store has zeros behind the last id
    stored = {name: np.append(values, np.zeros(3, np.uint8)) for name, values in packed.entries.items()}
    start = data.draw(st.integers(0, places - 1))
    stop = data.draw(st.integers(start + 1, places))
    have = codec.unpack(packed.distinct_P, stored, start, stop, "cpu")
    assert have.ids_PK.shape == have.counts_PK.shape == (stop - start, draws)
    assert bool((have.ids_PK < vocab_size).all() and (have.ids_PK >= 0).all())
    for place in range(start, stop):
        pairs = zip(have.ids_PK[place - start].tolist(), have.counts_PK[place - start].tolist(), strict=True)
        found = [(id_, count) for id_, count in pairs if count]
        assert found == sorted(Counter(id_ for id_ in ids_PN[place].tolist() if id_ >= 0).items())


def test_the_documented_layout() -> None:
    codec = SampleCodec(draws=4, vocab_size=70_000)
    packed = codec.pack(np.array([[3, 3, 65_539, 65_540], [-1, -1, -1, -1], [600, 600, 600, 600]], dtype=np.int32))
    assert packed.distinct_P.tolist() == [3, 0, 1]
    assert packed.entries["ids/low"].tolist() == [3, 0, 1, 600 % 256]
    assert packed.entries["ids/middle"].tolist() == [0, 0, 0, 2]
    assert packed.entries["ids/high"].tolist() == [0, 1, 0, 0]
    assert packed.entries["counts"].tolist() == [2, 1, 1, 4]


@pytest.mark.parametrize("draws", [0, 256])
def test_more_draws_than_a_byte_counts_are_refused(draws: int) -> None:
    with pytest.raises(SettingsError, match=f"{draws} draws.*1 to 255"):
        SampleCodec(draws=draws, vocab_size=100)


@pytest.mark.parametrize("scale, distinct", [(0.7, 49), (4.0, 9)])
def test_an_id_drawn_from_250002_takes_less_than_three_bytes(scale: float, distinct: int) -> None:
    """Flat distributions, 50 different ids of 50, and sharp ones; probable ids differ from place to place."""
    places = 150
    logits_PV = torch.randn(places, 250_002, generator=torch.Generator().manual_seed(0)) * scale
    points_PN = sample_points(0, np.arange(places), 0, np.zeros(places, np.int64), 50)
    packed = SampleCodec(draws=50, vocab_size=250_002).pack(draw_samples(logits_PV, points_PN, 1.0))
    total = int(packed.distinct_P.sum(dtype=np.int64))
    assert total > distinct * places
    assert size_on_disk(packed.distinct_P, *packed.entries.values()) / total < 2.6
