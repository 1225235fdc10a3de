"""For causal models too, training from the cache is training with the teacher in the loop.

The online side knows nothing of rows that hold several documents: it cuts each row into its documents and reads every
one of them alone, teacher and student, with nothing but `model(input_ids).logits`, losses in plain formulas and
textbook AdamW. So it shows at once that packed is alone, that every position has its own next token, and that the loss
is right.
"""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from student_train.data.loader import CacheLoader
from student_train.data.split import held_out_rows
from student_train.engine.engine import ADAM_BETAS
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.students.student import build_student, plan_student
from student_train.train.train import train
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetBatch, TargetRequest
from teacher_cache.read.reader import CacheReader

STEPS, BATCH, RATE, SEQ_LEN, ROWS = 20, 4, 5e-4, 64, 96
WEIGHTS = {"od": 1.0, "lm": 0.5}


@pytest.fixture(scope="module")
def teacher_folder(shared_data: Path) -> Path:
    return shared_data / "causal-tiny"


@pytest.fixture(scope="module")
def store(teacher_folder: Path, shared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows of short sentences, the whole distribution of 1,024 ids after every position."""
    folder = tmp_path_factory.mktemp("causal-online")
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as text:
        articles = "".join(line for line, _ in zip(text, range(12), strict=False))
    (folder / "text.txt").write_text(articles.replace(". ", ".\n").replace(", ", ",\n"), encoding="utf-8")
    build_cache(
        BuildSettings(
            teacher=str(teacher_folder), corpus=(str(folder / "text.txt"),), out=str(folder / "cache.zarr"),
            seq_len=SEQ_LEN, max_rows=ROWS, block_rows=32, logits="topk", k=1024, precision="float16", device="cpu",
        )
    )  # fmt: skip
    return folder / "cache.zarr"


def documents_of(row: TargetBatch, number: int) -> list[Tensor]:
    """The token ids of each document of a row."""
    assert row.starts_BT is not None
    ids_T = row.input_ids_BT[number, : int(row.length_B[number])].long()
    starts = [*row.starts_BT[number, : len(ids_T)].nonzero()[:, 0].tolist(), len(ids_T)]
    return [ids_T[start:stop] for start, stop in pairwise(starts)]


def online_losses(store: Path, teacher: PreTrainedModel, student: PreTrainedModel) -> list[dict[str, float]]:
    """The losses of each of the training's steps."""
    reader = CacheReader.open(store)
    rows = (range(reader.rows - held_out_rows(reader.rows, 0.02)),)
    loader = CacheLoader(reader, TargetRequest(next_tokens=True), rows=rows, batch_size=BATCH, seed=0, device="cpu")
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=ADAM_BETAS,
    )
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (STEPS - step) / (STEPS - 1) if step else RATE  # one step of warm-up
        targets = next(loader).views["plain"]
        divergence, surprise, places = torch.zeros(()), torch.zeros(()), 0
        for number in range(len(targets.input_ids_BT)):
            for ids_T in documents_of(targets, number):
                if len(ids_T) < 2:
                    continue
                with torch.no_grad():
                    p_PV = teacher(ids_T[None]).logits[0, :-1].softmax(-1)
                log_q_PV = student(ids_T[None]).logits[0, :-1].log_softmax(-1)
                divergence = divergence + (p_PV * (p_PV.log() - log_q_PV)).sum()
                surprise = surprise - log_q_PV.gather(1, ids_T[1:, None]).sum()
                places += len(ids_T) - 1
        loss = (WEIGHTS["od"] * divergence + WEIGHTS["lm"] * surprise) / places
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        losses.append({"loss": loss.item(), "od": divergence.item() / places, "lm": surprise.item() / places})
    loader.close()
    return losses


def test_losses_agree_step_for_step(store: Path, teacher_folder: Path, tmp_path: Path) -> None:
    train(
        TrainSettings(
            method="od+lm", weights="1,0.5", cache=(str(store),), out=str(tmp_path / "student"), steps=STEPS,
            batch_size=BATCH, lr=RATE, warmup=1, student="2x128", init="teacher:uniform",
            device="cpu",
        )
    )  # fmt: skip
    cached = [record for record in read_records(tmp_path / "student" / "metrics.jsonl") if "loss" in record]
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    plan = plan_student("2x128", teacher_folder=teacher_folder, init="auto", with_mlm_head=True, seq_len=SEQ_LEN)
    online = online_losses(store, teacher, build_student(plan, seed=0).model.eval())
    for name in ("loss", "od", "lm"):
        worst = max(abs(c[name] - o[name]) / o[name] for c, o in zip(cached, online, strict=True))
        assert worst < 1e-3, (name, cached, online)
    assert online[-1]["loss"] < online[0]["loss"], "a training that learns nothing would agree with anything"
    documents = sum(len(documents_of(row, 0)) for row in _rows(store))
    assert documents > 2 * ROWS, "rows must hold several documents for this to say anything"


def _rows(store: Path) -> list[TargetBatch]:
    batch = CacheReader.open(store).read_rows(0, ROWS, TargetRequest(next_tokens=True))["plain"]
    return [batch.rows(row, row + 1) for row in range(ROWS)]
