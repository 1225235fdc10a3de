"""Facts of model families: which can teach, and how long a row each can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.utils import logging

from student_train.students.pretrained import check_family
from teacher_cache.errors import StudentError
from teacher_cache.models.families import (
    encoder_of,
    pooler_option,
    position_limit,
    quiet_transformers,
    why_not_an_encoder,
)
from teacher_cache.teacher.teacher import Teacher

ENCODERS = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"]


@pytest.mark.parametrize("family", [*ENCODERS, "camembert", "eurobert", "nomic_bert", "albert"])
def test_encoders_can_teach(family: str) -> None:
    assert why_not_an_encoder(AutoConfig.for_model(family)) is None


@pytest.mark.parametrize(
    "family, options, what",
    [
        ("gpt2", {}, "a decoder"),
        ("llama", {}, "a decoder"),
        ("bert", {"is_decoder": True}, "a decoder"),
        ("t5", {}, "an encoder-decoder"),
        ("bart", {}, "an encoder-decoder"),
        ("vit", {}, "without a masked-LM class in Transformers"),
    ],
)
def test_others_are_called_by_what_they_are(family: str, options: dict[str, bool], what: str, tmp_path: Path) -> None:
    """And a student is refused by the same rule as a teacher."""
    config = AutoConfig.for_model(family, **options)
    assert why_not_an_encoder(config) == what
    config.save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=f"family '{family}', which is no encoder with a masked language model"):
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
