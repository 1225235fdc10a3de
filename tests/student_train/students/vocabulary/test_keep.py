"""From used ids to kept ones, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, BertConfig, PreTrainedTokenizerFast

from student_train.students.vocabulary.keep import LEAST_USED, keep_ids
from teacher_cache.errors import SettingsError, StudentError
from tests.student_train.students.vocabulary import made


def counts_of(kind: str) -> Any:
    size = made.entries(kind)
    found = made.ids_of(made.whole(kind), made.documents())
    return np.bincount([each for ids in found for each in ids], minlength=size)


def test_what_configurations_name_stays(tmp_path: Path) -> None:
    counts = counts_of("wordlevel")
    used = np.argsort(-counts)[: LEAST_USED + 4]
    config = BertConfig(vocab_size=len(counts), pad_token_id=1, eos_token_id=200)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [201, 202], "bos_token_id": 9999}')
    kept = keep_ids(made.tokenizer("wordlevel"), counts, used, config, tmp_path, "made")
    assert {*used.tolist(), *range(5), 200, 201, 202} == set(kept.ids_K.tolist())
    assert (kept.teacher_entries, kept.stand_in) == (len(counts), 3)


def test_positions_that_are_counted_from_padding_keep_their_place(tmp_path: Path) -> None:
    counts = counts_of("wordlevel")
    used = np.argsort(-counts)[: LEAST_USED + 4]
    config = BertConfig(vocab_size=len(counts), pad_token_id=9)
    kept = keep_ids(made.tokenizer("wordlevel"), counts, used, config, tmp_path, "made")
    assert kept.own(9) == 9


def test_next_to_nothing_is_refused(tmp_path: Path) -> None:
    counts = counts_of("wordlevel")
    # special ids do not count
    used = np.array([*range(5), *np.argsort(-counts)[: LEAST_USED - 1]])
    config = AutoConfig.for_model("bert", vocab_size=len(counts))
    with pytest.raises(SettingsError, match=f"uses {LEAST_USED - 1} of the {len(counts)} ids of 'made'"):
        keep_ids(made.tokenizer("wordlevel"), counts, used, config, tmp_path, "made")


def test_what_stands_in_where_nothing_is_unknown(tmp_path: Path) -> None:
    counts = counts_of("byte-bpe")
    config = AutoConfig.for_model("bert", vocab_size=len(counts))
    used = counts.nonzero()[0]
    for names, token in (({"mask_token": "<mask>", "eos_token": "</s>"}, "<mask>"), ({"eos_token": "</s>"}, "</s>")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made.whole("byte-bpe"), **names)
        assert tokenizer.unk_token_id is None
        kept = keep_ids(tokenizer, counts, used, config, tmp_path, "made")
        assert kept.stand_in == tokenizer.convert_tokens_to_ids(token)


def test_without_a_special_token_nothing_can_stand_in(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(60)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    config = BertConfig(vocab_size=60, pad_token_id=None)
    with pytest.raises(StudentError, match="'made' has no special token"):
        keep_ids(tokenizer, np.ones(60, dtype=np.int64), np.arange(40), config, tmp_path, "made")
