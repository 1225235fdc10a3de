"""A decoder sliced from its teacher: the teacher itself where nothing is left out, exact where nothing is lost."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from student_train.student_shape import read_shape
from student_train.students.narrowing.decoder import narrow_decoder, why_no_decoder
from student_train.students.narrowing.decoder_heads import choose_groups, matching_pairs
from student_train.students.narrowing.decoder_parts import find_decoder_parts
from student_train.students.narrowing.narrow import Narrowing
from student_train.students.narrowing.sample import TokenSample
from student_train.students.shape import derive_config
from tests.causal_models import VOCABULARY, make_model

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
]


def names(value: Any) -> str | None:
    return value if isinstance(value, str) else "tied" if value.get("tie_word_embeddings") else "untied"


def make_teacher(family: str, **sizes: Any) -> PreTrainedModel:
    """Random, with norms and biases that are neither 1 nor 0."""
    teacher = make_model(family, **sizes)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return teacher


def student_of(teacher: PreTrainedModel, spec: str, layers: tuple[int, ...]) -> PreTrainedModel:
    shape = read_shape(spec).completed(teacher_heads=4, feed_forward_ratio=2, teacher_key_value_heads=2)
    torch.manual_seed(7)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(derive_config(teacher.config, shape, layers))
    return student.eval()


def slice_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...], sample: TokenSample
) -> Narrowing:
    ours, theirs = find_decoder_parts(student), find_decoder_parts(teacher)
    assert ours is not None
    assert theirs is not None
    assert why_no_decoder(ours, theirs) is None
    return narrow_decoder(ours, theirs, layers, sample, with_head=True)


def random_rows(rows: int = 40, *, isolated: bool = False) -> TokenSample:
    ids_BT = torch.randint(1, len(VOCABULARY), (rows, 20), generator=torch.Generator().manual_seed(0))
    starts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    starts_BT[:, [0, 7]] = True
    real_BT = torch.arange(20).expand(rows, 20) < 17
    return TokenSample(input_ids_BT=ids_BT, real_BT=real_BT, starts_BT=starts_BT if isolated else None)


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 1) -> Tensor:
    ids_BT = torch.randint(1, len(VOCABULARY), (4, 16), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids_BT, use_cache=False).logits


@pytest.mark.parametrize("family, sizes", FAMILIES, ids=names)
@pytest.mark.parametrize("isolated", [False, True])
def test_with_all_sizes_and_layers_it_is_the_teacher(family: str, sizes: dict[str, Any], isolated: bool) -> None:
    teacher = make_teacher(family, **sizes)
    student = student_of(teacher, "4x32:4:64:2", (1, 2, 3, 4))
    assert (logits(student) - logits(teacher)).abs().max() > 0.1
    narrowing = slice_teacher(student, teacher, (1, 2, 3, 4), random_rows(isolated=isolated))
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-4)
    assert narrowing.kept == 1 and str(narrowing) == "fitted on 680 tokens"


@torch.no_grad()
def keep_to_subspace(teacher: PreTrainedModel, width: int) -> None:
    """Let whatever writes to the stream write to `width` of its dimensions alone."""
    base: Any = teacher.model
    draw = torch.Generator().manual_seed(5)
    basis_DK = torch.linalg.qr(torch.randn(teacher.config.hidden_size, width, generator=draw, dtype=torch.float64))[0]
    project_DD = basis_DK @ basis_DK.T
    base.embed_tokens.weight.copy_(base.embed_tokens.weight @ project_DD)
    for layer in base.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(project_DD @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(project_DD @ linear.bias)


@pytest.mark.parametrize("family, sizes", FAMILIES, ids=names)
def test_a_stream_that_lies_in_a_subspace_is_kept_exactly(family: str, sizes: dict[str, Any]) -> None:
    """Whatever the scales of the norms are: maps take them in, a tied head has axes along which they lie.

    Norms compute in float32, whatever they are given.
    """
    teacher = make_teacher(family, rms_norm_eps=1e-12, **sizes).double()
    keep_to_subspace(teacher, 24)
    student = with_heads_of(teacher, "4x24:4:64:2", (1, 2, 3, 4)).double()
    narrowing = slice_teacher(student, teacher, (1, 2, 3, 4), random_rows(60))
    assert narrowing.kept == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-5)


def with_heads_of(teacher: PreTrainedModel, spec: str, layers: tuple[int, ...]) -> PreTrainedModel:
    """A random student whose heads are as wide as the teacher's, whatever its width."""
    config = derive_config(teacher.config, read_shape(spec).completed(), layers)
    config.head_dim = teacher.model.layers[0].self_attn.head_dim
    torch.manual_seed(7)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return student.eval()


def test_heads_and_units_that_write_nothing_are_left_out_and_cost_nothing() -> None:
    teacher = make_teacher("llama", tie_word_embeddings=True)
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[:, :16] = 0  # the first group: heads 1 and 2 of 8 components
            layer.mlp.down_proj.weight[:, 10:34] = 0
    student = with_heads_of(teacher, "4x32:2:40:1", (1, 2, 3, 4))
    narrowing = slice_teacher(student, teacher, (1, 2, 3, 4), random_rows())
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-4)
    expected = "fitted on 680 tokens, 2 of 4 heads, 1 of 2 groups of them, 40 of 64 feed-forward units"
    assert str(narrowing) == expected


