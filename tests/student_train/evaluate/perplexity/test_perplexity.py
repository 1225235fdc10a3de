"""Perplexity and bits per byte of real folders: the plain sums in float64, the bytes exactly, whatever the windows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_train.evaluate.perplexity.perplexity import measure_perplexity
from student_train.evaluate.perplexity.records import PerplexityReport
from student_train.evaluate.perplexity.settings import PerplexitySettings
from teacher_cache.errors import SettingsError, StudentError
from tests.student_train.evaluate.causal_models import BOS_FAMILIES, make_causal, make_texts

TEXTS = make_texts(9, 30)
FAMILIES = ("llama", "gpt2", "qwen2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen's vocabulary is padded beyond its tokenizer."""
    parent = tmp_path_factory.mktemp("causal")
    padded = {"qwen2": {"vocab_size": 320}}
    return {family: make_causal(parent / family, family, **padded.get(family, {})) for family in FAMILIES}


def measure(student: Path, texts: list[str] = TEXTS, **flags: Any) -> PerplexityReport:
    settings = PerplexitySettings(student=str(student), text=("text",), device="cpu", **flags)
    return measure_perplexity(settings, lambda: iter(texts), device="cpu", show=lambda doing: None)


@torch.no_grad()
def plain_nats(folder: Path, family: str, texts: list[str], seq_len: int, stride: int) -> tuple[float, int]:
    """Token by token: each in a forward pass of its own window, all logits in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer.convert_tokens_to_ids("<s>" if family in BOS_FAMILIES else "<|endoftext|>")
    nats, count = 0.0, 0
    for text in texts:
        ids = [start, *tokenizer(text, add_special_tokens=False).input_ids]
        for place in range(1, len(ids)):
            # the window that predicts it ends a whole number of strides after the first one, or with the document
            end = min(seq_len + max(0, math.ceil((place + 1 - seq_len) / stride)) * stride, len(ids))
            first = max(0, end - seq_len)
            given = ids[first:place]
            if first and family in BOS_FAMILIES:
                given = [start, *ids[first + 1 : place]]
            logits_V = model(input_ids=torch.tensor([given])).logits[0, -1]
            nats -= float(logits_V.log_softmax(0)[ids[place]])
            count += 1
    return nats, count


@pytest.mark.parametrize("family", FAMILIES)
def test_nats_are_the_plain_sum(folders: dict[str, Path], family: str) -> None:
    texts = TEXTS[:4]
    found = measure(folders[family], texts, seq_len=24, stride=7, batch_size=3)
    nats, tokens = plain_nats(folders[family], family, texts, 24, 7)
    score = found.student_score
    assert tokens > 100 and score.tokens == tokens
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bytes == sum(len(text.encode()) for text in texts)
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / score.bytes, rel=1e-5)


def test_windows_with_the_whole_context_give_the_same_however_they_lie(folders: dict[str, Path]) -> None:
    short = [text for text in TEXTS if len(text) < 40]
    ways = [measure(folders["gpt2"], short, seq_len=64), measure(folders["gpt2"], short, seq_len=60, batch_size=1)]
    ways.append(measure(folders["gpt2"], short[::-1], seq_len=50, stride=1, batch_size=5))
    assert len({way.student_score.tokens for way in ways}) == len({way.student_score.bytes for way in ways}) == 1
    first, *others = (way.student_score.bits_per_byte for way in ways)
    assert others == pytest.approx([first] * 2, rel=1e-6)


def test_a_model_that_knows_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """All ids are as probable: the perplexity is their number, those beyond the tokenizer among them."""
    folder = shutil.copytree(folders["qwen2"], tmp_path / "uniform")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data.zero_()
    model.get_output_embeddings().weight.data.zero_()
    model.save_pretrained(folder)
    score = measure(folder).student_score
    assert score.perplexity == pytest.approx(320)
    assert score.bits_per_byte == pytest.approx(score.tokens * math.log2(320) / score.bytes)


def test_a_teacher_reads_the_same_text_in_its_own_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = make_causal(tmp_path / "teacher", "gpt2", ids=270, seed=1)
    both = measure(folders["llama"], teacher=str(teacher), seq_len=32, max_tokens=120)
    assert both.teacher_score is not None
    assert both.student_score.bytes == both.teacher_score.bytes < sum(len(text.encode()) for text in TEXTS)
    assert 110 <= both.student_score.tokens <= 120 < both.teacher_score.tokens
    assert both.fingerprints["vocabulary"] != both.fingerprints["teacher_vocabulary"]
    whole = measure(folders["llama"], teacher=str(folders["llama"]))
    assert whole.teacher_score == whole.student_score
    assert whole.fingerprints["student"] == whole.fingerprints["teacher"]
    assert PerplexityReport.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_without_any_mark_the_first_token_and_its_bytes_do_not_count(tmp_path: Path) -> None:
    folder = make_causal(tmp_path / "bare", "stablelm", marks=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS[:3], "a"]
    report = measure(folder, texts)
    ids = [tokenizer(text).input_ids for text in texts]
    assert report.student_score.tokens == sum(len(each) - 1 for each in ids)
    rests = [tokenizer.decode(each[1:]) for each in ids]
    assert report.student_score.bytes == sum(len(rest.encode()) for rest in rests)
    assert report.student_score.start is None and "neither a beginning nor an end" in report.notes[0]


@pytest.mark.parametrize("family, marks", [("llama", True), ("stablelm", False)])
def test_offsets_without_the_space_before_a_word_count_alike(family: str, marks: bool, tmp_path: Path) -> None:
    """Tokenizers say so or not; what their tokens are is the same."""
    found = []
    for trimmed in (False, True):
        folder = make_causal(tmp_path / str(trimmed), family, marks=marks)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trimmed)
        tokenizer.save_pretrained(folder)
        offsets = tokenizer(TEXTS[0], add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        assert trimmed == any(begin > end for (_, end), (begin, _) in pairwise(offsets))
        scores = [measure(folder, max_tokens=most).student_score for most in range(2, 24)]
        found.append([(score.tokens, score.bytes, score.nats) for score in scores])
    assert found[0] == found[1]


def test_unknown_tokens_are_told(tmp_path: Path) -> None:
    folder = make_causal(tmp_path / "unknown", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(tokenizer(" dog", add_special_tokens=False).input_ids[-1])
    tokenizer.save_pretrained(folder)
    assert any("unknown ones" in note for note in measure(folder).notes)


def test_refusals(folders: dict[str, Path], tiny_teacher: Any, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match=r"masked language model, .*`kdeval fidelity`.*`kdeval finetune`"):
        measure(tiny_teacher("bert"))
    with pytest.raises(StudentError, match="no student directory"):
        measure(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match=r"--seq-len 65: student .* reads at most 64 positions"):
        measure(folders["gpt2"], seq_len=65)
    with pytest.raises(SettingsError, match="--stride 70 goes past windows of 64"):
        measure(folders["gpt2"], stride=70)
    with pytest.raises(SettingsError, match="holds nothing"):
        measure(folders["gpt2"], [])


def test_weights_that_are_no_numbers_and_foreign_tokenizers(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(folders["llama"], tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(broken)
    with pytest.raises(StudentError, match="not finite numbers"):
        measure(broken)
    foreign = make_causal(tmp_path / "foreign", "llama", vocab_size=270)
    with pytest.raises(StudentError, match=r"gives the id 2\d\d, of which the model has 270"):
        measure(foreign)


def test_text_that_is_gone_when_the_teacher_reads_it(folders: dict[str, Path]) -> None:
    once: Iterator[str] = iter(TEXTS)
    settings = PerplexitySettings(student=str(folders["gpt2"]), teacher=str(folders["gpt2"]), text=("pipe",))
    documents: Callable[[], Iterator[str]] = lambda: once  # noqa: E731
    with pytest.raises(SettingsError, match="gave other text when it was read again"):
        measure_perplexity(settings, documents, device="cpu", show=lambda doing: None)
