"""Training from the cache is training with the teacher in the loop: the reason to trust a cache at all.

The online side is written as its user would write it: the teacher runs on each batch, the student learns from its raw
outputs with losses spelt out in float64 formulas, textbook AdamW; no line of the store, the codec or the loss kernels.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

from student_train.data.loader import CacheLoader
from student_train.data.split import held_out_rows
from student_train.engine.engine import ADAM_BETAS
from student_train.methods.objective import make_objective
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.students.student import build_student, plan_student
from student_train.train.train import train
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import Places, TargetBatch
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.read.reader import CacheReader

STEPS, BATCH, RATE = 20, 8, 5e-4
ATTENTION_LAYER = 5
RELATION_HEADS = 24
PAIRS = ((1, 2), (2, 4), (3, 6), (1, 4), (2, 5))


@pytest.fixture(scope="module")
def store(shared_teacher: Path, shared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """170 rows x 32 tokens of the real teacher, float16, all ids' mass in top 64 and tail."""
    folder = tmp_path_factory.mktemp("online")
    corpus = folder / "text.txt"
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as text:
        corpus.write_text("".join(line for line, _ in zip(text, range(60), strict=False)), encoding="utf-8")
    settings = BuildSettings(
        teacher=str(shared_teacher), corpus=(str(corpus),), out=str(folder / "cache.zarr"), seq_len=32, max_rows=170,
        precision="float16", device="cpu",
    )  # fmt: skip
    build_cache(settings)
    return folder / "cache.zarr"


class Online:
    """A student that learns from a teacher in memory."""

    def __init__(self, store: Path, teacher_folder: Path, method: str) -> None:
        self.reader = CacheReader.open(store)
        self.method = method
        self.teacher = AutoModelForMaskedLM.from_pretrained(teacher_folder).eval()
        self.student: PreTrainedModel = build_student(
            plan_student(None, teacher_folder=teacher_folder, init="auto", with_mlm_head=method == "od", seq_len=32),
            seed=0,
        ).model
        self.student.eval()  # no dropout, as in distillation from a cache
        for model in (self.teacher, self.student):
            enable_tap(model)
        objective = make_objective({method: 1.0}, source=self.reader, student=self.student.config, relation_heads=24)
        self.request = objective.request
        self.projections = objective.projections[method]

    def losses(self) -> list[float]:
        """The loss of each of the training's steps."""
        training_rows = (range(self.reader.rows - held_out_rows(self.reader.rows, 0.02)),)
        loader = CacheLoader(self.reader, self.request, rows=training_rows, batch_size=BATCH, seed=0, device="cpu")
        parameters = [*self.student.parameters(), *self.projections.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=ADAM_BETAS)
        losses = []
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (STEPS - step) / (STEPS - 1) if step else RATE  # one step of warm-up
            (targets,) = next(loader).views.values()  # only its input is used: rows, masks, lengths
            loss = {"mha": self.relations, "hs": self.hidden, "od": self.distribution}[self.method](targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
            optimizer.step()
            losses.append(loss.item())
        loader.close()
        return losses

    def run(self, model: PreTrainedModel, targets: TargetBatch, layer: int):
        with record_attention(model, [layer]) as recorded:
            encoded = model.base_model(
                targets.input_ids_BT, attention_mask=targets.real_BT().long(), output_hidden_states=True
            )
        return encoded, recorded.vectors[layer]

    def both(self, targets: TargetBatch):
        with torch.no_grad():
            teacher = self.run(self.teacher, targets, ATTENTION_LAYER)
        return teacher, self.run(self.student, targets, 3)

    def relations(self, targets: TargetBatch) -> Tensor:
        (_, teacher), (_, student) = self.both(targets)
        total = torch.zeros(())
        for name in ("query_BTD", "key_BTD", "value_BTD"):
            for row, length in enumerate(targets.length_B.tolist()):
                t, s = (
                    getattr(v, name)[row, :length].reshape(length, RELATION_HEADS, -1).transpose(0, 1)
                    for v in (teacher, student)
                )
                log_t = (t @ t.transpose(1, 2) / t.shape[2] ** 0.5).log_softmax(-1)
                log_s = (s @ s.transpose(1, 2) / s.shape[2] ** 0.5).log_softmax(-1)
                total = total + (log_t.exp() * (log_t - log_s)).sum() / RELATION_HEADS
        return total / targets.length_B.sum()

    def hidden(self, targets: TargetBatch) -> Tensor:
        (teacher, _), (student, _) = self.both(targets)
        total = torch.zeros(())
        real_BT = targets.real_BT()
        for (i, j), projection in zip(PAIRS, self.projections.values(), strict=True):
            error_ND = (projection(student.hidden_states[i]) - teacher.hidden_states[j])[real_BT]
            total = total + error_ND.pow(2).sum() / self.reader.hidden_variance(j)
        return total / real_BT.sum()

    def distribution(self, targets: TargetBatch) -> Tensor:
        masked = targets.places
        assert isinstance(masked, Places)
        inputs = {"input_ids": targets.input_ids_BT, "attention_mask": targets.real_BT().long()}
        with torch.no_grad():
            teacher_BTV = self.teacher(**inputs).logits
        student_BTV = self.student(**inputs).logits
        total = torch.zeros(())
        for row, count in enumerate(masked.count_B.tolist()):
            positions = masked.positions_BM[row, :count]
            p, q = (logits[row, positions].softmax(-1) for logits in (teacher_BTV, student_BTV))
            kept = p.topk(64, dim=-1).indices
            p_kept, q_kept = p.gather(1, kept), q.gather(1, kept)
            p_rest, q_rest = 1 - p_kept.sum(1), 1 - q_kept.sum(1)
            total = total + (p_kept * (p_kept / q_kept).log()).sum() + (p_rest * (p_rest / q_rest).log()).sum()
        return total / masked.count_B.sum()


@pytest.mark.parametrize("method", ["mha", "hs", "od"])
def test_losses_agree_step_for_step(store: Path, shared_teacher: Path, tmp_path: Path, method: str) -> None:
    settings = TrainSettings(
        method=method, cache=(str(store),), out=str(tmp_path / "student"), steps=STEPS, batch_size=BATCH, lr=RATE,
        warmup=1, relation_heads=24, valid_every=STEPS, device="cpu",
    )  # fmt: skip
    train(settings)
    cached = [r["loss"] for r in read_records(tmp_path / "student" / "metrics.jsonl") if "loss" in r]
    online = Online(store, shared_teacher, method).losses()
    worst = max(abs(c - o) / o for c, o in zip(cached, online, strict=True))
    assert worst < 1e-3, (cached, online)
    assert online[-1] < online[0], "a training that learns nothing would agree with anything"