@pytest.mark.parametrize(
    "spec", ["3x24:3:48:3", "3x16:4:48:2", "3x32:8:64:4", "3x16:2:48:1", "3x32:4:48:4", "3x32:2:96:2"]
)
@pytest.mark.parametrize("family, sizes", [FAMILIES[0], FAMILIES[3]], ids=names)
def test_other_heads_and_units_come_closer_than_noise(family: str, sizes: dict[str, Any], spec: str) -> None:
    layers = (1, 2, 4)
    teacher = make_teacher(family, **sizes)
    student = student_of(teacher, spec, layers)
    before = (logits(student) - logits(teacher)).square().mean()
    slice_teacher(student, teacher, layers, random_rows(100))
    assert (logits(student) - logits(teacher)).square().mean() < 0.85 * before
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_further_heads_and_units_change_nothing() -> None:
    teacher = make_teacher("qwen2", tie_word_embeddings=True)
    student = with_heads_of(teacher, "4x32:8:96:4", (1, 2, 3, 4))
    slice_teacher(student, teacher, (1, 2, 3, 4), random_rows(60))
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=2e-2)


def test_pairs_of_rotary_positions_are_those_turned_alike() -> None:
    theirs = 10_000.0 ** (-torch.arange(0, 64, 2) / 64)
    half, third = (10_000.0 ** (-torch.arange(0, width, 2) / width) for width in (32, 48))
    assert matching_pairs(half, theirs) == [(pair, 2 * pair) for pair in range(16)]
    assert matching_pairs(theirs, half) == [(2 * pair, pair) for pair in range(16)]
    assert matching_pairs(theirs, theirs) == [(pair, pair) for pair in range(32)]
    assert matching_pairs(third, theirs) is None


def test_groups_are_chosen_whole_by_what_their_heads_write() -> None:
    importance_H = torch.tensor([5.0, 0.0, 3.0, 3.0, 1.0, 1.0])
    chosen = choose_groups(importance_H, 3, 2, 2)
    assert [(each.group, each.heads, each.copy) for each in chosen] == [(0, (0, 1), 0), (1, (2, 3), 0)]
    assert [each.heads for each in choose_groups(importance_H, 3, 2, 1)] == [(0,), (2,)]
    assert [each.heads for each in choose_groups(importance_H, 3, 1, 2)] == [(2, 3)]
    further = choose_groups(importance_H, 3, 6, 2)
    assert [each.copy for each in further] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    "family, spec, sizes, said",
    [
        ("llama", "2x64:8", {}, "a wider student than the teacher"),
        (
            "llama",
            "2x24:4",
            {},
            "the teacher's of 8, are turned by other rotary frequencies (3 or 6 heads would do",
        ),
        ("qwen3", "2x32:2", {}, "its heads of 16 components, the teacher's of 8, are wider and have norms"),
    ],
)
def test_what_cannot_be_sliced_says_why(family: str, spec: str, sizes: dict[str, Any], said: str) -> None:
    teacher = make_teacher(family, **sizes)
    ours, theirs = find_decoder_parts(student_of(teacher, spec, (2, 4))), find_decoder_parts(teacher)
    assert ours is not None and theirs is not None
    assert said in str(why_no_decoder(ours, theirs))


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "olmo2", "mixtral", "smollm3"])
def test_layers_of_another_make_have_no_such_parts(family: str) -> None:
    assert find_decoder_parts(make_model(family)) is None


def test_the_same_rows_give_the_same_weights() -> None:
    teacher = make_teacher("llama", tie_word_embeddings=True)
    first, second = (student_of(teacher, "2x16:4", (2, 4)) for _ in range(2))
    for student in (first, second):
        slice_teacher(student, teacher, (2, 4), random_rows())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_the_real_teacher_is_far_closer_than_noise(shared_data: Path, shared_corpus: Path) -> None:
    folder = shared_data / "causal-tiny"
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as lines:
        text = "".join(next(lines) for _ in range(20))
    ids_BT = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: 128 * 36]).view(-1, 128)
    fitted_on, held_out = ids_BT[:32], ids_BT[32:]
    shape = read_shape("4x64:2:170:1").completed()
    student = AutoModelForCausalLM.from_config(derive_config(teacher.config, shape, (1, 2, 3, 4))).eval()
    noise_kl = divergence(teacher, student, held_out)
    sample = TokenSample(input_ids_BT=fitted_on, real_BT=torch.ones_like(fitted_on, dtype=torch.bool))
    slice_teacher(student, teacher, (1, 2, 3, 4), sample)
    sliced_kl = divergence(teacher, student, held_out)
    assert sliced_kl < 0.2 * noise_kl, (sliced_kl, noise_kl)


@torch.no_grad()
def divergence(teacher: PreTrainedModel, student: PreTrainedModel, ids_BT: Tensor) -> float:
    """KL(teacher || student) of the output."""
    exact, ours = (model(ids_BT, use_cache=False).logits.log_softmax(-1) for model in (teacher, student))
    return float((exact.exp() * (exact - ours)).sum(-1).mean())
