"""What a terabyte of each shape that `kdcache import` reads becomes: bytes a token before and after.

A causal teacher reads a few rows once. What an engine would have written of them goes into files of every shape: as
many entries as such files usually have, in the types that they usually have. Each is imported, and its bytes a token
are those of all files, and of the arrays of the store. A store's teacher, metadata and commits are there once and do
not count.

    python benchmarks/importing.py --teacher DIR --corpus FILE

Rows are document rows of about --seq-len tokens. So few rows are a poor sample for the rotation of hidden states, which
costs more bits than that of many. On two CPU cores SmolLM2-135M takes two minutes with the defaults.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from record import print_record
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_cache.corpus.corpus import pack_corpus
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.read.info import describe_store

RECOMMENDED: dict[str, Any] = {
    "k": "128", "exact_k": "16", "exact_dtype": "bfloat16", "polynomial_terms": ["0", "1", "2", "3", "4", "sqrt"],
    "term_dtype": "float32", "residual_bins": [], "delta_encoding": "false",
}  # fmt: skip
"""What DistillKit's README recommends for new captures; `BUDGET` is what it names for little space."""
BUDGET: dict[str, Any] = {**RECOMMENDED, "k": "50", "exact_k": "1", "polynomial_terms": ["0", "1", "sqrt"]}
PACKED = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))


