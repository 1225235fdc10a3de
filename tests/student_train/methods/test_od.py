"""`od` and `mlm`: what they read, their losses against plain formulas on the student's own logits, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

import student_train.methods.od as methods
from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.losses.distributions import SampledTargets, logits_loss
from student_train.losses.vocabulary import projected_losses, recomputed_losses
from student_train.methods.base import StudentNeeds
from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.student_shape import read_shape
from student_train.students.shape import derive_config
from student_train.students.student import build_student, plan_student
from student_train.train.prepare import prepare_run
from student_train.train.train import train
from teacher_cache.codecs.sparse_logits import draw_samples, sample_points
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest, TopkLogits
from teacher_cache.contract.targets import LogitsSpec
from teacher_cache.errors import SettingsError
from teacher_cache.models.families import encoder_of
from teacher_cache.read.pool import open_caches

LENGTHS = (12, 5, 9)
FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra"]
BOTH = {"od": 1.0, "mlm": 0.5}


def distil(cache: Any, weights: dict[str, float], **options: Any) -> DistillationModel:
    built = build_student(
        plan_student("2x24:4", teacher_folder=cache.folder, init="random", with_mlm_head=True, seq_len=12), seed=0
    )
    return DistillationModel(built.model, make_objective(weights, source=cache, student=built.model.config, **options))


def masked_logits(model: PreTrainedModel, targets: TargetBatch) -> Tensor:
    """The logits at the real masked positions, row after row, by the model's own forward pass."""
    assert targets.places is not None
    logits_BTV = model(input_ids=targets.input_ids_BT.long(), attention_mask=targets.real_BT().long()).logits
    logits_BMV = logits_BTV.take_along_dim(targets.places.positions_BM.long().unsqueeze(-1), dim=1)
    return logits_BMV[targets.places.real_BM()]


def plain_losses(model: PreTrainedModel, targets: TargetBatch, temperature: float) -> dict[str, Tensor]:
    """Both losses as sums, by autograd on all logits; the student's tail as 1 - sum q in float64."""
    assert targets.places is not None and isinstance(targets.logits, TopkLogits)
    real_BM, logits_PV = targets.places.real_BM(), masked_logits(model, targets).double()
    q_PK = (logits_PV / temperature).softmax(1).gather(1, targets.logits.ids_BMK[real_BM].long())
    p_PK, rest_P = targets.logits.log_probs_BMK[real_BM].double().exp(), targets.logits.log_tail_BM[real_BM].exp()
    kept, rest = p_PK * (p_PK / q_PK).log(), rest_P * (rest_P / (1 - q_PK.sum(1))).log()
    tokens_P = targets.places.label_ids_BM[real_BM].long()
    return {
        "od": temperature**2 * (kept.sum() + rest.sum()),
        "mlm": torch.nn.functional.cross_entropy(logits_PV, tokens_P, reduction="sum"),
    }


