"""DistillKit's packing, written here by hand and by a plain encoder, and read by the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from numpy.typing import NDArray

from teacher_cache.contract.batch import TopkLogits
from teacher_cache.errors import SettingsError, SourceError
from teacher_cache.importing.distillkit import Packing, unpack
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import (
    K,
    Sample,
    assert_same_distributions,
    by_row,
    read,
    write_jsonl,
    write_parquet,
)

Asked = Callable[..., ImportSettings]
EXACT = {"d": "1024", "k": str(K), "exact_k": str(K), "delta_encoding": "false", "residual_bins": []}
FITTED: dict[str, Any] = {
    "d": "1024", "k": "40", "exact_k": "4", "exact_dtype": "bfloat16", "polynomial_terms": ["0", "1", "2", "sqrt"],
    "term_dtype": "float32", "delta_encoding": "false", "error_diffusion": "false",
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": "5", "num_elements": "11"},
        {"scale_dtype": "float32", "element_bits": "1", "num_elements": "7"},
    ],
}  # fmt: skip
SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.uint64())),
        ("compressed_logprobs", pyarrow.list_(pyarrow.list_(pyarrow.uint8()))),
        ("bytepacked_indices", pyarrow.list_(pyarrow.list_(pyarrow.uint8()))),
    ]
)


def pack_bits(numbers: list[int], bits: int) -> bytes:
    """Numbers one after another, the highest bit first, as text of zeros and ones."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def float_bytes(values: Any, dtype: str) -> bytes:
    return (
        torch.as_tensor(np.asarray(values, dtype=np.float64))
        .to(getattr(torch, dtype))
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def encode(values: NDArray[np.float64], given: dict[str, Any]) -> bytes:
    """One entry, value by value."""
    exact, k = int(given["exact_k"]), int(given["k"])
    if given["delta_encoding"] == "true":
        values = np.diff(values, prepend=0)
    data = float_bytes(values[:exact], given.get("exact_dtype", "float32"))
    rest = values[exact:k]
    if terms := given.get("polynomial_terms"):
        x = np.linspace(0, 1, len(rest)) if given.get("normalize_t") == "true" else np.arange(len(rest), dtype=float)
        matrix = np.stack(
            [np.sqrt(x) if one == "sqrt" else np.exp(x) if one == "exp" else x ** int(one) for one in terms], 1
        )
        coefficients = np.linalg.lstsq(matrix, rest, rcond=None)[0].astype(np.float32)
        data += float_bytes(coefficients, given["term_dtype"])
        rest = rest - matrix @ coefficients
    for one in given["residual_bins"]:
        bits, count = int(one["element_bits"]), int(one["num_elements"])
        part, rest = rest[:count], rest[count:]
        scale = max(np.abs(part).max(), 1e-6) / (1 if bits == 1 else 2 ** (bits - 1))
        levels = np.rint(part / scale)
        numbers = (
            levels > 0 if bits == 1 else np.clip(levels, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
        )
        data += float_bytes([scale], one["scale_dtype"]) + pack_bits([int(n) for n in numbers], bits)
    return data


def packed_records(sample: Sample, given: dict[str, Any]) -> list[dict[str, Any]]:
    records = []
    for number, row in enumerate(sample.rows):
        values_TK, ids_TK = sample.top(number, int(given["k"]))
        values = values_TK[:-1].double().numpy()
        records.append(
            {
                "input_ids": list(row),
                "compressed_logprobs": [list(encode(one, given)) for one in values],
                "bytepacked_indices": [list(pack_bits(one, 10)) for one in ids_TK[:-1].tolist()],
            }
        )
    return records


def test_bits_lie_one_after_another_from_the_highest_on() -> None:
    """5 and 1023 in ten bits each: 0000000101 1111111111, and four zeros to the end of the byte."""
    packed = np.array([[0b00000001, 0b01111111, 0b11110000]], dtype=np.uint8)
    assert unpack(packed, 10, 2).tolist() == [[5, 1023]]
    assert unpack(np.array([[0xFF] * 8, [0] * 7 + [1]], dtype=np.uint8), 64, 1).tolist() == [[2**64 - 1], [1]]


def test_an_entry_written_by_hand() -> None:
    """One exact value, 2 + x - 3 sqrt(x) for the others, and a residual of two bits on the first of these."""
    packing = Packing.read(
        {
            "d": "5", "k": "4", "exact_k": "1", "exact_dtype": "float16", "polynomial_terms": ["0", "1", "sqrt"],
            "delta_encoding": "true",
            "residual_bins": [{"scale_dtype": "bfloat16", "element_bits": "2", "num_elements": "1"}],
        }
    )  # fmt: skip
    data = np.float16(-0.5).tobytes() + np.array([-2, -1, -3], dtype="<f4").tobytes()
    data += bytes([0x80, 0x3E]) + bytes([0b11000000])  # a scale of 0.25; the number 3, which is one step above 0
    assert packing.entry_bytes == (len(data), 2)
    fit = [-2 - x - 3 * x**0.5 for x in range(3)]
    want = np.cumsum([-0.5, fit[0] + 0.25, fit[1], fit[2]])
    assert np.allclose(packing.log_probs(np.frombuffer(data, dtype=np.uint8)[None]), want, atol=1e-12)
    assert packing.id_bits == 3
    assert packing.ids(np.array([[0b10001000, 0b10110000]], dtype=np.uint8)).tolist() == [[4, 2, 1, 3]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("delta", ["false", "true"])
def test_exact_values_are_what_a_build_keeps(
    sample: Sample, asked: Asked, tmp_path: Path, kind: str, delta: str
) -> None:
    records = packed_records(sample, given := {**EXACT, "delta_encoding": delta})
    for one in records[::2]:  # some files have an entry after the last token too
        for name in ("compressed_logprobs", "bytepacked_indices"):
            one[name].append(one[name][0])
    path = (
        write_parquet(tmp_path / "a.parquet", records, schema=SCHEMA)
        if kind == "parquet"
        else write_jsonl(tmp_path / "a.jsonl", records)
    )
    import_store(settings := asked(path, packing="given"), packing=given)
    assert_same_distributions(read(settings.out), read(sample.store))


@pytest.mark.parametrize(
    "changes", [{}, {"normalize_t": "true"}, {"polynomial_terms": ["0", "1", "exp"], "normalize_t": "true"}]
)
def test_fitted_values_are_near_what_they_stand_for(
    sample: Sample, asked: Asked, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """What the polynomial and the residuals leave is small, and ids are exact."""
    given = {**FITTED, **changes}
    path = write_parquet(tmp_path / "a.parquet", packed_records(sample, given), schema=SCHEMA)
    training = {"project_name": "x", "teacher": {"kind": "dataset", "logprob_compressor": given}}
    import_store(settings := asked(path, packing="given", precision="float16"), packing=training)
    batch = read(settings.out)
    assert isinstance(batch.logits, TopkLogits) and batch.logits.ids_BMK.shape[2] == 40
    places = by_row(batch)
    errors = []
    for number, row in enumerate(sample.rows):
        at, (want_TK, ids_TK) = places[tuple(row)], sample.top(number, 40)
        ids, log_probs = batch.logits.ids_BMK[at, : len(row) - 1], batch.logits.log_probs_BMK[at, : len(row) - 1]
        assert torch.equal(ids.sort().values, ids_TK[:-1].sort().values)
        own = torch.zeros(len(row) - 1, 1024).scatter_(1, ids, log_probs).gather(1, ids_TK[:-1])
        errors.append((own - want_TK[:-1]).abs())
    assert float(torch.cat(errors).median()) < 0.06 and float(torch.cat(errors).mean()) < 0.15


Given = dict[str, Any]
WRONG: dict[str, tuple[Callable[[list[Any], Given], Any], type[Exception], str]] = {
    "nothing said": (lambda records, given: given.clear(), SettingsError, "--packing has no d, k, exact_k"),
    "another number of ids": (
        lambda records, given: given.update(k="9", exact_k="9"),
        SourceError,
        r"'compressed_logprobs' has the shape \(\d+, 32\) where .* entries of 36 bytes should be, as the 9 ids",
    ),
    "another vocabulary": (
        lambda records, given: given.update(d="70000"),
        SourceError,
        r"'bytepacked_indices' has the shape \(\d+, 10\) where .* entries of 17 bytes",
    ),
    "another type": (lambda records, given: given.update(exact_dtype="int8"), SettingsError, "exact_dtype 'int8'"),
    "no number": (lambda records, given: given.update(k="many"), SettingsError, "--packing has k 'many'"),
    "more exact values": (lambda records, given: given.update(exact_k="9"), SettingsError, "exact_k 9, k 8, d 1024"),
    "no switch": (
        lambda records, given: given.update(delta_encoding="2"),
        SettingsError,
        "delta_encoding '2': it is a",
    ),
    "no term": (lambda records, given: given.update(polynomial_terms=["log"]), SettingsError, "term 'log'"),
    "an empty bin": (
        lambda records, given: given.update(residual_bins=[{"element_bits": "0", "num_elements": "0"}]),
        SettingsError,
        "among residual_bins: it holds nothing",
    ),
    "cut": (lambda records, given: records[0]["compressed_logprobs"][0].pop(), SourceError, "a table of other things"),
    "fewer entries": (
        lambda records, given: [records[0][name].pop() for name in ("compressed_logprobs", "bytepacked_indices")],
        SourceError,
        "entries of 32 bytes should be",
    ),
    "legacy": (
        lambda records, given: records.__setitem__(
            slice(None), [{"input_ids": [1, 2], "packed_indices": [], "exact_values": [], "coeffs": []}]
        ),
        SourceError,
        "packed in DistillKit's legacy way",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_packed_otherwise(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    change, kind, told = WRONG[name]
    records, given = packed_records(sample, EXACT), {**EXACT}
    change(records, given)
    settings = asked(write_jsonl(tmp_path / "a.jsonl", records), packing="given")
    with pytest.raises(kind, match=told):
        import_store(settings, packing=given)
    assert not Path(settings.out).exists()


def test_a_packing_that_is_not_given_or_not_needed(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", packed_records(sample, EXACT))
    with pytest.raises(SettingsError, match="how is not in them: give --packing FILE"):
        import_store(asked(path))
    write_jsonl(path, [{"input_ids": [1, 2], "top_ids": [[1]], "top_logprobs": [[-1.0]]}])
    with pytest.raises(SettingsError, match="--packing would change nothing: columns is not packed"):
        import_store(asked(path, packing="given"), packing=EXACT)


def test_a_fit_that_rises_above_what_is_before_it_is_cut_there() -> None:
    """Ten probable digits, then words: a square root begins at a probability of 20, where the digits have a tenth."""
    values = np.array([-2.35] * 10 + [-13.0 - 0.05 * number for number in range(40)])
    given = {**FITTED, "k": "50", "exact_k": "1", "polynomial_terms": ["0", "1", "sqrt"], "residual_bins": []}
    packing = Packing.read(given)
    bytes_PB = np.frombuffer(encode(values, given), dtype=np.uint8)[None]
    fitted = np.frombuffer(bytes_PB[0, 2:].tobytes(), dtype="<f4")[0]
    assert fitted > 1, "or this test shows nothing"
    found = packing.log_probs(bytes_PB)[0]
    assert (np.diff(found) <= 0).all() and found.max() <= -2.34
    assert 0.3 < np.exp(found).sum() < 1.1
