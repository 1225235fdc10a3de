"""What an engine would write of a tiny decoder's rows, in every shape, and the store that a build makes of the same."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetBatch, TargetRequest, TopkLogits
from teacher_cache.read.reader import CacheReader

K = 8
LOGITS = TargetRequest(logits=True, next_tokens=True)


@dataclass(frozen=True)
class Sample:
    """A teacher, the store that was built of it, its rows without padding, and their exact log-softmax [T, V]."""

    teacher: Path
    store: Path
    rows: list[list[int]]
    log_probs: list[torch.Tensor]
    hidden: list[torch.Tensor]

    def top(self, row: int, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and ids [T, k] of what follows each token."""
        return self.log_probs[row].topk(k, dim=1)  # type: ignore[return-value]


def make_sample(teacher: Path, text: Path, folder: Path, **changes: Any) -> Sample:
    """Build a store of `text`, a document a row, and run the teacher on its rows once more."""
    settings: dict[str, Any] = {
        "teacher": str(teacher), "corpus": (str(text),), "out": str(folder / "built.zarr"), "seq_len": 24, "k": K,
        "rows": "document", "targets": "logits,hidden", "layers": "2,4", "logits": "topk", "precision": "float16",
        "block_rows": 8, "device": "cpu",
    }  # fmt: skip
    build_cache(BuildSettings(**{**settings, **changes}))
    batch = read(folder / "built.zarr")
    rows = [ids[:length].tolist() for ids, length in zip(batch.input_ids_BT, batch.length_B.tolist(), strict=True)]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.inference_mode():
        outputs = [model(torch.tensor([row]), output_hidden_states=True) for row in rows]
    return Sample(
        teacher, folder / "built.zarr", rows, [one.logits[0].log_softmax(-1) for one in outputs],
        [torch.stack(one.hidden_states)[:, 0] for one in outputs],
    )  # fmt: skip


def read(store: str | Path, request: TargetRequest = LOGITS) -> TargetBatch:
    reader = CacheReader.open(store)
    return reader.read_rows(0, reader.rows, request)["plain"]


def vllm_records(sample: Sample, k: int = K) -> list[dict[str, Any]]:
    """What vLLM gives: k entries of each token, the token itself as one more where it is not among them."""
    records = []
    for number, row in enumerate(sample.rows):
        values_TK, ids_TK = sample.top(number, k)
        entries: list[Any] = [None]
        for token in range(1, len(row)):
            place = token - 1
            listed = {
                str(int(id_)): {"logprob": float(value), "rank": rank, "decoded_token": "?"}
                for rank, (id_, value) in enumerate(zip(ids_TK[place], values_TK[place], strict=True), 1)
            }
            own = sample.log_probs[number][place, row[token]]
            if str(row[token]) not in listed:
                rank = int((sample.log_probs[number][place] >= own).sum())
                listed[str(row[token])] = {"logprob": float(own), "rank": rank, "decoded_token": "?"}
            entries.append(listed)
        records.append({"prompt_token_ids": list(row), "prompt_logprobs": entries})
    return records


def column_records(sample: Sample, k: int = K) -> list[dict[str, Any]]:
    """Plain columns with an entry for all tokens but the last."""
    tops = [sample.top(number, k) for number in range(len(sample.rows))]
    return [
        {"input_ids": list(row), "top_ids": ids_TK[:-1].tolist(), "top_logprobs": values_TK[:-1].tolist()}
        for row, (values_TK, ids_TK) in zip(sample.rows, tops, strict=True)
    ]


def completion_records(sample: Sample, *, as_ids: bool, k: int = K) -> list[dict[str, Any]]:
    """What an OpenAI-like server answers with echo: tokens as text, or as ids written out."""
    tokenizer = AutoTokenizer.from_pretrained(sample.teacher)

    def text(number: int) -> str:
        return f"token_id:{number}" if as_ids else tokenizer.decode([number])

    records = []
    for number, row in enumerate(sample.rows):
        values_TK, ids_TK = sample.top(number, k)
        own: list[Any] = [None, *(float(sample.log_probs[number][t, row[t + 1]]) for t in range(len(row) - 1))]
        tops: list[Any] = [None]
        for values_K, ids_K in zip(values_TK[:-1].tolist(), ids_TK[:-1].tolist(), strict=True):
            tops.append({text(number): value for number, value in zip(ids_K, values_K, strict=True)})
        logprobs = {"tokens": list(map(text, row)), "token_logprobs": own, "top_logprobs": tops, "text_offset": []}
        records.append({"id": "cmpl-1", "choices": [{"index": 0, "text": "?", "logprobs": logprobs}]})
    return records


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, records: Sequence[dict[str, Any]], *, group: int = 6, schema: Any = None) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records), schema=schema), path, row_group_size=group)
    return path


def shuffled(records: Sequence[Any], seed: int = 1) -> list[Any]:
    found = list(records)
    random.Random(seed).shuffle(found)
    return found


def by_row(batch: TargetBatch) -> dict[tuple[int, ...], int]:
    """The place of each row in a batch, by its tokens."""
    rows = zip(batch.input_ids_BT, batch.length_B.tolist(), strict=True)
    return {tuple(ids[:length].tolist()): place for place, (ids, length) in enumerate(rows)}


def assert_same_distributions(have: TargetBatch, want: TargetBatch, entries: int = K) -> None:
    """Every row of `want` has the same places in `have`, with the same ids and nearly the same probabilities."""
    assert isinstance(have.logits, TopkLogits) and isinstance(want.logits, TopkLogits)
    assert have.places is not None and want.places is not None
    mine, theirs = by_row(have), by_row(want)
    assert mine.keys() == theirs.keys()
    for row, place in theirs.items():
        other, count = mine[row], int(want.places.count_B[place])
        assert int(have.places.count_B[other]) == count == len(row) - 1
        for name in ("positions_BM", "label_ids_BM"):
            assert torch.equal(getattr(have.places, name)[other, :count], getattr(want.places, name)[place, :count])
        log_probs = [one.logits.log_probs_BMK[at, :count, :entries] for one, at in ((have, other), (want, place))]
        ids = [one.logits.ids_BMK[at, :count, :entries] for one, at in ((have, other), (want, place))]
        tails = [one.logits.log_tail_BM[at, :count] for one, at in ((have, other), (want, place))]
        assert torch.allclose(log_probs[0], log_probs[1], atol=2e-3, rtol=2**-10)
        # equal probabilities may be listed in either order
        assert torch.equal(ids[0].sort().values, ids[1].sort().values)
        assert torch.allclose(tails[0].exp(), tails[1].exp(), atol=1e-3)
