"""Models with fewer ids compute what they did, over the ids that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, GenerationConfig

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.weights import ids_in, trim_config, trim_weights
from teacher_cache.errors import StudentError
from tests.causal_models import make_model

MASKED = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra")


def kept_of(entries: int) -> KeptIds:
    """Every third id and those of special tokens."""
    return KeptIds.of([*range(5), *range(6, entries, 3)], entries, 3)


def check(model: Any, kept: KeptIds) -> Any:
    entries = model.config.vocab_size
    small = trim_weights(model.eval(), kept, type(model))
    own = torch.arange(5, 25)[None] % len(kept)
    with torch.no_grad():
        before = model(input_ids=kept.ids_K[own], output_hidden_states=True)
        after = small(input_ids=own, output_hidden_states=True)
    assert torch.equal(before.hidden_states[-1], after.hidden_states[-1])
    torch.testing.assert_close(after.logits, before.logits[..., kept.ids_K], rtol=1e-5, atol=1e-5)
    assert small.config.vocab_size == len(kept) and model.config.vocab_size == entries
    rows, heads = small.get_input_embeddings().weight, small.get_output_embeddings()
    assert (heads.weight is rows) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    sizes = [sum(each.numel() for each in one.parameters()) for one in (model, small)]
    assert sizes[1] < sizes[0]
    return small


@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("tied", [True, False])
def test_masked(family: str, tied: bool, tiny_teacher: Any) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family, tie_word_embeddings=tied))
    small = check(model, kept_of(200))
    assert small.config.pad_token_id == model.config.pad_token_id


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
@pytest.mark.parametrize("tied", [True, False])
def test_causal(family: str, tied: bool) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    check(model, KeptIds.of(range(0, 105, 2), 105, 0))


def test_a_family_whose_weights_are_not_known_is_refused(tiny_teacher: Any) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("bert"))

    def other(config: Any) -> Any:
        config.intermediate_size = 48
        return AutoModelForMaskedLM.from_config(config)

    with pytest.raises(StudentError, match="family 'bert' cannot be cut to fewer ids .*would go from"):
        trim_weights(model, kept_of(200), other)
    with pytest.raises(StudentError, match="it has other weights"):
        trim_weights(model, kept_of(200), lambda config: make_model("llama"))


def test_ids_that_a_configuration_names_follow() -> None:
    config = GenerationConfig(
        bos_token_id=0, eos_token_id=[9, 12], suppress_tokens=[15, 18], bad_words_ids=[[6], [9, 12]], max_new_tokens=9
    )
    assert ids_in(config) == {0, 9, 12, 15, 18, 6}
    kept = KeptIds.of([0, 6, 9, 12, 15, 18], 20, 0)
    found = trim_config(config, kept)
    assert (found.bos_token_id, found.eos_token_id, found.suppress_tokens) == (0, [2, 3], [4, 5])
    assert (found.bad_words_ids, found.max_new_tokens) == ([[1], [2, 3]], 9)
    assert config.eos_token_id == [9, 12]
    # one that the model never had a row for
    assert trim_config(GenerationConfig(eos_token_id=99), kept).eos_token_id is None
