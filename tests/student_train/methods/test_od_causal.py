"""`od` and `lm` of causal students against plain formulas on what the model itself answers, at real stores.

The heads cap and scale their logits, and the students' vocabularies are padded to more or fewer entries than the
teacher's, as checkpoints do: the tokens are the same, the entries behind them are anybody's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.students.student import build_student, plan_student
from student_train.train.train import train
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import SampledLogits, TargetBatch, TopkLogits
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.read.pool import CacheSource, open_caches
from tests.causal_models import VOCABULARY, save_teacher, write_corpus

TOKENS = len(VOCABULARY)
TEACHER = TOKENS + 7
ROWS, READ = 12, 4


@pytest.fixture(scope="module", params=["sample", "topk"])
def store(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A store of a llama whose last 7 entries are no tokens and get their share of the mass all the same."""
    folder = tmp_path_factory.mktemp(request.param)
    teacher = save_teacher(folder / "teacher", vocab_size=TEACHER, tie_word_embeddings=False)
    corpus = write_corpus(folder / "corpus.txt")
    settings = BuildSettings(
        teacher=str(teacher), corpus=(str(corpus),), out=str(folder / "cache.zarr"), seq_len=24, max_rows=ROWS,
        targets="logits", logits=request.param, k=6, device="cpu",
    )  # fmt: skip
    build_cache(settings)
    return folder / "cache.zarr"


def cut(batch: TargetBatch, entries: int, row: int, place: int) -> tuple[list[int], Tensor, float]:
    """Ids that the student has, their probabilities, and the mass of all others, at one place of a batch."""
    logits = batch.logits
    assert logits is not None
    ids = logits.ids_BMK[row, place].tolist()
    if isinstance(logits, TopkLogits):
        mass = logits.log_probs_BMK[row, place].double().exp()
        tail = float(logits.log_tail_BM[row, place].double().exp())
    else:
        mass, tail = logits.counts_BMK[row, place].double(), 0.0
    given = [number for number, id_ in enumerate(ids) if id_ < entries and mass[number] > 0]
    kept = mass[given]
    if isinstance(logits, SampledLogits):
        return [ids[number] for number in given], kept / kept.sum(), 0.0
    lost = sum(float(mass[number]) for number, id_ in enumerate(ids) if id_ >= entries)
    return [ids[number] for number in given], kept, tail + lost


def reference(student: PreTrainedModel, batch: TargetBatch) -> dict[str, tuple[Tensor, int]]:
    """Sum and number of places of `od` and `lm`, one place after another."""
    arguments = forward_arguments(student, batch.real_BT(), batch.starts_BT)
    log_q_BTV = student(batch.input_ids_BT.long(), **arguments).logits.double().log_softmax(-1)
    entries, places, losses = log_q_BTV.shape[-1], batch.places, {"od": [], "lm": []}
    assert places is not None
    for row, place in places.real_BM().nonzero().tolist():
        log_q_V = log_q_BTV[row, int(places.positions_BM[row, place])]
        label = int(places.label_ids_BM[row, place])
        losses["lm"].append(-log_q_V[label])
        ids, p_K, p_rest = cut(batch, entries, row, place)
        if not ids:
            continue
        loss = (p_K * (p_K.log() - log_q_V[ids])).sum()
        if p_rest:
            others = torch.ones(entries, dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
            loss = loss + p_rest * (torch.tensor(p_rest, dtype=torch.float64).log() - log_q_V[others].logsumexp(0))
        losses["od"].append(loss)
    return {name: (torch.stack(each).sum(), len(each)) for name, each in losses.items()}


def make_student(store: CacheSource, folder: Path, family: str, entries: int) -> PreTrainedModel:
    other = save_teacher(folder, family, seed=4, vocab_size=entries)
    plan = plan_student(
        str(other), teacher_folder=store.teacher_folder(), init="auto", with_mlm_head=True, seq_len=24, isolated=True
    )
    student = build_student(plan, seed=0).model
    # the grouped product of experts knows no float64
    student.set_experts_implementation("eager")
    return student


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("llama", TEACHER), ("llama", TEACHER + 8), ("llama", TEACHER - 3), ("llama", TOKENS), ("gpt2", TEACHER - 3),
        # soft caps and scales, as the head applies them
        ("gemma2", TEACHER), ("gemma2", TEACHER - 3), ("granite", TEACHER + 8), ("cohere", TEACHER),
        ("mixtral", TOKENS),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_the_models_own_answers(
    family: str, entries: int, store: Path, tmp_path: Path
) -> None:
    source = open_caches((str(store),))
    student = make_student(source, tmp_path / "student", family, entries).double()
    objective = make_objective({"od": 1.0, "lm": 0.5}, source=source, student=student.config)
    batch = source.read_rows(0, READ, objective.request)
    logits = batch["plain"].logits
    assert logits is not None and int(logits.ids_BMK.max()) >= TEACHER - 3, "ids that smaller students lack"
    parameters = [each for each in student.parameters() if each.requires_grad]
    expected = reference(student.eval(), batch["plain"])
    model = DistillationModel(student, objective)
    # the model's own head caps and scales; the tap is not on, nothing reads attention
    found = model(batch)
    # all places, as the host counts them for the global batch: also those whose ids the student lacks altogether
    kept = source.load_block(0, objective.request, "plain").count_places(0, READ)
    assert all(int(loss.count) == kept >= expected[name][1] for name, loss in found.items())
    for name, (total, _) in expected.items():
        torch.testing.assert_close(found[name].total, total, rtol=1e-7, atol=1e-9)
    gradients = torch.autograd.grad(found["od"].total + 0.5 * found["lm"].total, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected["od"][0] + 0.5 * expected["lm"][0], parameters, allow_unused=True)
    for ours, other in zip(gradients, theirs, strict=True):
        assert (ours is None) == (other is None)
        if ours is not None and other is not None:
            # logarithms of the tail are float32, and mass is added to them in that
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-8 if entries >= TEACHER else 1e-6)


@pytest.mark.parametrize("more", [8, -3])
def test_a_student_of_another_padding_trains_and_is_exported(more: int, store: Path, tmp_path: Path) -> None:
    student = save_teacher(tmp_path / "student", seed=4, vocab_size=TEACHER + more)
    settings = TrainSettings(
        method="od+lm", cache=(str(store),), out=str(tmp_path / "out"), student=str(student), steps=6, batch_size=4,
        lr=5e-3, warmup=1, valid_share=0.2, device="cpu",
    )  # fmt: skip
    train(settings)
    losses = [record["loss"] for record in read_records(tmp_path / "out" / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == TEACHER + more
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    fidelity = measure_fidelity(tmp_path / "out", [str(store)], rows=2)
    assert fidelity.distribution is not None and 0 <= fidelity.distribution.kl < 20
    assert "language-modelling head" in json.dumps(provenance) and "masked-LM" not in json.dumps(provenance)
