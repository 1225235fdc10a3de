"""Relations of decoders: the cache holds what the model computes, and to train on it is to train with the model.

The live side knows nothing of taps, rows or masks: it reads every document alone, takes what the linear maps of a layer
give, turns it by the rotary embedding as its paper says, and computes losses one position at a time.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from student_train.data.loader import CacheLoader
from student_train.data.split import held_out_rows
from student_train.engine.engine import ADAM_BETAS
from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.evaluate.fidelity.heat_maps import relation_maps
from student_train.evaluate.fidelity.records import FidelityReport
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.students.student import build_student, plan_student
from student_train.train.train import train
from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetBatch, TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import SettingsError, TeacherError
from teacher_cache.read.reader import CacheReader
from tests import causal_models

STEPS, BATCH, RATE, SEQ_LEN, LAYER = 12, 4, 5e-4, 32, 3
HEADS = {"query": 8, "key": 4, "value": 4}
"""Of 128 and of 64 components, a sixteenth."""


def build(out: Path, teacher: Path, corpus: Path, **settings: Any) -> Path:
    build_cache(
        BuildSettings(
            teacher=str(teacher), corpus=(str(corpus),), out=str(out),
            **{"targets": "attention", "precision": "float16", "seq_len": SEQ_LEN, "block_rows": 8, "device": "cpu",
               **settings},
        )
    )  # fmt: skip
    return out


@pytest.fixture(scope="module", params=["replay", "qkv"])
def store(
    request: pytest.FixtureRequest, causal_teacher: Path, causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the projections read, which is the default, and the vectors themselves."""
    mode = None if request.param == "replay" else request.param
    return build(tmp_path_factory.mktemp("relations") / "cache.zarr", causal_teacher, causal_corpus, relations=mode)


def documents_of(row: TargetBatch, number: int) -> list[slice]:
    """Where the documents of a row lie, which is padded behind its one document if its documents are not packed."""
    length = int(row.length_B[number])
    if row.starts_BT is None:
        return [slice(0, length)]
    return [slice(*pair) for pair in pairwise([*row.starts_BT[number, :length].nonzero()[:, 0].tolist(), length])]