@dataclass(frozen=True)
class Row:
    """A row's token ids, the log-probabilities after each token [T, V], and its hidden states [L, T, D]."""

    ids: list[int]
    log_probs_TV: torch.Tensor
    hidden_LTD: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Bytes a token in the files and in the store."""

    shape: str
    kept: str
    source: float
    store: float


def main() -> None:
    options = parse_options()
    rows = read_rows(options)
    layers = [int(text) for text in options.layers.split(",")]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="importing-") as scratch:
        for shape, kept, write, flags, packing in cases(layers):
            folder = Path(scratch) / f"{shape}-{kept}".replace(" ", "-")
            folder.mkdir()
            write(folder, rows)
            outcomes.append(measure(shape, kept, folder, options.teacher, rows, flags, packing))
    report(options, rows, outcomes)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", default="8,15,28", help="hidden states in the folders")
    return parser.parse_args()


@torch.inference_mode()
def read_rows(options: argparse.Namespace) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    packed = pack_corpus(
        (options.corpus,), tokenizer, seq_len=options.seq_len, row_mode="document", seed=0, max_rows=options.rows,
        causal=True,
    )  # fmt: skip
    block = packed.read(0, options.rows)
    model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()
    layers, rows = [int(text) for text in options.layers.split(",")], []
    for ids_T, length in zip(block.input_ids_BT, block.length_B.tolist(), strict=True):
        ids = ids_T[:length].tolist()
        found = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        hidden_LTD = torch.stack([found.hidden_states[layer][0] for layer in layers])
        rows.append(Row(ids, found.logits[0].log_softmax(-1), hidden_LTD))
    return rows


def cases(layers: Sequence[int]) -> list[tuple[Any, ...]]:
    """Shape, what it holds, what writes it, flags of the import, packing."""
    named = {"layers": ",".join(map(str, layers))}
    return [
        ("vllm", "20 ids", lambda folder, rows: write_prompts(folder, rows, 20), {}, None),
        ("openai", "20 ids", lambda folder, rows: write_completions(folder, rows, 20), {}, None),
        ("columns", "64 ids", lambda folder, rows: write_columns(folder, rows, 64), {}, None),
        ("distillkit", "128 ids", lambda folder, rows: write_packed(folder, rows, RECOMMENDED), {}, RECOMMENDED),
        ("distillkit", "50 ids", lambda folder, rows: write_packed(folder, rows, BUDGET), {}, BUDGET),
        ("hidden", f"{len(layers)} layers", write_states, named, None),
        ("hidden", f"{len(layers)} layers, nmse:1e-1", write_states, {**named, "precision": "nmse:1e-1"}, None),
    ]


# ---- what an engine would have written ------------------------------------------------------------------------------


def write_prompts(folder: Path, rows: Sequence[Row], k: int) -> None:
    def entries(row: Row) -> list[Any]:
        values_Tk, ids_Tk = row.log_probs_TV.topk(k, dim=1)
        found: list[Any] = [None]
        for token, (values, ids) in enumerate(zip(values_Tk[:-1].tolist(), ids_Tk[:-1].tolist(), strict=True), 1):
            listed = dict(zip(ids, zip(values, range(1, k + 1), strict=True), strict=True))
            own = float(row.log_probs_TV[token - 1, row.ids[token]])
            listed.setdefault(row.ids[token], (own, int((row.log_probs_TV[token - 1] >= own).sum())))
            found.append({str(n): {"logprob": v, "rank": r, "decoded_token": " word"} for n, (v, r) in listed.items()})
        return found

    write_lines(folder, [{"prompt_token_ids": row.ids, "prompt_logprobs": entries(row)} for row in rows])


def write_completions(folder: Path, rows: Sequence[Row], k: int) -> None:
    records = []
    for row in rows:
        values_Tk, ids_Tk = row.log_probs_TV.topk(k, dim=1)
        own = [float(row.log_probs_TV[place, number]) for place, number in enumerate(row.ids[1:])]
        tops = [
            {f"token_id:{number}": value for number, value in zip(ids, values, strict=True)}
            for values, ids in zip(values_Tk[:-1].tolist(), ids_Tk[:-1].tolist(), strict=True)
        ]
        tokens = [f"token_id:{number}" for number in row.ids]
        logprobs = {"tokens": tokens, "token_logprobs": [None, *own], "top_logprobs": [None, *tops]}
        records.append({"choices": [{"index": 0, "logprobs": logprobs}]})
    write_lines(folder, records)


def write_lines(folder: Path, records: Sequence[Any]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_columns(folder: Path, rows: Sequence[Row], k: int) -> None:
    tops = [row.log_probs_TV[:-1].topk(k, dim=1) for row in rows]
    table = pyarrow.table(
        {
            "input_ids": pyarrow.array([row.ids for row in rows], pyarrow.list_(pyarrow.int32())),
            "top_ids": pyarrow.array([ids.tolist() for _, ids in tops], pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
            "top_logprobs": pyarrow.array(
                [values.tolist() for values, _ in tops], pyarrow.list_(pyarrow.list_(pyarrow.float32()))
            ),
        }
    )
    pyarrow.parquet.write_table(table, folder / "rows.parquet")


def write_packed(folder: Path, rows: Sequence[Row], given: dict[str, Any]) -> None:
    """Exact values, then coefficients of a least-squares fit to the others; ids bit by bit."""
    k, exact = int(given["k"]), int(given["exact_k"])
    x = np.arange(k - exact, dtype=np.float64)
    matrix = np.stack([np.sqrt(x) if term == "sqrt" else x ** int(term) for term in given["polynomial_terms"]], 1)
    columns: dict[str, list[Any]] = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    for row in rows:
        values_Tk, ids_Tk = row.log_probs_TV[:-1].topk(k, dim=1)
        head = values_Tk[:, :exact].bfloat16().contiguous().view(torch.uint8).numpy()
        fitted = np.linalg.lstsq(matrix, values_Tk[:, exact:].double().numpy().T, rcond=None)[0].T.astype(
            "<f4", order="C"
        )
        bits = (row.log_probs_TV.shape[1] - 1).bit_length()
        flat = (ids_Tk.numpy()[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
        columns["input_ids"].append(row.ids)
        columns["compressed_logprobs"].append(np.concatenate([head, fitted.view(np.uint8)], 1).tolist())
        columns["bytepacked_indices"].append(np.packbits(flat.reshape(len(flat), -1), axis=1).tolist())
    kinds = {"input_ids": pyarrow.list_(pyarrow.uint64()), "compressed_logprobs": PACKED, "bytepacked_indices": PACKED}
    table = pyarrow.table({name: pyarrow.array(values, kinds[name]) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")


def write_states(folder: Path, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        states_TLD = row.hidden_LTD.transpose(0, 1).bfloat16().contiguous()
        tensors = {"token_ids": torch.tensor(row.ids), "hidden_states": states_TLD}
        save_file(tensors, folder / f"hs_{number}.safetensors")


# ---- and what becomes of it -----------------------------------------------------------------------------------------


def measure(
    shape: str,
    kept: str,
    folder: Path,
    teacher: str,
    rows: Sequence[Row],
    flags: dict[str, str],
    packing: dict[str, Any] | None,
) -> Outcome:
    tokens = sum(len(row.ids) for row in rows)
    source = sum(path.stat().st_size for path in folder.iterdir())
    given = None if packing is None else {**packing, "d": str(rows[0].log_probs_TV.shape[1])}
    out = folder.parent / f"{folder.name}.zarr"
    settings = ImportSettings(
        source=(str(folder),), tokenizer=teacher, out=str(out), packing=None if given is None else "given", **flags
    )
    import_store(settings, packing=given)
    arrays = sum(describe_store(out).bytes_per_array.values())
    return Outcome(shape=shape, kept=kept, source=source / tokens, store=arrays / tokens)


def report(options: argparse.Namespace, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    table = Table("shape", "holds", "bytes a token", "in the store", "1 TB becomes")
    for one in outcomes:
        share = f"{1000 * one.store / one.source:.0f} GB"
        table.add_row(one.shape, one.kept, f"{one.source:.0f}", f"{one.store:.1f}", share)
    Console(stderr=True, width=110).print(table)
    print_record(
        "importing",
        teacher=Path(options.teacher).name,
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        layers=options.layers,
        shapes=[asdict(one) for one in outcomes],
    )


if __name__ == "__main__":
    main()
