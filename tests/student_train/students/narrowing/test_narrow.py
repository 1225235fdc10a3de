"""A student sliced from its teacher: the teacher itself where nothing is left out, and more of it than a plain cut."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from student_train.student_shape import read_shape
from student_train.students.narrowing.narrow import Narrowing, narrow
from student_train.students.narrowing.parts import find_parts
from student_train.students.narrowing.sample import TokenSample
from student_train.students.shape import derive_config

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra"]


def models(teacher_folder: Path, spec: str, layers: tuple[int, ...]) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = AutoModelForMaskedLM.from_pretrained(teacher_folder).eval()
    config = derive_config(AutoConfig.from_pretrained(teacher_folder), read_shape(spec).completed(), layers)
    torch.manual_seed(7)
    return AutoModelForMaskedLM.from_config(config).eval(), teacher


def slice_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...], sample: TokenSample
) -> Narrowing:
    ours, theirs = find_parts(student), find_parts(teacher)
    assert ours is not None
    assert theirs is not None
    return narrow(ours, theirs, layers, sample, with_head=True)


def random_rows(pad_id: int = 0, *, rows: int = 30, padding: int = 0) -> TokenSample:
    ids_BT = torch.randint(5, 200, (rows, 20), generator=torch.Generator().manual_seed(0))
    real_BT = torch.arange(20).expand(rows, 20) < 20 - padding
    return TokenSample(input_ids_BT=ids_BT.masked_fill(~real_BT, pad_id), real_BT=real_BT)


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 1) -> Tensor:
    return model(input_ids=torch.randint(5, 200, (4, 16), generator=torch.Generator().manual_seed(seed))).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_sizes_and_layers_it_is_the_teacher(family: str, tiny_teacher: Any) -> None:
    student, teacher = models(tiny_teacher(family), "4x32:4:64", (1, 2, 3, 4))
    narrowing = slice_teacher(student, teacher, (1, 2, 3, 4), random_rows())
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-3)
    assert narrowing.kept == 1 and str(narrowing) == "fitted on 600 tokens"


def test_further_units_write_nothing_and_dead_ones_are_left_out(tiny_teacher: Any) -> None:
    student, teacher = models(tiny_teacher(), "4x32:4:96", (1, 2, 3, 4))
    slice_teacher(student, teacher, (1, 2, 3, 4), random_rows())
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-2)
    student, teacher = models(tiny_teacher(), "4x32:4:40", (1, 2, 3, 4))
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            layer.output.dense.weight[:, 10:34] = 0
    narrowing = slice_teacher(student, teacher, (1, 2, 3, 4), random_rows())
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-3)
    assert str(narrowing) == "fitted on 600 tokens, 40 of 64 feed-forward units"


@pytest.mark.parametrize("spec", ["3x24:4:48", "3x24:3:48", "3x24:6:96", "3x24:2:48", "3x24:8:64"])
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_any_heads_and_units_come_closer_than_noise(family: str, spec: str, tiny_teacher: Any) -> None:
    layers = (1, 2, 4)
    student, teacher = models(tiny_teacher(family), spec, layers)
    before = (logits(student) - logits(teacher)).square().mean()
    slice_teacher(student, teacher, layers, random_rows(rows=100))
    assert (logits(student) - logits(teacher)).square().mean() < 0.6 * before


def test_components_that_no_teacher_head_has_can_still_be_learned(tiny_teacher: Any) -> None:
    # heads of 12 components from heads of 8
    student, teacher = models(tiny_teacher(), "2x24:2:48", (2, 4))
    slice_teacher(student, teacher, (2, 4), random_rows())
    attention = student.bert.encoder.layer[0].attention.self
    further = [*range(8, 12), *range(20, 24)]
    assert not attention.query.weight[further].any() and not attention.query.bias[further].any()
    assert attention.key.weight[further].all() and attention.value.weight[further].all()
    logits_with_gradient = student(input_ids=random_rows().input_ids_BT).logits
    logits_with_gradient.square().mean().backward()
    assert attention.query.weight.grad[further].any() and attention.value.weight.grad[further].any()


def test_embeddings_as_wide_as_the_teacher_enter_a_narrower_stream(tiny_teacher: Any) -> None:
    folder = tiny_teacher("electra", embedding_size=32)
    student, teacher = models(folder, "3x24:3:48", (1, 2, 4))
    assert student.electra.embeddings_project.weight.shape == (24, 32)
    before = (logits(student) - logits(teacher)).square().mean()
    slice_teacher(student, teacher, (1, 2, 4), random_rows(rows=100))
    ours, theirs = (model.get_input_embeddings().weight for model in (student, teacher))
    assert torch.equal(ours, theirs)
    assert (logits(student) - logits(teacher)).square().mean() < 0.6 * before


def test_padding_counts_for_nothing(tiny_teacher: Any) -> None:
    sliced = []
    for pad_id in (0, 17):
        student, teacher = models(tiny_teacher(), "2x24:3:48", (2, 4))
        narrowing = slice_teacher(student, teacher, (2, 4), random_rows(pad_id, padding=6))
        assert narrowing.tokens == 30 * 14
        sliced.append(student.state_dict())
    assert all(torch.equal(value, sliced[1][name]) for name, value in sliced[0].items())


def test_the_real_teacher_is_closer_than_its_first_components(shared_teacher: Path, shared_corpus: Path) -> None:
    layers = (2, 4, 6)
    ids_BT = real_rows(shared_teacher, shared_corpus, rows=20)
    fitted_on, held_out = ids_BT[:16], ids_BT[16:]
    sliced, teacher = models(shared_teacher, "3x192:6:768", layers)
    cut, _ = models(shared_teacher, "3x192:6:768", layers)
    noise_kl = divergence(teacher, cut, held_out)
    cut_down(cut, teacher, layers)
    sample = TokenSample(input_ids_BT=fitted_on, real_BT=torch.ones_like(fitted_on, dtype=torch.bool))
    narrowing = slice_teacher(sliced, teacher, layers, sample)
    assert 0.8 < narrowing.kept < 0.9
    sliced_kl, cut_kl = divergence(teacher, sliced, held_out), divergence(teacher, cut, held_out)
    assert sliced_kl < 0.75 * cut_kl < 0.75 * noise_kl, (sliced_kl, cut_kl, noise_kl)


def real_rows(teacher: Path, corpus: Path, *, rows: int) -> Tensor:
    """Rows of 100 tokens of real text, every seventh masked."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        texts = [next(lines) for _ in range(rows)]
    encoded = tokenizer(texts, truncation=True, max_length=100, padding="max_length", return_tensors="pt")
    ids_BT: Tensor = encoded["input_ids"]
    ids_BT[:, 3::7] = tokenizer.mask_token_id
    return ids_BT


@torch.no_grad()
def divergence(teacher: PreTrainedModel, student: PreTrainedModel, ids_BT: Tensor) -> float:
    """KL(teacher || student) of the output at the masked positions."""
    exact, ours = (model(input_ids=ids_BT).logits[:, 3::7].log_softmax(-1) for model in (teacher, student))
    return float((exact.exp() * (exact - ours)).sum(-1).mean())


@torch.no_grad()
def cut_down(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """The leading rows and columns of every matrix."""
    whole = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        for number, layer in enumerate(layers):
            name = name.replace(f".layer.{number}.", f".layer {layer - 1}.")
        source = whole[name.replace(".layer ", ".layer.")]
        parameter.copy_(source[tuple(slice(size) for size in parameter.shape)])
