"""What the benchmarks of causal teachers compute: gradients of forms against autograd, unbiased samples, exact KL."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from student_train.losses.distributions import KeptTargets, SampledTargets, Targets, TopkTargets, logits_loss
from student_train.train.loop import Trainer
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.read.reader import CacheReader
from teacher_cache.teacher.teacher import Teacher
from tests.causal_models import save_teacher, write_corpus

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PLACES, VOCABULARY, KEPT = 6, 50, 7


@pytest.fixture(scope="module")
def forms() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import causal_forms

    yield causal_forms
    sys.path.remove(str(BENCHMARKS))


def random_logits(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn((PLACES, VOCABULARY), generator=draw, dtype=torch.float64)


def some_targets() -> dict[str, Targets]:
    p_PV, real_P = random_logits(0).softmax(1), torch.ones(PLACES, dtype=torch.bool)
    p_PK, ids_PK = p_PV.topk(KEPT)
    log_tail_P = (1 - p_PK.sum(1)).log()
    counts_PK = torch.arange(KEPT).repeat(PLACES, 1)
    return {
        "tail": TopkTargets(ids_PK, p_PK.log(), log_tail_P, real_P),
        "renormalised": KeptTargets(ids_PK, p_PK.log(), real_P),
        "sampled": SampledTargets(ids_PK, counts_PK, real_P),
    }


@pytest.mark.parametrize("name", ["tail", "renormalised", "sampled"])
def test_forms_have_the_gradients_of_the_losses(forms: Any, name: str) -> None:
    targets, logits_PV = some_targets()[name], random_logits(1).requires_grad_()
    logits_loss(logits_PV, targets).backward()
    found, q_PV = forms.of_targets(targets, logits_PV.detach().softmax(1)), logits_PV.detach().softmax(1)
    torch.testing.assert_close(found.dense(q_PV), logits_PV.grad, rtol=1e-9, atol=1e-12)
    weight_VE = torch.randn((VOCABULARY, 5), dtype=torch.float64)
    hidden_PE = found.hidden_gradient(q_PV @ weight_VE, weight_VE)
    torch.testing.assert_close(hidden_PE, logits_PV.grad @ weight_VE, rtol=1e-9, atol=1e-12)


def test_plain_formulas_have_the_gradients_of_their_sums(forms: Any) -> None:
    logits_PV, p_PV = random_logits(1).requires_grad_(), random_logits(0).softmax(1)
    p_PK, ids_PK = p_PV.topk(KEPT)
    log_q_PV = logits_PV.log_softmax(1)
    even_PV = ((1 - p_PK.sum(1, keepdim=True)) / (VOCABULARY - KEPT)).expand_as(p_PV).scatter(1, ids_PK, p_PK)
    label_P1 = ids_PK[:, 3:4]
    plain = {
        "left out": (-(p_PK * log_q_PV.gather(1, ids_PK)).sum(), forms.left_out(ids_PK, p_PK)),
        "even": (-(even_PV * log_q_PV).sum(), forms.spread(ids_PK, p_PK, VOCABULARY)),
        "label": (-log_q_PV.gather(1, label_P1).sum(), forms.drawn(label_P1)),
    }
    weight_VE, q_PV = torch.randn((VOCABULARY, 5), dtype=torch.float64), logits_PV.detach().softmax(1)
    for loss, found in plain.values():
        (wanted_PV,) = torch.autograd.grad(loss, logits_PV, retain_graph=True)
        torch.testing.assert_close(found.dense(q_PV), wanted_PV, rtol=1e-9, atol=1e-12)
        hidden_PE = found.hidden_gradient(q_PV @ weight_VE, weight_VE)
        torch.testing.assert_close(hidden_PE, wanted_PV @ weight_VE, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("slots", [5, 24])
def test_thresholded_samples_are_right_on_average(forms: Any, slots: int) -> None:
    """20,000 samples of one distribution: the mean gradient is that of the whole, within four standard errors."""
    times = 20_000
    p_V, q_PV = random_logits(0)[0].softmax(0), random_logits(1)[:1].softmax(1).expand(times, -1)
    kept = forms.keep(p_V.expand(times, -1), slots, np.random.default_rng(0))
    for found in (kept.gradient(), kept.differences(q_PV, 0.3)):
        gradient_PV = found.dense(q_PV)
        error_V = gradient_PV.mean(0) - (q_PV[0] - p_V)
        allowed_V = 4.5 * gradient_PV.std(0) / math.sqrt(times) + 1e-7
        assert bool((error_V.abs() <= allowed_V).all()), (error_V / allowed_V).abs().max()
    assert bool((kept.real_PK.sum(1) <= slots + 1).all())


def test_the_byte_of_a_probability_is_the_one_above_or_below(forms: Any) -> None:
    p_E, random = np.geomspace(1e-7, 1, 500), np.random.default_rng(0)
    for slots in (2, 12, 32):
        codes_E = forms.code_probabilities(p_E, slots, random)
        error_E = np.abs(forms.read_probabilities(codes_E, slots) / p_E - 1)
        assert error_E.max() < 0.26


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal-benchmarks")
    save_teacher(folder / "teacher", tie_word_embeddings=True)
    write_corpus(folder / "corpus.txt")
    return folder


def test_a_stored_form_is_measured_as_it_lies_on_the_disk(forms: Any, folder: Path) -> None:
    import causal_batches
    import causal_codes

    from teacher_cache.contract.targets import LogitsSpec

    options = argparse.Namespace(
        teacher=str(folder / "teacher"), corpus=[str(folder / "corpus.txt")], work=str(folder / "work"),
        positions=48, seq_len=16, batches=2, near=3, half=2, students="near,far",
    )  # fmt: skip
    texts = causal_batches.Texts(options)
    batch = texts.batch(1)
    vocabulary = texts.teacher.record.vocab_size
    spec = LogitsSpec(form="topk", entries=vocabulary, codec="float16", view="plain")
    size, whole = causal_batches.store_form(texts, batch, spec, folder / "whole")
    shards = [path for path in (folder / "whole" / "logits").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert size * len(batch.places_P) == sum(path.stat().st_size for path in shards)
    # the reader's positions are the batch's, in the same order
    p_PV = torch.zeros_like(batch.logits_PV).scatter(1, whole.ids_PK.long(), whole.log_probs_PK.exp())
    torch.testing.assert_close(p_PV, batch.logits_PV.softmax(1), rtol=2e-3, atol=1e-6)
    student = causal_batches.Student(options.teacher, 3, texts.teacher)
    final_PE = student.final(batch)
    found, kl = causal_codes.hidden_gradients(
        batch, {"whole": (0.0, causal_codes.stored(whole))}, final_PE.detach(), batch.expected(), None
    )
    full, own = (student.gradient(final_PE, found[name]) for name in ("full", "whole"))
    # the same by autograd alone, over all logits at once
    log_q_PV = (final_PE @ batch.weight_VE.T).log_softmax(1)
    loss = (batch.logits_PV.softmax(1) * (batch.logits_PV.log_softmax(1) - log_q_PV)).sum(1).mean()
    assert kl == pytest.approx(float(loss.detach()), rel=1e-4)
    plain = torch.cat([part.flatten() for part in torch.autograd.grad(loss, student.weights)]).double()
    assert float((full - plain).norm() / plain.norm()) < 1e-4
    assert float((own - plain).norm() / plain.norm()) < 1e-2


def test_quality_is_measured_against_the_exact_teacher(forms: Any, folder: Path) -> None:
    import causal_quality

    store = folder / "store.zarr"
    settings = BuildSettings(
        teacher=str(folder / "teacher"), corpus=(str(folder / "corpus.txt"),), out=str(store), seq_len=16, max_rows=12
    )
    build_cache(settings)
    reader, teacher = CacheReader.open(store), Teacher.load(settings.teacher, device="cpu")
    teacher.start()
    found = causal_quality.measure(folder / "teacher", reader, 3, teacher, "cpu")
    assert abs(found["kl"]) < 1e-6 and found["agreement"] == 1
    assert found["perplexity"] == pytest.approx(found["teacher_perplexity"], rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64).eval()
    total, places = 0.0, 0
    for batch in causal_quality.held_out_batches(reader, 3, "cpu"):
        starts = [*batch.starts_BT[0].nonzero()[:, 0].tolist(), int(batch.length_B[0])]
        for start, stop in pairwise(starts):
            ids_1T = batch.input_ids_BT[:, start:stop].long()
            with torch.no_grad():
                log_q_TV = model(ids_1T).logits[0].log_softmax(1)
            total -= float(log_q_TV[:-1].gather(1, ids_1T[0, 1:, None]).sum())
            places += stop - start - 1
    assert (found["places"], found["perplexity"]) == (places, pytest.approx(math.exp(total / places), rel=1e-4))


def test_rows_are_read_once_for_all_stores(forms: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import remembered

    run_teacher, read = Teacher.run, list[int]()

    def count(self: Teacher, input_ids_BT: Tensor, *given: Any, **asked: Any) -> Any:
        if not any(value for name, value in asked.items() if name.endswith("_layers")):
            read.append(len(input_ids_BT))  # the others try what the teacher can do
        return run_teacher(self, input_ids_BT, *given, **asked)

    def built(name: str, **kept: Any) -> dict[str, bytes]:
        out, corpus = folder / f"{name}.zarr", (str(folder / "corpus.txt"),)
        teacher = str(folder / "teacher")
        build_cache(BuildSettings(teacher=teacher, corpus=corpus, out=str(out), seq_len=16, max_rows=12, **kept))
        return {
            str(path.relative_to(out)): path.read_bytes() for path in out.rglob("logits/**/c/**/*") if path.is_file()
        }

    plain = built("plain")
    monkeypatch.setattr(Teacher, "run", count)
    with remembered.remembered_finals(folder / "finals", 16):
        first, count_of_rows = built("first"), sum(read)
        again, other = built("again"), built("other", logits="topk", k=5)
    assert len(plain) > 0 and plain == first == again != other
    assert count_of_rows == sum(read) == len(list((folder / "finals").iterdir())) == 12
    assert Teacher.run is count
    # a row is another one where documents start elsewhere, or where it ends earlier
    teacher = Teacher.load(str(folder / "teacher"), device="cpu")
    teacher.start()
    ids_BT, length_B = torch.arange(32).view(2, 16), torch.tensor([16, 9])
    starts_BT = torch.zeros(2, 16, dtype=torch.bool)
    starts_BT[:, 0] = True
    with remembered.remembered_finals(folder / "others", 16):
        for starts in (None, starts_BT, starts_BT.roll(3, 1) | starts_BT):
            for lengths in (length_B, length_B - 1):
                for _ in range(2):
                    found = teacher.run(ids_BT, lengths, starts_BT=starts).final_BTD
                    wanted = run_teacher(teacher, ids_BT, lengths, starts_BT=starts).final_BTD
                    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert len(list((folder / "others").iterdir())) == 12


def test_forms_are_compared_with_the_ceiling_of_the_same_seeds(forms: Any) -> None:
    import causal_quality

    def measured(**kls: float) -> dict[str, Any]:
        rest = {"agreement": 0.5, "perplexity": 9.0, "teacher_perplexity": 8.0, "places": 7}
        return causal_quality.summarise({int(seed[1:]): {"kl": kl, **rest} for seed, kl in kls.items()})

    ours, ceiling = measured(s0=2.0, s1=3.0, s2=9.0), measured(s0=1.0, s1=2.0)
    assert causal_quality.ratio(ours, ceiling) == (2 + 1.5) / 2 and ours["kl"] == pytest.approx(14 / 3)
    assert causal_quality.ratio(measured(s5=1.0), ceiling) is None


def test_the_ceiling_learns_the_whole_distribution(forms: Any) -> None:
    import causal_quality

    log_p_PV, ours_PV, plain_PV = random_logits(0).log_softmax(1), random_logits(1), random_logits(1)
    ours = causal_quality.Divergence.apply(ours_PV.requires_grad_(), log_p_PV)
    plain = (log_p_PV.exp() * (log_p_PV - plain_PV.requires_grad_().log_softmax(1))).sum()
    (3 * ours).backward()
    (3 * plain).backward()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours_PV.grad, plain_PV.grad, rtol=1e-9, atol=1e-12)


def test_a_form_whose_training_was_stopped_goes_on(
    forms: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import causal_quality
    import trials

    teacher = Teacher.load(str(folder / "teacher"), device="cpu")
    teacher.start()
    one, steps, backward = causal_quality.CONFIGURATIONS["draws-8"], list[int](), Trainer.backward

    def stopped_in_the_third(self: Trainer, *given: Any) -> Any:
        steps.append(self.state.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, *given)

    def measured(out: Path) -> dict[str, Any]:
        options = argparse.Namespace(
            teacher=str(folder / "teacher"), corpus=[str(folder / "corpus.txt")], out=str(out), student="2x32",
            steps=4, tokens=32, seq_len=16, held_out=3, lr=1e-2, device="cpu",
        )  # fmt: skip
        compute = partial(causal_quality.train_and_measure, one, options, 0, teacher)
        return trials.kept(out / "runs" / "draws-8-seed0", {}, compute, finished="")

    whole = measured(tmp_path / "whole")
    monkeypatch.setattr(Trainer, "backward", stopped_in_the_third)
    with pytest.raises(SystemExit) as stopped:
        measured(tmp_path / "stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert measured(tmp_path / "stopped") == whole
    assert steps == [0, 1, 2, 3]


def test_starts_and_methods_of_smaller_decoders_are_compared(forms: Any, folder: Path, tmp_path: Path) -> None:
    import causal_methods

    starts = causal_methods.split_starts("2x32@teacher:1,4,2x16:2@auto,4x16:2@random")
    assert starts == ["2x32@teacher:1,4", "2x16:2@auto", "4x16:2@random"]
    options = argparse.Namespace(
        teacher=str(folder / "teacher"), corpus=[str(folder / "corpus.txt")], out=str(tmp_path), steps=2,
        tokens=64, seq_len=16, held_out=3, lr=1e-3, device="cpu",
    )  # fmt: skip
    teacher = Teacher.load(options.teacher, device="cpu")
    teacher.start()
    store = causal_methods.build_store(teacher, options)
    for start, kl in {"4x32@auto": pytest.approx(0, abs=1e-6), "2x32@random": None}.items():
        found = causal_methods.make_start(start, store, teacher, options)
        assert found["before"]["kl"] == kl if kl is not None else found["before"]["kl"] > 0.05
        assert f"llama {start.partition('@')[0]}" in found["description"]
        measured = []
        for method in ("od", "od+hs", "mha-full-od"):
            stages = causal_methods.stages_of(method, start, 0, store, teacher, options)
            assert [stage["steps"] for stage in stages] == ([1, 1] if "-" in method else [2])
            (tmp_path / method).mkdir(exist_ok=True)
            measured.append(causal_methods.train_and_measure(stages, store, teacher, options, tmp_path / method))
        after = [one["after"]["kl"] for one in measured]
        assert len({found["before"]["kl"], *after}) == 4 and all(math.isfinite(kl) for kl in after)
        assert causal_methods.summarise([one["after"] for one in measured])["kls"] == after
