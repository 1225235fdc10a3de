"""Facts of model families: which can teach, and how long a row each can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.utils import logging

from student_train.students.pretrained import check_family, load_config, load_model
from teacher_cache.errors import StudentError, TeacherError
from teacher_cache.models.families import (
    encoder_of,
    kind_of,
    pooler_option,
    position_limit,
    quiet_transformers,
    read_config,
)
from teacher_cache.teacher.teacher import Teacher
from tests import causal_models

ENCODERS = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"]


@pytest.mark.parametrize("family", [*ENCODERS, "camembert", "eurobert", "nomic_bert", "albert"])
def test_encoders_can_teach(family: str) -> None:
    assert kind_of(AutoConfig.for_model(family)) == "masked-lm"


@pytest.mark.parametrize("family", [*causal_models.FAMILIES, "bert"])
def test_decoders_can_teach(family: str) -> None:
    config = causal_models.make_model(family).config if family != "bert" else AutoConfig.for_model(family)
    config.is_decoder = True
    assert kind_of(config) == "causal-lm"


@pytest.mark.parametrize(
    "family, options, what",
    [
        ("mpnet", {"is_decoder": True}, "a decoder without a causal-LM class"),
        ("gemma3", {}, "a decoder whose layers cannot be told"),
        ("t5", {}, "an encoder-decoder"),
        ("bart", {}, "an encoder-decoder"),
        ("vit", {}, "without a masked-LM or causal-LM class in Transformers"),
        ("fnet", {}, "an encoder whose attention heads cannot be told"),
        ("perceiver", {}, "an encoder whose layers cannot be told"),
        ("modernvbert", {}, "an encoder whose layers cannot be told"),
        ("esm", {}, "an encoder whose vocabulary cannot be told"),
    ],
)
def test_others_are_called_by_what_they_are(family: str, options: dict[str, bool], what: str, tmp_path: Path) -> None:
    """And a student is refused by the same rule as a teacher."""
    config = AutoConfig.for_model(family, **options)
    with pytest.raises(ValueError, match=f"^{what}"):
        kind_of(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=f"family '{family}', {what}"):
        check_family(tmp_path)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("head", [True, False])
def test_the_longest_row_is_one_that_can_be_read(tiny_teacher: Callable[..., Path], family: str, head: bool) -> None:
    """RoBERTa's table of 66 positions begins behind the padding id: 64 can be read, like everywhere here."""
    model = (AutoModelForMaskedLM if head else AutoModel).from_pretrained(tiny_teacher(family, head=head))
    assert position_limit(model) == 64
    assert encoder_of(model) is (model.base_model if head else model)


def test_position_limits_follow_the_family(tiny_teacher: Callable[..., Path]) -> None:
    limits = {
        family: Teacher.load(str(tiny_teacher(family))).record.max_positions for family in ("bert", "xlm-roberta")
    }
    assert limits == {"bert": 64, "xlm-roberta": 64}


def test_poolers_are_left_out_where_there_is_one() -> None:
    options = {family: dict(pooler_option(AutoConfig.for_model(family))) for family in ENCODERS}
    none = {"add_pooling_layer": False}
    assert options == {
        "bert": none, "roberta": none, "xlm-roberta": none, "distilbert": {}, "electra": {}, "modernbert": {},
    }  # fmt: skip


AS_PEOPLE_HAVE_THEM: dict[str, dict[str, Any]] = {
    "tuples": {"return_dict": False},
    "matrices": {"output_attentions": True},
    "matrices that the attention function does not give": {"output_attentions": True, "attn_implementation": "sdpa"},
    "all hidden states": {"output_hidden_states": True},
    "pieces that do not divide a row": {"chunk_size_feed_forward": 5},
    "pieces of a wrong type": {"chunk_size_feed_forward": "5"},
    "an attention function that is not installed": {"attn_implementation": "flash_attention_2"},
    "the same by another name": {"_attn_implementation": "flash_attention_2"},
}


def with_settings(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("kind", AS_PEOPLE_HAVE_THEM)
def test_what_a_forward_pass_returns_is_set_here(
    tiny_teacher: Callable[..., Path], tiny_teacher_copy: Callable[..., Path], kind: str
) -> None:
    """Teacher and student compute what they compute with plain settings, and the store's folder has these."""
    ids_BT, length_B = torch.arange(5, 17).view(2, 6), torch.tensor([6, 4])
    plain, switched = tiny_teacher("bert"), with_settings(tiny_teacher_copy("bert"), AS_PEOPLE_HAVE_THEM[kind])
    want, have = (
        Teacher.load(str(folder)).run(ids_BT, length_B, hidden_layers=(2,)).hidden[2] for folder in (plain, switched)
    )
    assert torch.equal(want, have)
    for with_mlm_head in (False, True):
        model = load_model(switched, with_mlm_head=with_mlm_head).model.eval()
        with torch.no_grad():
            answer = encoder_of(model)(ids_BT)
        assert answer.last_hidden_state.shape == (2, 6, 32)
        assert answer.hidden_states is None and answer.attentions is None
    Teacher.load(str(switched)).save(switched)
    assert not AS_PEOPLE_HAVE_THEM[kind].keys() & json.loads((switched / "config.json").read_text()).keys()


@pytest.mark.parametrize(
    "settings, kind",
    [({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({}, "None")],
)
def test_quantised_weights_are_refused(tiny_teacher_copy: Callable[..., Path], settings: Any, kind: str) -> None:
    folder = with_settings(tiny_teacher_copy("bert"), {"quantization_config": settings})
    message = f"weights are quantised .*{kind}.*: give the checkpoint in float32"
    with pytest.raises(TeacherError, match=message):
        Teacher.load(str(folder))
    with pytest.raises(StudentError, match=message):
        load_config(folder)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


def load_as_student(folder: Path) -> None:
    check_family(folder)
    load_model(folder, with_mlm_head=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": "4"}, {"hidden_size": None}, {"num_attention_heads": 0}, {"num_attention_heads": 5},
        {"vocab_size": None}, {"vocab_size": [200]}, {"hidden_act": "no such function"}, {"hidden_act": 3},
        {"max_position_embeddings": "many"}, {"use_return_dict": False}, {"model_type": 7}, {"pad_token_id": 10**9},
        {"dtype": "no such type"}, {"is_encoder_decoder": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_a_wrong_type_are_a_message(tiny_teacher_copy: Callable[..., Path], settings: dict[str, Any]) -> None:
    folder = with_settings(tiny_teacher_copy("bert"), settings)
    with pytest.raises(TeacherError, match="cannot be loaded|is of family"):
        Teacher.load(str(folder))
    with pytest.raises(StudentError, match="no Hugging Face model folder|is of family"):
        load_as_student(folder)


def fail_quietly() -> None:
    assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
    raise ZeroDivisionError


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_speaks_again_afterwards_even_after_an_error(bars: bool) -> None:
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        logging.set_verbosity_info()
        with pytest.raises(ZeroDivisionError), quiet_transformers():
            fail_quietly()
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() == bars
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