def gradients_of(model: DistillationModel, losses: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack([weight * losses[name] for name, weight in weights.items()]).sum().backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("way", [projected_losses, recomputed_losses])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_losses_of_every_family_and_the_gradient_of_every_weight(
    family: str,
    way: Callable[..., Tensor],
    tiny_teacher: Any,
    live_cache: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Embeddings are tied to the last map of the head: their gradient comes from both ends."""
    cache = live_cache(tiny_teacher(family), logits=True, temperature=2.0)
    batch = cache.batch(LENGTHS)
    model = distil(cache, BOTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert model._head is not None and model._head.projection is model.student.get_output_embeddings()
    plain = plain_losses(model.student, batch["masked"], 2.0)
    expected = gradients_of(model, plain, BOTH)
    if way is recomputed_losses:
        # what ZeRO 3 marks parameters with that it keeps in pieces; processes then agree on the number of runs
        model._head.projection.weight.ds_id = 0
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    ways: list[Any] = []

    def in_runs_of_4(*args: Any, **options: Any) -> Tensor:
        ways.append(way)
        return way(*args, **options, logits_at_a_time=4 * 200)

    monkeypatch.setattr(methods, way.__name__, in_runs_of_4)
    found = model(batch)
    assert ways == [way]
    assert {name: loss.count.item() for name, loss in found.items()} == {"od": 9, "mlm": 9}
    for name, loss in found.items():
        assert loss.total.item() == pytest.approx(plain[name].item(), rel=1e-5)
    gradients = gradients_of(model, {name: loss.total for name, loss in found.items()}, BOTH)
    assert gradients.keys() == expected.keys() and model.student.get_input_embeddings().weight.grad is not None
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_head_is_run_once_for_both(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=(2,), logits=True)
    model = distil(cache, {"mlm": 1.0, "hs": 1.0, "od": 1.0}, mapping="1:2")
    assert model._head is not None and model._head.projection is not None
    seen: list[Tensor] = []
    model.student.cls.predictions.transform.register_forward_hook(lambda module, args, out: seen.append(out))
    assert list(model(cache.batch(LENGTHS))) == ["mlm", "hs", "od"]
    assert len(seen) == 1


def test_what_they_ask_for_and_say(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), hidden=(2,), logits=True)
    objective = distil(cache, {"hs": 1.0, **BOTH}, mapping="1:2", topk_loss="renormalise").objective
    assert objective.request == TargetRequest(hidden_layers=(2,), logits=True, masked=True)
    assert objective.needs("masked") == StudentNeeds(head=True) and not objective.needs("plain").head
    assert objective.describe()["od"] == {
        "form": "topk", "loss": "renormalise", "temperature": 1.0, "view": "masked"
    }  # fmt: skip
    assert objective.describe()["mlm"] == {"targets": "original ids", "view": "masked"}
    assert distil(cache, {"mlm": 1.0}).objective.request == TargetRequest(masked=True)
    assert cache.required[-1] == TargetRequest(masked=True)


# ---- the whole distribution -----------------------------------------------------------------------------------------


def full_distribution(cache: Any, temperature: float) -> tuple[Batch, Tensor]:
    """A batch whose targets are all ids of the live teacher's distribution, and its log-probabilities [P, V]."""
    batch = cache.batch(LENGTHS)
    masked = batch["masked"].places
    teacher = AutoModelForMaskedLM.from_pretrained(cache.folder).eval()
    with torch.no_grad():
        log_p_PV = (masked_logits(teacher, batch["masked"]) / temperature).log_softmax(1)
    values_PK, ids_PK = log_p_PV.sort(1, descending=True)
    log_probs_BMK = torch.zeros(*masked.positions_BM.shape, log_p_PV.shape[1])
    ids_BMK = torch.arange(log_p_PV.shape[1]).repeat(*masked.positions_BM.shape, 1)
    log_probs_BMK[masked.real_BM()], ids_BMK[masked.real_BM()] = values_PK, ids_PK
    logits = TopkLogits(
        ids_BMK=ids_BMK, log_probs_BMK=log_probs_BMK, log_tail_BM=torch.full(masked.positions_BM.shape, -torch.inf)
    )
    return {"masked": replace(batch["masked"], logits=logits)}, log_p_PV


@pytest.mark.parametrize("topk_loss", ["tail", "renormalise"])
def test_all_ids_kept_is_the_divergence_of_the_whole_distributions(
    topk_loss: str, tiny_teacher: Any, live_cache: Any
) -> None:
    cache = live_cache(tiny_teacher(), logits=True, temperature=1.5)
    batch, log_p_PV = full_distribution(cache, 1.5)
    model = distil(cache, {"od": 1.0}, topk_loss=topk_loss)
    log_q_PV = (masked_logits(model.student, batch["masked"]) / 1.5).log_softmax(1)
    plain = 1.5**2 * torch.nn.functional.kl_div(log_q_PV, log_p_PV, log_target=True, reduction="sum")
    expected = gradients_of(model, {"od": plain}, {"od": 1.0})
    found = model(batch)["od"]
    assert found.total.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, gradient in gradients_of(model, {"od": found.total}, {"od": 1.0}).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_of_what_a_build_draws_are_those_of_the_whole_distribution_on_average(
    tiny_teacher: Any, live_cache: Any
) -> None:
    cache = live_cache(tiny_teacher(), logits=True)
    batch, log_p_PV = full_distribution(cache, 1.0)
    student = distil(cache, {"od": 1.0}).student
    logits_PV = masked_logits(student, batch["masked"]).detach().requires_grad_()
    plain = torch.nn.functional.kl_div(logits_PV.log_softmax(1), log_p_PV, log_target=True, reduction="sum")
    (expected,) = torch.autograd.grad(plain, logits_PV)
    repetitions, draws = 400, 20
    places = np.arange(repetitions * len(log_p_PV))
    points = sample_points(5, places, 0, places, draws)
    drawn_PN = torch.from_numpy(draw_samples(log_p_PV.repeat(repetitions, 1), points, 1.0)).long()
    # every draw as an entry of its own: repeated ids add up
    targets = SampledTargets(drawn_PN, torch.ones_like(drawn_PN), torch.ones(len(places), dtype=torch.bool))
    repeated_PV = logits_PV.detach().repeat(repetitions, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(logits_loss(repeated_PV, targets), repeated_PV)
    mean_PV = gradient.view(repetitions, *logits_PV.shape).mean(0)
    p_PV = log_p_PV.exp()
    deviation = (p_PV * (1 - p_PV) / (draws * repetitions)).sqrt()
    assert bool(((mean_PV - expected).abs() < 5 * deviation + 1e-6).all())


# ---- from a store, by the engine ------------------------------------------------------------------------------------


def test_the_loss_of_topk_targets_is_a_setting(tiny_store: Path, tmp_path: Path) -> None:
    settings = TrainSettings(method="od", topk_loss="renormalise", cache=(str(tiny_store),), out=str(tmp_path / "out"))
    assert prepare_run(settings).objective.describe()["od"]["loss"] == "renormalise"


def test_tokens_need_the_masked_view_alone(tiny_parts: tuple[str, str]) -> None:
    for stores in (tiny_parts[:1], tiny_parts):
        batch = open_caches(stores).read_rows(95, 101, TargetRequest(masked=True))
        assert list(batch) == ["masked"] and batch["masked"].logits is None
        assert batch["masked"].places is not None and batch["masked"].places.count_B.min() > 0


def test_tokens_are_learned_from_a_store_without_logits(make_tiny_store: Callable[..., Path], tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "cache.zarr", targets="hidden", layers="4", hs_view="masked", max_rows=24)
    settings = TrainSettings(
        method="mlm", cache=(str(store),), out=str(tmp_path / "student"), init="random", steps=20, batch_size=16,
        lr=1e-2, valid_share=0.2, device="cpu",
    )  # fmt: skip
    train(settings)
    losses = [record["mlm"] for record in read_records(tmp_path / "student" / "metrics.jsonl") if "mlm" in record]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0]
    report = measure_fidelity(tmp_path / "student", [str(store)])
    assert report.distribution is None and report.hidden


def test_hard_labels_beside_the_distribution_however_a_batch_is_cut(tiny_store: Path, tmp_path: Path) -> None:
    records = {}
    for rows, stage in ((16, 0), (4, 2)):
        out, config = tmp_path / f"student-{rows}", tmp_path / f"stage-{stage}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        settings = TrainSettings(
            method="od+mlm", weights="1,0.5", cache=(str(tiny_store),), out=str(out), steps=4, batch_size=16,
            micro_batch_size=rows, lr=2e-3, warmup=1, device="cpu", deepspeed=str(config),
        )  # fmt: skip
        train(settings)
        records[rows] = [record for record in read_records(out / "metrics.jsonl") if "loss" in record]
    for whole, cut in zip(records[16], records[4], strict=True):
        assert whole["loss"] == pytest.approx(whole["od"] + 0.5 * whole["mlm"], rel=1e-6)
        for name in ("od", "mlm", "grad_norm"):
            assert cut[name] == pytest.approx(whole[name], rel=1e-4), name
    provenance = json.loads((out / "provenance.json").read_text())
    assert list(provenance["objective"]) == ["od", "mlm"]
    report = measure_fidelity(out, [str(tiny_store)], rows=2)
    assert report.distribution is not None and not [note for note in report.notes if "provenance" in note]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["od", "mlm"])