def live_vectors(model: PreTrainedModel, layer: int, ids_T: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values [T, D] of one layer of a Llama that reads one document."""
    attention, seen = model.model.layers[layer - 1].self_attn, {}
    handles = [
        getattr(attention, f"{name[0]}_proj").register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output[0]})
        )
        for name in VECTORS
    ]
    try:
        model(ids_T[None])
    finally:
        for handle in handles:
            handle.remove()
    theta, width = model.config.rope_parameters["rope_theta"], attention.head_dim
    frequency_F = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_TF = torch.arange(len(ids_T))[:, None] * frequency_F
    for name in VECTORS[:2]:
        first_THF, second_THF = seen[name].unflatten(1, (-1, width)).chunk(2, dim=2)
        cos_T1F, sin_T1F = (turned.float()[:, None] for turned in (angle_TF.cos(), angle_TF.sin()))
        turned = first_THF * cos_T1F - second_THF * sin_T1F, second_THF * cos_T1F + first_THF * sin_T1F
        seen[name] = torch.cat(turned, dim=2).flatten(1)
    return seen


def relation_kl(teacher_TD: Tensor, student_TD: Tensor, heads: int) -> Tensor:
    """Sum over positions of the mean over heads of KL: each position related to itself and those before it."""
    total = torch.zeros(())
    for p_Td, s_Td in zip(teacher_TD.chunk(heads, dim=1), student_TD.chunk(heads, dim=1), strict=True):
        for i in range(len(p_Td)):
            log_p, log_s = ((x[: i + 1] @ x[i] / math.sqrt(x.shape[1])).log_softmax(0) for x in (p_Td, s_Td))
            total = total + (log_p.exp() * (log_p - log_s)).sum()
    return total / heads


def test_cached_vectors_are_those_of_the_documents_alone(store: Path, causal_teacher: Path) -> None:
    reader = CacheReader.open(store)
    (spec,) = reader.manifest.targets.attention
    assert (spec.mode, spec.widths) in (("replay", (32, 16, 16)), ("qkv", (32, 16, 16)))
    assert (spec.replay is None) == (spec.mode == "qkv")
    batch = reader.read_rows(0, 12, TargetRequest(attention_layers=(LAYER,)))["plain"]
    model = AutoModelForCausalLM.from_pretrained(causal_teacher).eval()
    several = 0
    for number in range(12):
        documents = documents_of(batch, number)
        several += len(documents) > 1
        for document in documents:
            with torch.no_grad():
                live = live_vectors(model, LAYER, batch.input_ids_BT[number, document].long())
            for name in VECTORS:
                cached_TD = getattr(batch.attention[LAYER], f"{name}_BTD")[number, document]
                torch.testing.assert_close(cached_TD, live[name], rtol=2e-3, atol=2e-3)
    assert several > 6, "rows must hold several documents for this to say anything"


def online_losses(store: Path, teacher: PreTrainedModel, student: PreTrainedModel) -> list[float]:
    reader = CacheReader.open(store)
    rows = (range(reader.rows - held_out_rows(reader.rows, 0.02)),)
    loader = CacheLoader(reader, TargetRequest(next_tokens=True), rows=rows, batch_size=BATCH, seed=0, device="cpu")
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if (p.ndim >= 2) == decayed], "weight_decay": 0.01 * decayed}
        for decayed in (True, False)
    ]
    optimizer, losses = torch.optim.AdamW(groups, betas=ADAM_BETAS), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (STEPS - step) / (STEPS - 1) if step else RATE  # one step of warm-up
        targets = next(loader).views["plain"]
        total = torch.zeros(())
        for number in range(len(targets.input_ids_BT)):
            for document in documents_of(targets, number):
                ids_T = targets.input_ids_BT[number, document].long()
                with torch.no_grad():
                    taught = live_vectors(teacher, LAYER, ids_T)
                own = live_vectors(student, 2, ids_T)
                total = total + sum(relation_kl(taught[name], own[name], HEADS[name]) for name in VECTORS)
        loss = total / targets.length_B.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        losses.append(loss.item())
    loader.close()
    return losses


@pytest.mark.parametrize("rows", ["packed", "document"])
def test_training_from_the_cache_is_training_with_the_teacher(
    rows: str, shared_data: Path, causal_corpus: Path, tmp_path: Path
) -> None:
    folder = shared_data / "causal-tiny"
    cache = build(tmp_path / "cache.zarr", folder, causal_corpus, max_rows=24, rows=rows)
    train(
        TrainSettings(
            method="mha", cache=(str(cache),), out=str(tmp_path / "student"), steps=STEPS, batch_size=BATCH, lr=RATE,
            warmup=1, student="2x128", device="cpu",
        )
    )  # fmt: skip
    cached = [record["mha"] for record in read_records(tmp_path / "student" / "metrics.jsonl") if "loss" in record]
    said = json.loads((tmp_path / "student" / "provenance.json").read_text())["objective"]["mha"]
    assert (said["relation_heads"], said["key_value_heads"], said["relation_mask"]) == (8, 4, "causal")
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    plan = plan_student("2x128", teacher_folder=folder, init="auto", with_mlm_head=True, seq_len=SEQ_LEN)
    online = online_losses(cache, teacher, build_student(plan, seed=0).model.eval())
    worst = max(abs(c - o) / o for c, o in zip(cached, online, strict=True))
    assert worst < 1e-3, (cached, online)
    assert online[-1] < 0.9 * online[0], "a training that learns nothing would agree with anything"


@pytest.mark.parametrize("relations", [None, "qkv"])
@pytest.mark.parametrize("precision", ["float16", "nmse:1e-1"])
def test_derived_and_described_as_wide_as_they_are(
    precision: str, relations: str | None, causal_teacher: Path, causal_corpus: Path, tmp_path: Path
) -> None:
    settings = {"precision": "nmse:1e-2", "max_rows": 32, "relations": relations}
    source = build(tmp_path / "fine.zarr", causal_teacher, causal_corpus, **settings)
    out = tmp_path / "coarse.zarr"
    flags: dict[str, Any] = {"precision": precision} if precision != "float16" else {"row_range": "3:30"}
    derive_store(DeriveSettings(src=str(source), dst=str(out), **flags), Silent())
    first = 0 if precision != "float16" else 3
    readers = [CacheReader.open(path) for path in (source, out)]
    request = TargetRequest(attention_layers=(LAYER,))
    assert [reader.manifest.targets.attention[0].widths for reader in readers] == [(32, 16, 16)] * 2
    fine, coarse = (
        reader.read_rows(start, start + 16, request)["plain"] for reader, start in zip(readers, (first, 0), strict=True)
    )
    real_BT = fine.real_BT()
    for name in VECTORS:
        before, after = (getattr(each.attention[LAYER], f"{name}_BTD")[real_BT] for each in (fine, coarse))
        error = float((before - after).square().sum() / (before - before.mean(0)).square().sum())
        assert error == 0 if precision == "float16" else 0.01 < error < 0.2, (name, error)


@pytest.mark.parametrize(("flags", "mask"), [({}, "causal"), ({"relation_mask": "full"}, None)])
def test_fidelity_measures_what_was_trained(
    flags: dict[str, Any], mask: str | None, store: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    train(
        TrainSettings(
            method="mha", cache=(str(store),), out=str(folder), steps=3, batch_size=4, student="2x32", device="cpu",
            **flags,
        )
    )  # fmt: skip
    report = measure_fidelity(folder, (str(store),))
    (relation,) = report.relations
    assert (relation.heads, relation.key_value_heads, relation.mask) == (2, 1, mask)
    validated = [one for one in read_records(folder / "metrics.jsonl") if "valid_mha" in one][-1]
    assert relation.total == pytest.approx(validated["valid_mha"], rel=1e-4)
    assert FidelityReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert f"2 and 1 heads{', causal' if mask else ''}" in next(iter(report.lines().values())).place
    maps = relation_maps(folder, (str(store),))
    later = [np.triu(each, 1).any() for each in (*maps.teacher.values(), *maps.student.values())]
    assert any(later) == (mask is None)


def test_layers_without_attention_are_refused_by_name(causal_corpus: Path, tmp_path: Path) -> None:
    teacher = causal_models.save_teacher(
        tmp_path / "teacher", "lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"]
    )
    with pytest.raises(TeacherError, match="attention of family 'lfm2' .* .2 of its 4 layers .* leave attention out"):
        build(tmp_path / "cache.zarr", teacher, causal_corpus, segments="joined")
    assert not (tmp_path / "cache.zarr").exists()


def test_heads_that_do_not_divide_say_which_widths(store: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        method="mha", cache=(str(store),), out=str(tmp_path / "student"), steps=1, student="2x32", device="cpu",
        relation_heads_kv=32,
    )  # fmt: skip
    with pytest.raises(SettingsError, match="--relation-heads-kv 32 does not divide both the teacher's key width 16"):
        train(settings)
    assert not (tmp_path / "student").exists()
