"""XLM-R's 250,002 ids and Gemma's 262,144: stores build and OD trains without any tensor of the size of [B, T, V]."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from student_train.losses.vocabulary import LOGITS_AT_A_TIME
from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.settings import TrainSettings
from student_train.students.student import build_student, plan_student
from student_train.train.train import train
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import SampledLogits, TargetRequest
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from tests.causal_models import save_teacher, write_corpus

VOCABULARY, ROWS, SEQ_LEN = 250_002, 24, 64
WIDTH = 16
CAUSAL_VOCABULARY, CAUSAL_ROWS = 262_144, 3


class LargestVocabularyTensor(TorchDispatchMode):
    """The most elements of any tensor with a vocabulary axis, other than weights, that any operation returns."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # weights and their gradients have the vocabulary in front
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.ndim > 1
                and leaf.shape[-1] == self.vocabulary
                and leaf.shape[0] != WIDTH
            ):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.fixture(scope="module")
def teacher(shared_xlm_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random XLM-R with the full vocabulary and its real tokenizer."""
    folder = tmp_path_factory.mktemp("xlm") / "teacher"
    shutil.copytree(shared_xlm_tokenizer, folder)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=514, initializer_range=0.2, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    XLMRobertaForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["topk", "sample"])
def store(
    teacher: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, int]:
    """A store of its outputs on several languages, and the largest vocabulary tensor of the build."""
    out = tmp_path_factory.mktemp("xlm-store") / "cache.zarr"
    corpus = tuple(str(shared_data / "corpus" / f"{name}-wikipedia.txt.gz") for name in ("ko", "vi"))
    settings = BuildSettings(
        teacher=str(teacher), corpus=corpus, out=str(out), seq_len=SEQ_LEN, max_rows=ROWS, targets="logits",
        logits=request.param, batch_size=ROWS, device="cpu",
    )  # fmt: skip
    with LargestVocabularyTensor() as largest:
        build_cache(settings)
    return out, largest.elements


def test_a_build_holds_logits_of_a_few_positions_only(store: tuple[Path, int]) -> None:
    _, largest = store
    assert 0 < largest <= 2**24 < ROWS * SEQ_LEN * VOCABULARY / 20
    reader = CacheReader.open(store[0])
    assert reader.manifest.teacher.vocab_size == VOCABULARY


def test_positions_cost_few_bytes(store: tuple[Path, int]) -> None:
    """Of a distribution that is nearly flat: 64 ids hold 0.4% of it, and every draw is another id."""
    found = CacheReader.open(store[0]).read_rows(0, ROWS, TargetRequest(logits=True))["masked"]
    assert found.places is not None
    positions = int(found.places.count_B.sum())
    written = sum(size for path, size in describe_store(store[0]).bytes_per_array.items() if "logits/" in path)
    if isinstance(found.logits, SampledLogits):
        distinct = int((found.logits.counts_BMK > 0).sum())
        assert distinct <= 50 * positions
        assert written / distinct <= 3.1
    else:
        assert written / positions <= 220


def test_od_trains_in_bounded_memory_and_learns(store: tuple[Path, int], tmp_path: Path) -> None:
    reader = CacheReader.open(store[0])
    built = build_student(
        plan_student(None, teacher_folder=reader.teacher_folder(), init="auto", with_mlm_head=True, seq_len=SEQ_LEN),
        seed=0,
    )
    objective = make_objective({"od": 1.0, "mlm": 0.5}, source=reader, student=built.model.config)
    model = DistillationModel(built.model, objective)
    batch = reader.read_rows(0, ROWS, objective.request)
    with LargestVocabularyTensor() as largest:
        losses = model(batch)
        (losses["od"].total + 0.5 * losses["mlm"].total).backward()
    assert 0 < largest.elements <= LOGITS_AT_A_TIME < ROWS * SEQ_LEN * VOCABULARY / 10
    settings = TrainSettings(
        method="od", cache=(str(store[0]),), out=str(tmp_path / "student"), student="2x16:2", init="random", steps=8,
        batch_size=8, lr=2e-2, warmup=1, valid_share=0.1, valid_every=8, device="cpu",
    )  # fmt: skip
    result = train(settings)
    first = next(
        float(line.split('"valid_loss": ')[1].split(",")[0].rstrip("}\n"))
        for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
        if "valid_loss" in line
    )
    assert result.valid["valid_loss"] < first


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_decoder_of_262144_ids_in_bounded_memory(family: str, tmp_path: Path) -> None:
    """After every position: through a head that caps its logits, and through one that is a linear map alone."""
    sizes = {
        "vocab_size": CAUSAL_VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    teacher = save_teacher(tmp_path / "teacher", family, **sizes)
    settings = BuildSettings(
        teacher=str(teacher), corpus=(str(write_corpus(tmp_path / "corpus.txt")),), out=str(tmp_path / "cache.zarr"),
        seq_len=SEQ_LEN, max_rows=CAUSAL_ROWS, targets="logits", k=8, batch_size=CAUSAL_ROWS, device="cpu",
    )  # fmt: skip
    with LargestVocabularyTensor(CAUSAL_VOCABULARY) as largest:
        build_cache(settings)
    assert 0 < largest.elements <= 2**24
    reader = CacheReader.open(tmp_path / "cache.zarr")
    plan = plan_student(
        "1x16", teacher_folder=reader.teacher_folder(), init="auto", with_mlm_head=True, seq_len=SEQ_LEN
    )
    built = build_student(plan, seed=0)
    objective = make_objective({"od": 1.0}, source=reader, student=built.model.config)
    model = DistillationModel(built.model, objective)
    batch = reader.read_rows(0, CAUSAL_ROWS, objective.request)
    with LargestVocabularyTensor(CAUSAL_VOCABULARY) as largest:
        loss = model(batch)["od"]
        loss.total.backward()
    assert 0 < largest.elements <= LOGITS_AT_A_TIME < int(loss.count) * CAUSAL_VOCABULARY / 1.25
    gradient = built.model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()
