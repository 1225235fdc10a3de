"""What a store keeps of a causal teacher is what the teacher says of each document alone, at every place of every form.

The reference is what anybody would write: `AutoModelForCausalLM(...).logits` in float64, a document at a time, with no
packing, mask, codec or head of ours; kept positions by loops over tokens.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, Qwen2Tokenizer

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import SampledLogits, TargetBatch, TargetRequest, TopkLogits
from teacher_cache.random_bits import uniform_bits
from teacher_cache.read.reader import CacheReader
from tests.causal_models import FAMILIES, WORDS, save_teacher

T, ROWS, R = 24, 13, 5
ARITHMETIC = 2e-4
"""How far logarithms of probabilities may be from float64, as teachers run in float32."""

Build = Callable[..., CacheReader]


@pytest.fixture
def build(causal_corpus: Path, causal_teacher: Path, tmp_path: Path) -> Build:
    def make(teacher: Path = causal_teacher, **changes: Any) -> CacheReader:
        values: dict[str, Any] = {
            "teacher": str(teacher), "corpus": (str(causal_corpus),), "out": str(tmp_path / "cache.zarr"),
            "seq_len": T, "max_rows": ROWS, "block_rows": R, "batch_size": 3, "device": "cpu",
        }  # fmt: skip
        settings = BuildSettings(**{**values, **changes})
        build_cache(settings)
        return CacheReader.open(settings.out)

    return make


def plain(reader: CacheReader, **more: Any) -> TargetBatch:
    return reader.read_rows(0, reader.rows, TargetRequest(next_tokens=True, **more))["plain"]


def documents(batch: TargetBatch, row: int) -> Iterator[tuple[int, int]]:
    """Where each document of a row begins and ends."""
    length = int(batch.length_B[row])
    starts = [0] if batch.starts_BT is None else batch.starts_BT[row].nonzero()[:, 0].tolist()
    yield from zip(starts, [*starts[1:], length], strict=True)


def candidates(batch: TargetBatch, row: int) -> list[int]:
    """Positions that have a next token in their document."""
    return [t for first, stop in documents(batch, row) for t in range(first, stop - 1)]


@torch.no_grad()
def run_alone(model: PreTrainedModel, batch: TargetBatch, row: int) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities [T', V] and hidden states [T', D] of the T' tokens of a row, a document at a time."""
    found = []
    for first, stop in documents(batch, row):
        ids_1T = batch.input_ids_BT[row : row + 1, first:stop]
        out = model(ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False, output_hidden_states=True)
        found.append((out.logits[0].log_softmax(-1), [state[0] for state in out.hidden_states]))
    return torch.cat([logits for logits, _ in found]), [
        torch.cat(each) for each in zip(*(h for _, h in found), strict=True)
    ]


