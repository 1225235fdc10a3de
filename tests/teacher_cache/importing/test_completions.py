"""Completions of OpenAI-like servers: texts that are ids or may be several, and what such an answer cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from teacher_cache.errors import SourceError
from teacher_cache.importing.completions import TokenTexts, read_completion
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import (
    Sample,
    assert_same_distributions,
    completion_records,
    read,
    shuffled,
    write_jsonl,
)

Asked = Callable[..., ImportSettings]
Records = list[dict[str, Any]]


def test_completions_are_what_a_build_keeps(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    records = shuffled(completion_records(sample, as_ids=True))
    import_store(settings := asked(write_jsonl(tmp_path / "a.jsonl", records)))
    assert_same_distributions(read(settings.out), read(sample.store))


def test_texts_are_ids_where_one_token_is_written_so(sample: Sample) -> None:
    """Of a byte-level tokenizer most are; a text of no token is refused."""
    tokenizer = AutoTokenizer.from_pretrained(sample.teacher)
    texts = TokenTexts(tokenizer)
    written = {number: tokenizer.decode([number]) for number in range(len(tokenizer))}
    counts = Counter(written.values())
    alone = [number for number, text in written.items() if counts[text] == 1]
    assert len(alone) > 0.8 * len(tokenizer)
    wrong = [number for number in alone if number not in texts.read(written[number], "here")]
    assert not wrong
    with pytest.raises(SourceError, match="here: 'no such token' is no token of the tokenizer"):
        texts.read("no such token", "here")


@pytest.fixture(scope="module")
def byte_texts() -> TokenTexts:
    """Of a tokenizer in which two tokens are halves of a character, which no text tells apart."""
    vocabulary = {"<eos>": 0, "Ã": 1, "â": 2, "Ġthe": 3, "the": 4, "Ġcat": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.decoder = decoders.ByteLevel()
    return TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))


def test_a_space_that_is_lost_in_decoding_leaves_several_tokens() -> None:
    """Decoders of SentencePiece strip it from a token that stands alone, and some servers give what these give."""
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "▁the": 5, "the": 9, "▁cat": 7}, unk_token="<eos>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    assert texts.read("the", "here") == {5, 9}
    assert texts.read(" the", "here") == texts.read("▁the", "here") == {5}
    assert texts.read("cat", "here") == {7}


def test_a_text_that_may_be_several_tokens(byte_texts: TokenTexts) -> None:
    """Listed beside others it is left out; as a token of the row it needs the row's ids, which count."""
    half, tops = "\ufffd", [None, {"the": -1.0, "\ufffd": -2.0}, {" cat": -0.5, "\ufffd": -3.0}]
    record = {"tokens": [" the", half, " cat"], "token_logprobs": [None, -2.0, -0.5], "top_logprobs": tops}
    with pytest.raises(SourceError, match=r"here, token 1: '\ufffd' may be any of 2 tokens that are written so"):
        read_completion(record, byte_texts, "here")
    byte_texts.shared = 0
    row = read_completion({**record, "input_ids": [3, 2, 5]}, byte_texts, "here")
    assert row.input_ids_T.tolist() == [3, 2, 5] and byte_texts.shared == 2
    found = row.distributions
    assert found.position_P.tolist() == [0, 1] and found.ids_E.tolist() == [4, 5]
    assert found.log_probs_E.tolist() == [-1.0, -0.5]
    with pytest.raises(SourceError, match="2 ids for 3 'tokens'"):
        read_completion({**record, "input_ids": [3, 2]}, byte_texts, "here")


ANSWERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "the answer alone": (
        lambda one: [one[name].pop(0) for name in ("tokens", "token_logprobs", "top_logprobs")],
        "the first of 'top_logprobs' is not null.* ask the server with echo",
    ),
    "unlike lists": (lambda one: one["tokens"].pop(), r"\d+ 'tokens', \d+ 'token_logprobs' and \d+ 'top_logprobs'"),
    "no list": (lambda one: one.update(token_logprobs=None), "'token_logprobs' is a NoneType where a list"),
    "moved by one": (
        lambda one: one.update(top_logprobs=[None, None, *one["top_logprobs"][1:-1]]),
        "'token_logprobs' has .* and 'top_logprobs' .* seem not to belong together",
    ),
    "no probability": (
        lambda one: one["top_logprobs"][1].update({"token_id:3": "x"}),
        "entry 1: 'token_id:3' has 'x' for a log-probability",
    ),
    "an unknown text": (lambda one: one["tokens"].__setitem__(2, "qqqqqqqqq"), "token 2: 'qqqqqqqqq' is no token of"),
    "twice": (
        lambda one: one["top_logprobs"][1].update(
            {f"token_id:0{key[9:]}": -9.0 for key in list(one["top_logprobs"][1])}
        ),
        "entry 1: id [0-9]+ is listed twice",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_an_answer_cannot_be(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    change, told = ANSWERS[name]
    records: Records = completion_records(sample, as_ids=True)
    for one in records:
        change(one["choices"][0]["logprobs"])
    settings = asked(write_jsonl(tmp_path / "a.jsonl", records))
    with pytest.raises(SourceError, match=told):
        import_store(settings)
    assert not Path(settings.out).exists()
