"""Every wrong source has a message of its own, and leaves no store behind; an import may be killed at any moment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import DistillationError, SettingsError, SourceError, TeacherError
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import Sample, column_records, vllm_records, write_jsonl, write_parquet

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


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda path: path.unlink(), "names no file"),
    "empty": (lambda path: path.write_text("\n\n"), "are empty: there is nothing to import"),
    "no JSON": (
        lambda path: path.write_text("\n{'a': 1}\n"),
        "line 2: this is no JSON object .Expecting property name",
    ),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "line 10: this is no JSON object"),
    "a list": (lambda path: path.write_text("[1]\n"), "line 1: a list where a record should be"),
    "a key twice": (lambda path: path.write_text('{"a": 1, "a": 2}\n'), "line 1: .*an object holds 'a' twice"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}\n'), "line 1: this is no JSON object"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_files_cannot_be(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    change, told = FILES[name]
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    change(path)
    with pytest.raises(SourceError, match=told):
        import_store(asked(path))


def test_a_table_that_is_none_and_files_of_another_kind(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(SourceError, match=r"a\.parquet' cannot be read .ArrowInvalid"):
        import_store(asked(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(SourceError, match="does not end in .jsonl or .parquet.* unpack it"):
        import_store(asked(tmp_path / "a.jsonl.gz"))
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    with pytest.raises(SourceError, match="named twice"):
        import_store(asked(path, path))


SETTINGS: dict[str, tuple[dict[str, Any], type[DistillationError], str]] = {
    "long rows": ({"seq_len": 9}, SourceError, r"line \d+: \d+ tokens are more than --seq-len 9: .* --long-rows cut"),
    "more ids than listed": ({"k": 50}, SettingsError, "--k 50 is more than the 9? ?8? ids that any place"),
    "entries of prompts": ({"entries": "this"}, SettingsError, "--entries this would change nothing"),
    "a block of too many": ({"block_rows": 5000}, SettingsError, "--block-rows 5000 is more than the 10 rows"),
    "no tokenizer": ({"tokenizer": "nowhere"}, SettingsError, "--tokenizer 'nowhere' is no folder"),
    "no configuration": ({"teacher_config": "/"}, SettingsError, "--teacher-config '/' holds no config.json"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_cannot_be_asked_for(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    changes, kind, told = SETTINGS[name]
    settings = asked(write_jsonl(tmp_path / "a.jsonl", vllm_records(sample)), **changes)
    with pytest.raises(kind, match=told):
        import_store(settings)
    assert not Path(settings.out).exists()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"k": 0}, "--k 0 is too small"),
        ({"seq_len": 1}, "--seq-len 1 is too small"),
        ({"long_rows": "cut"}, "--long-rows cut would change nothing"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"precision": "int9"}, "--precision 'int9' is unknown"),
        ({"source": ()}, "no SOURCE is given"),
    ],
)
def test_settings_that_cannot_be(asked: Asked, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        asked(Path("a.jsonl"), **changes)


def config_of(sample: Sample, folder: Path, **changes: Any) -> str:
    folder.mkdir()
    fields = json.loads((sample.teacher / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    return str(folder)


def test_the_configuration_of_a_quantised_teacher_serves(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """Nobody loads its weights: what is said of them is left out, and the vocabulary may be padded."""
    quantised = {"quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoConfig": "code.Config"}}
    folder = config_of(sample, tmp_path / "config", vocab_size=1100, **quantised)
    settings = asked(write_jsonl(tmp_path / "a.jsonl", vllm_records(sample)), teacher_config=folder)
    import_store(settings)
    kept = json.loads((Path(settings.out) / "teacher" / "config.json").read_text())
    assert kept["vocab_size"] == 1100 and not quantised.keys() & kept.keys()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model_type": "bert"}, "predicts masked tokens.*`kdcache build`"),
        ({"model_type": "nothing-known"}, "cannot be read .ValueError"),
        ({"vocab_size": 1000}, re.escape("has ids up to 1023, its embeddings end at 999")),
    ],
)
def test_a_configuration_that_does_not_fit(
    sample: Sample, asked: Asked, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    with pytest.raises(TeacherError, match=told):
        import_store(asked(path, teacher_config=config_of(sample, tmp_path / "config", **changes)))
