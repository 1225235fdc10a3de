"""What log-probabilities cannot be: every wrong source has a message of its own, and leaves no store behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch

from teacher_cache.contract.batch import TargetRequest, TopkLogits
from teacher_cache.errors import SourceError
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.read.reader import CacheReader
from tests.teacher_cache.importing.samples import K, Sample, column_records, vllm_records, write_jsonl, write_parquet

Asked = Callable[..., ImportSettings]
Records = list[dict[str, Any]]


def logprobs(records: Records, row: int, entry: int) -> dict[str, Any]:
    found: dict[str, Any] = records[row]["prompt_logprobs"][entry]
    return found


def shift(records: Records) -> None:
    for one in records:
        one["prompt_logprobs"] = [*one["prompt_logprobs"][1:], None]


def set_first(name: str, value: Any) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        next(iter(logprobs(records, 2, 3).values()))[name] = value

    return change


def add_id(number: str, log_prob: float = -20.0) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        logprobs(records, 2, 3)[number] = {"logprob": log_prob, "rank": 9}

    return change


def all_entries(value: Any) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        for one in logprobs(records, 2, 3).values():
            one["logprob"] = value

    return change


def row(**values: Any) -> Callable[[Records], None]:
    return lambda records: records[2].update(values)


PROMPTS: dict[str, tuple[Callable[[Records], Any], str]] = {
    "shifted": (shift, r"line \d+: the first entry of 'prompt_logprobs' is not null.* moved by one"),
    "entries of other tokens": (
        lambda r: r[2].update(prompt_token_ids=[5] * len(r[2]["prompt_token_ids"])),
        "line 3, entry 1: token 5, which stands there, is not listed",
    ),
    "too few": (lambda r: r[2]["prompt_logprobs"].pop(), r"line 3: 'prompt_logprobs' has \d+ entries for \d+ tokens"),
    "no list": (row(prompt_logprobs="text"), "line 3: 'prompt_logprobs' has 4 entries"),
    "no ids": (row(prompt_token_ids=None), "line 3: there are no token ids; give them as input_ids or"),
    "ids of another type": (row(prompt_token_ids=[1.5]), "line 3: 'prompt_token_ids': holds 1.5, which is no id"),
    "one token": (row(prompt_token_ids=[5], prompt_logprobs=[None]), "line 3: 1 tokens: nothing follows"),
    "no distribution": (
        lambda r: r[2].update(prompt_logprobs=[None] * len(r[2]["prompt_token_ids"])),
        "line 3: no token has a distribution: there is nothing to learn",
    ),
    "a token of no tokenizer": (
        lambda r: r[2]["prompt_token_ids"].append(5000) or r[2]["prompt_logprobs"].append({"5000": {"logprob": -1.0}}),
        "line 3: token id 5000 is none of the tokenizer, whose ids end at 1023",
    ),
    "an id beyond the vocabulary": (
        add_id("1024"),
        "line 3, the distribution of token 3: id 1024 is beyond the vocabulary of 1024 ids",
    ),
    "above 0": (set_first("logprob", 0.5), "line 3, the distribution of token 3: .* is 0.5, above 0"),
    "not a number": (set_first("logprob", float("nan")), "line 3, the distribution of token 3: .* is not a number"),
    "no number at all": (set_first("logprob", "x"), "line 3, entry 3: '[0-9]+': .* is no token id with its logprob"),
    "more than 1": (all_entries(-0.1), r"of token 3: the probabilities of its [89] ids are [78]\.\d+ together"),
    "none": (all_entries(float("-inf")), "of token 3: none of its ids has any probability"),
    "an id twice": (
        lambda r: logprobs(r, 2, 3).update(
            {f"0{name}": {"logprob": -20.0, "rank": 9} for name in list(logprobs(r, 2, 3))[:1]}
        ),
        "of token 3: id [0-9]+ is listed twice",
    ),
    "plain numbers": (
        lambda r: r[2].update(prompt_logprobs=[None, *[-1.5] * (len(r[2]["prompt_token_ids"]) - 1)]),
        "line 3, entry 1: -1.5 holds no token ids; give a mapping",
    ),
    "an id of twenty digits": (add_id("12345678901234567890"), "line 3, entry 3: 12345678901234567890 is no token id"),
    "two completions": (lambda r: r.__setitem__(2, {"choices": [{}, {}]}), "line 3: 'choices' is not a list of one"),
    "another shape": (
        lambda r: r.__setitem__(2, {"input_ids": [1, 2], "top_ids": [[1]], "top_logprobs": [[-1.0]]}),
        "line 3: a record of the shape columns among records of the shape vllm",
    ),
    "no shape": (lambda r: r.__setitem__(0, {"text": "a"}), "line 1: a record of 'text' is of no known shape"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_prompt_logprobs_cannot_be(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    change, told = PROMPTS[name]
    records = vllm_records(sample)
    change(records)
    settings = asked(write_jsonl(tmp_path / "a.jsonl", records))
    with pytest.raises(SourceError, match=told) as caught:
        import_store(settings)
    assert str(tmp_path / "a.jsonl") in str(caught.value)
    assert not Path(settings.out).exists()


COLUMNS: dict[str, tuple[Callable[[Records], Any], str]] = {
    "an entry for every token": (
        lambda r: [one["top_ids"].append([1]) or one["top_logprobs"].append([-1.0]) for one in r],
        r"row \d+: there is an entry for every token.* --entries this or --entries next",
    ),
    "fewer": (lambda r: r[2]["top_ids"].clear(), r"row 2: 'top_ids' has 0 entries for \d+ tokens"),
    "unlike": (
        lambda r: r[2]["top_ids"].append([1]),
        r"row 2: 'top_ids' has \d+ entries and 'top_logprobs' \d+: give as many",
    ),
    "more ids": (lambda r: r[2]["top_ids"][3].pop(), "row 2, entry 3: 7 ids and other log-probabilities than as many"),
    "log-probabilities without ids": (
        lambda r: r[2]["top_ids"].__setitem__(3, []),
        "row 2, entry 3: 0 ids and other log-probabilities than as many",
    ),
    "none": (lambda r: r[2]["top_ids"].__setitem__(1, [None] * 8), "row 2, entry 1: holds None, which is no id"),
    "negative": (
        lambda r: r[2]["top_ids"][1].__setitem__(0, -3),
        "row 2, the distribution of token 2: id -3 is beyond",
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_what_columns_cannot_be(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    change, told = COLUMNS[name]
    records = column_records(sample)
    change(records)
    settings = asked(write_parquet(tmp_path / "a.parquet", records))
    with pytest.raises(SourceError, match=told):
        import_store(settings)
    assert not Path(settings.out).exists()


def test_columns_of_bytes_are_ids_like_others(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """Of a vocabulary so small that a writer takes the smallest type."""
    records = column_records(sample)
    for one in records:
        one["top_ids"] = [[(entry[0] + place) % 256 for place in range(K)] for entry in one["top_ids"]]
    found = []
    for kind in (pyarrow.uint8(), pyarrow.int32()):
        of_entries = pyarrow.list_(pyarrow.list_(kind)), pyarrow.list_(pyarrow.list_(pyarrow.float64()))
        types = {"input_ids": pyarrow.list_(pyarrow.int64()), "top_ids": of_entries[0], "top_logprobs": of_entries[1]}
        path = write_parquet(tmp_path / f"{kind}.parquet", records, schema=pyarrow.schema(list(types.items())))
        settings = asked(path, out=str(tmp_path / f"{kind}.zarr"))
        import_store(settings)
        rows = CacheReader.open(settings.out).read_rows(0, 4, TargetRequest(logits=True))["plain"]
        assert isinstance(rows.logits, TopkLogits)
        found.append(rows.logits.ids_BMK)
    assert torch.equal(*found)


def test_columns_of_one_value_a_token_are_no_lists(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    records = column_records(sample)
    for one in records:
        one.update({name: [entry[0] for entry in one[name]] for name in ("top_ids", "top_logprobs")})
    settings = asked(write_parquet(tmp_path / "a.parquet", records))
    with pytest.raises(SourceError, match=r"row \d+, entry 0: one value where a list of ids, .* give K of each"):
        import_store(settings)


def test_prompts_that_list_the_token_itself_alone(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """As engines give them that are asked for no other."""
    records = vllm_records(sample)
    for one in records:
        one["prompt_logprobs"] = [
            None,
            *({str(token): {"logprob": -3.0, "rank": 40}} for token in one["prompt_token_ids"][1:]),
        ]
    settings = asked(write_jsonl(tmp_path / "a.jsonl", records))
    with pytest.raises(SourceError, match="no most probable id, only the token that follows, .* prompt_logprobs=20"):
        import_store(settings)
    assert not Path(settings.out).exists()