def test_another_vocabulary_is_refused(method: str, tiny_teacher: Any, live_cache: Any) -> None:
    config = derive_config(AutoConfig.from_pretrained(tiny_teacher()), read_shape("2x24:4").completed(), (2, 4))
    config.vocab_size = 210
    with pytest.raises(SettingsError, match=f"--method {method}: .*210 vocabulary entries, the teacher 200"):
        make_objective({method: 1.0}, source=live_cache(tiny_teacher(), logits=True), student=config)


def test_draws_cannot_be_renormalised(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher(), logits=True)
    drawn = replace(cache.manifest.targets, logits=LogitsSpec(form="sample", entries=8, codec="exact"))
    cache = replace(cache, manifest=replace(cache.manifest, targets=drawn))
    distil(cache, {"od": 1.0})
    with pytest.raises(SettingsError, match="--topk-loss 'renormalise' does not fit .* drawn .*--logits topk"):
        distil(cache, {"od": 1.0}, topk_loss="renormalise")


def test_the_encoder_of_the_tied_student_is_the_one_that_trains(tiny_teacher: Any, live_cache: Any) -> None:
    """The head is taken apart once: what happens to the student's parameters later must reach it."""
    cache = live_cache(tiny_teacher(), logits=True)
    model = distil(cache, BOTH)
    before = model(cache.batch(LENGTHS))["mlm"].total.item()
    model.double()
    assert model(cache.batch(LENGTHS))["mlm"].total.dtype == torch.float64
    with torch.no_grad():
        encoder_of(model.student).get_input_embeddings().weight.mul_(2)
    assert model(cache.batch(LENGTHS))["mlm"].total.item() != pytest.approx(before, rel=1e-3)