def in_double(teacher: str | Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    # the fast product of experts knows no float64
    return kind.from_pretrained(teacher, dtype=torch.float64, experts_implementation="eager").eval()


def assert_places(batch: TargetBatch, expected: list[list[int]]) -> None:
    """The positions are these, and the labels what stands behind them."""
    assert batch.places is not None
    for row, want in enumerate(expected):
        count = int(batch.places.count_B[row])
        assert batch.places.positions_BM[row, :count].tolist() == want
        assert batch.places.label_ids_BM[row, :count].tolist() == [int(batch.input_ids_BT[row, t + 1]) for t in want]
        assert (batch.places.positions_BM[row, count:] == 0).all()
        assert (batch.places.label_ids_BM[row, count:] == 0).all()


def assert_draws_are_live(model: PreTrainedModel, batch: TargetBatch, draws: int, seed: int = 0) -> int:
    """Each drawn id lies where its point falls in the cumulative distribution; the number of places compared."""
    logits, places, compared = batch.logits, batch.places, 0
    assert isinstance(logits, SampledLogits) and places is not None
    for row in range(len(batch.length_B)):
        log_probs_TV, _ = run_alone(model, batch, row)
        for place in range(int(places.count_B[row])):
            p_V = log_probs_TV[places.positions_BM[row, place]].exp()
            end_V = p_V.cumsum(0)
            bits_N = uniform_bits(seed, np.int64(batch.row_id_B[row]), 0, np.int64(place), 3, np.arange(draws))
            drawn = [
                int(i)
                for i, n in zip(logits.ids_BMK[row, place], logits.counts_BMK[row, place], strict=True)
                for _ in range(int(n))
            ]
            assert len(drawn) == draws
            for n, (bits, at) in enumerate(zip(bits_N, drawn, strict=True)):
                point = (n + (int(bits) >> 11) * 2.0**-53) / draws
                assert end_V[at] - p_V[at] - ARITHMETIC <= point <= end_V[at] + ARITHMETIC
            compared += 1
        rest = logits.counts_BMK[row, int(places.count_B[row]) :]
        assert (rest == 0).all()
    return compared


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Transformers makes this family's tokenizer anew from its merges: syllables to words, with a space before them."""
    syllables = sorted({part for word in WORDS for part in (word[:2], word[2:])})
    merges = [(part[0], part[1]) for part in syllables] + [("Ġ", first) for first in sorted({w[:2] for w in WORDS})]
    merges += [(f"Ġ{word[:2]}", word[2:]) for word in WORDS]
    tokens = dict.fromkeys(["<|endoftext|>", *"Ġ", *sorted(set("".join(WORDS))), *("".join(pair) for pair in merges)])
    return Qwen2Tokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=merges, add_prefix_space=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone_in_every_family(build: Build, family: str, tmp_path: Path) -> None:
    """Three sliding windows, soft caps, scaled logits, learned positions and experts among them."""
    # some tokenizers add tokens of their own; the vocabulary of the model is padded beyond its tokenizer's, as often
    teacher = save_teacher(tmp_path / "teacher", family, vocab_size=160 if family == "qwen2" else 112)
    if family == "qwen2":
        qwen_tokenizer().save_pretrained(teacher)
    reader = build(teacher, targets="logits,hidden", layers="2,4", precision="float16", max_rows=5)
    assert (reader.manifest.teacher.kind, reader.manifest.segments, reader.manifest.positions) == (
        "causal-lm", "isolated", "all",
    )  # fmt: skip
    batch, model = plain(reader, logits=True, hidden_layers=(2, 4)), in_double(teacher)
    assert batch.starts_BT is not None and (batch.starts_BT.sum(1) > 1).sum() > 1, "documents share rows"
    assert_places(batch, [candidates(batch, row) for row in range(5)])
    assert assert_draws_are_live(model, batch, 24) == int(batch.places.count_B.sum()) > 80  # type: ignore[union-attr]
    for row in range(5):
        _, hidden = run_alone(model, batch, row)
        for layer in (2, 4):
            assert torch.allclose(batch.hidden[layer][row, : len(hidden[layer])].double(), hidden[layer], atol=2e-2)
            assert (batch.hidden[layer][row, len(hidden[layer]) :] == 0).all()


@pytest.mark.parametrize("precision", ["float16", "nmse:1e-2"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_most_probable_ids_and_their_tail(
    build: Build, causal_teacher: Path, precision: str, temperature: float
) -> None:
    k = 6
    reader = build(targets="logits", logits="topk", k=k, precision=precision, temperature=temperature)
    batch, model = plain(reader, logits=True), in_double(causal_teacher)
    logits, places = batch.logits, batch.places
    assert isinstance(logits, TopkLogits) and places is not None
    assert_places(batch, [candidates(batch, row) for row in range(ROWS)])
    # of a probability, as the specification of the store says; half precision rounds the logarithm
    share = 0.06 if precision != "float16" else 0.01
    for row in range(ROWS):
        log_probs_TV, _ = run_alone(model, batch, row)
        count = int(places.count_B[row])
        log_probs_PV = (log_probs_TV[places.positions_BM[row, :count]] / temperature).log_softmax(-1)
        want = log_probs_PV.topk(k, dim=-1)
        ids_PK = logits.ids_BMK[row, :count].long()
        there_PK = log_probs_PV.gather(1, ids_PK)
        # the same ids but for ties that float32 decides
        assert torch.allclose(there_PK, want.values, atol=ARITHMETIC)
        assert all(len(set(ids.tolist())) == k for ids in ids_PK)
        kept_PK = logits.log_probs_BMK[row, :count].double().exp()
        assert torch.allclose(kept_PK, there_PK.exp(), rtol=share, atol=1e-4)
        rest_P = 1 - there_PK.exp().sum(1)
        assert torch.allclose(logits.log_tail_BM[row, :count].double().exp(), rest_P, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("segments", ["isolated", "joined"])
@pytest.mark.parametrize("positions", ["every:3", "every:50", "share:0.3", "share:0.001"])
def test_fewer_positions(build: Build, causal_teacher: Path, positions: str, segments: str) -> None:
    reader = build(targets="logits", positions=positions, segments=segments, seed=5)
    batch = plain(reader, logits=True)
    assert (batch.starts_BT is None) == (segments == "joined")
    kind, _, number = positions.partition(":")
    expected = []
    for row in range(ROWS):
        all_of_row = candidates(batch, row)
        if kind == "every":
            expected.append([t for n, t in enumerate(all_of_row) if n % int(number) == 0])
            continue
        keep = min(len(all_of_row), max(1, round(float(number) * len(all_of_row))))
        number_of = int(batch.row_id_B[row])
        order = sorted(all_of_row, key=lambda t: int(uniform_bits(5, np.int64(number_of), 0, np.int64(t), 4)))
        expected.append(sorted(order[:keep]))
    assert_places(batch, expected)
    assert_draws_are_live(in_double(causal_teacher), batch, 24, seed=5)


@pytest.mark.parametrize(
    "settings", [{"segments": "joined"}, {"rows": "document"}, {"segments": "joined", "rows": "document"}]
)
def test_rows_that_are_one_text(build: Build, causal_teacher: Path, settings: dict[str, str]) -> None:
    reader = build(targets="logits,hidden", layers="4", precision="float16", **settings)
    batch = plain(reader, logits=True, hidden_layers=(4,))
    assert "segments" not in settings or batch.starts_BT is None
    for row in range(ROWS):
        assert len(list(documents(batch, row))) == 1
    assert_places(batch, [list(range(int(length) - 1)) for length in batch.length_B])
    assert_draws_are_live(in_double(causal_teacher), batch, 24)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_encoder_reads_each_document_alone_too(
    build: Build, tiny_teacher: Callable[..., Path], tiny_corpus: Path, family: str
) -> None:
    """Its plain view and its masked ones; ModernBERT's windows count from where a document begins."""
    teacher = tiny_teacher(family)
    reader = build(
        teacher, corpus=(str(tiny_corpus),), segments="isolated", layers="2,4", precision="float16", views=2, k=8,
        targets="logits,hidden",
    )  # fmt: skip
    assert reader.manifest.to_json()["segments"] == "isolated" and "positions" not in reader.manifest.to_json()
    model = in_double(teacher, AutoModelForMaskedLM)
    for view in range(2):
        batch = reader.read_rows(0, ROWS, TargetRequest(logits=True, hidden_layers=(2, 4)), masked_view=view)
        plain_view, masked = batch["plain"], batch["masked"]
        assert plain_view.starts_BT is not None and masked.starts_BT is not None
        assert torch.equal(plain_view.starts_BT, masked.starts_BT) and (plain_view.starts_BT.sum(1) > 1).any()
        logits, places = masked.logits, masked.places
        assert isinstance(logits, TopkLogits) and places is not None
        for row in range(ROWS):
            _, hidden = run_alone(model, plain_view, row)
            for layer in (2, 4):
                assert torch.allclose(
                    plain_view.hidden[layer][row, : len(hidden[2])].double(), hidden[layer], atol=1e-2
                )
            log_probs_TV, _ = run_alone(model, masked, row)
            count = int(places.count_B[row])
            log_probs_PV = log_probs_TV[places.positions_BM[row, :count]]
            there_PK = log_probs_PV.gather(1, logits.ids_BMK[row, :count].long())
            assert torch.allclose(there_PK, log_probs_PV.topk(8).values, atol=ARITHMETIC)
            assert torch.allclose(
                logits.log_probs_BMK[row, :count].double().exp(), there_PK.exp(), rtol=0.01, atol=1e-4
            )


@pytest.mark.parametrize("form", ["sample", "topk"])
def test_a_trained_teacher_on_real_text(
    build: Build, shared_data: Path, shared_corpus: Path, tmp_path: Path, form: str
) -> None:
    """A Llama of 1,024 ids that has learnt: sure predictions beside open ones."""
    text = tmp_path / "text.txt"
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as lines:
        text.write_text("".join(line[:300].strip() + "\n" for line, _ in zip(lines, range(20), strict=False)))
    teacher = shared_data / "causal-tiny"
    reader = build(
        teacher, corpus=(str(text),), targets="logits", logits=form, seq_len=96, max_rows=8, precision="float16"
    )
    batch, model = plain(reader, logits=True), in_double(teacher)
    assert batch.starts_BT is not None and batch.places is not None and batch.starts_BT.sum() > 8
    assert_places(batch, [candidates(batch, row) for row in range(8)])
    if form == "sample":
        assert assert_draws_are_live(model, batch, 24) > 500
        return
    logits, surprise = batch.logits, []
    assert isinstance(logits, TopkLogits)
    for row in range(8):
        log_probs_TV, _ = run_alone(model, batch, row)
        count = int(batch.places.count_B[row])
        log_probs_PV = log_probs_TV[batch.places.positions_BM[row, :count]]
        there_PK = log_probs_PV.gather(1, logits.ids_BMK[row, :count].long())
        assert torch.allclose(there_PK, log_probs_PV.topk(64).values, atol=ARITHMETIC)
        assert torch.allclose(logits.log_probs_BMK[row, :count].double(), there_PK, rtol=6e-4, atol=ARITHMETIC)
        surprise.append(-log_probs_PV.gather(1, batch.places.label_ids_BM[row, :count, None]))
    assert torch.cat(surprise).mean() < np.log(1024) - 0.5, "the labels are what this teacher was trained to guess"


def test_draws_are_unbiased(build: Build, causal_teacher: Path, tmp_path: Path) -> None:
    """The same text in many rows is drawn for anew in each: counts / N average to the probabilities."""
    rows, draws = 600, 8
    text = tmp_path / "same.txt"
    text.write_text("\n".join([" ".join(WORDS[3:9])] * rows))
    reader = build(
        corpus=(str(text),), rows="document", seq_len=8, max_rows=rows, block_rows=64, batch_size=64, k=draws,
        targets="logits",
    )  # fmt: skip
    batch = plain(reader, logits=True)
    logits = batch.logits
    assert isinstance(logits, SampledLogits) and batch.input_ids_BT.unique(dim=0).shape[0] == 1
    log_probs_TV, _ = run_alone(in_double(causal_teacher), batch, 0)
    expected_PV = log_probs_TV[:6].exp()
    share_BPV = torch.zeros(rows, 6, expected_PV.shape[1], dtype=torch.float64)
    share_BPV.scatter_add_(2, logits.ids_BMK[:, :6].long(), logits.counts_BMK[:, :6].double() / draws)
    assert torch.allclose(share_BPV.sum(2), torch.ones(rows, 6, dtype=torch.float64))
    error_PV, seen_PV = share_BPV.mean(0) - expected_PV, expected_PV > 0.01
    z = error_PV[seen_PV] / (share_BPV.std(0)[seen_PV] / rows**0.5).clamp_min(1e-4)
    assert len(z) > 100 and float(z.abs().max()) < 4.5 and 0.7 < float(z.square().mean().sqrt()) < 1.3
