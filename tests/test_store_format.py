"""The store as `teacher_cache/format/README.md` specifies it: plain zarr and numpy give the reader's numbers.

Nothing of ours but the reader that it is compared with: what stands here is what that page says, formula by formula,
for every kind of target. Two masked views, documents with padding, and a last block that is short. The page's own
examples are run on stores of one plain view.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import (
    AttentionRelations,
    AttentionVectors,
    SampledLogits,
    TargetBatch,
    TargetRequest,
    TopkLogits,
)
from teacher_cache.read.reader import CacheReader

ROWS, R, T, W, K, D = 19, 8, 24, 2, 6, 32
M = round(0.15 * T)
VIEW = 1
STORES: dict[str, dict[str, Any]] = {
    "nmse": {"layers": "4"},
    "sample": {"precision": "int8", "logits": "sample", "relations": "qkv"},
    "int4": {"precision": "int4", "relations": "matrix", "relation_heads": 4},
    "float16": {"precision": "float16", "targets": "logits"},
}
PAGE = Path(__file__).resolve().parents[1] / "teacher_cache" / "format" / "README.md"
EXAMPLES = re.findall(r"^```(python|sh)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)

Array = NDArray[Any]


@pytest.fixture(scope="module")
def stores(tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    for name, changes in STORES.items():
        settings = {"layers": "2", "precision": "nmse:1e-2", **changes}
        build_cache(
            BuildSettings(
                teacher=str(tiny_teacher()), corpus=(str(tiny_corpus),), out=str(folder / name), seq_len=T, k=K,
                max_rows=ROWS, block_rows=R, views=W, rows="document", hs_view="masked", attention_layer=3, **settings,
            )
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def example_stores(
    tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Stores as the examples find them: hidden state 4 in one plain view, by precision."""
    folder = tmp_path_factory.mktemp("examples")
    for precision in ("float16", "nmse:1e-2"):
        build_cache(
            BuildSettings(
                teacher=str(tiny_teacher()), corpus=(str(tiny_corpus),), out=str(folder / precision / "cache.zarr"),
                seq_len=T, max_rows=ROWS, block_rows=R, targets="hidden", layers="4", precision=precision,
            )
        )  # fmt: skip
    return folder


def hidden_4(folder: Path, rows: slice) -> Array:
    """Hidden state 4 as the reader gives it."""
    reader = CacheReader.open(folder / "cache.zarr")
    batch = reader.read_rows(rows.start, rows.stop, TargetRequest(hidden_layers=(4,)))["plain"]
    return np.asarray(batch.hidden[4].numpy())


def test_the_example_of_plain_zarr(example_stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example_stores / "float16")
    names: dict[str, Any] = {}
    exec(EXAMPLES[0][1], names)
    assert (names["vectors"] == hidden_4(Path(), slice(17, 18))[0]).all()


def test_the_example_of_nmse(example_stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example_stores / "nmse:1e-2")
    names: dict[str, Any] = {}
    exec(EXAMPLES[1][1], names)
    of_reader = hidden_4(Path(), slice(2 * R, ROWS))
    assert np.abs(names["vectors"][: ROWS - 2 * R] - of_reader).max() < 1e-5 * np.abs(of_reader).max()


def test_the_example_of_commit_hashes(example_stores: Path) -> None:
    store = example_stores / "float16" / "cache.zarr"
    language, command = EXAMPLES[2]
    assert language == "sh" and len(EXAMPLES) == 3, "every example of the page is run here"
    subprocess.run(command, shell=True, cwd=store, check=True)
    (store / "commits" / "00000001.json").write_text("{}")
    assert subprocess.run(command, shell=True, cwd=store, check=False, capture_output=True).returncode != 0


def ours(store: Path) -> TargetBatch:
    reader = CacheReader.open(store)
    targets = reader.manifest.targets
    request = TargetRequest(
        hidden_layers=targets.hidden_layers(), attention_layers=targets.attention_layers(), logits=True
    )
    return reader.read_rows(0, ROWS, request, masked_view=VIEW)["masked"]


def read(store: Path, path: str) -> Array:
    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def of_rows(values: Array) -> Array:
    """[blocks, R, ...] -> the rows of the store."""
    return values.reshape(-1, *values.shape[2:])[:ROWS]


def of_view(values: Array, per_row: int) -> Array:
    """[blocks, D, W R per_row] -> [rows, per_row, D] of one masked view."""
    blocks, components, _ = values.shape
    return of_rows(values.reshape(blocks, components, W, R, per_row)[:, :, VIEW].transpose(0, 2, 3, 1))


def masked(store: Path, name: str) -> Array:
    values = read(store, f"masked/{name}")
    return of_rows(values.reshape(len(values), W, R, *values.shape[2:])[:, VIEW])


def coordinates(store: Path, path: str) -> Array:
    """step * codes of a stream in the `nmse` codec, [rows, T, D]."""
    held = json.loads((store / "zarr.json").read_text())["attributes"]["calibration"][path]["components"]
    n, parts = R * T, []
    for name, limit, per_byte in (("wide", 0, 1), ("byte", 0, 1), ("pair", 7, 2), ("triple", 2, 3), ("five", 1, 5)):
        if held[name]:
            packed = read(store, f"{path}/codes/{name}").astype(int)
            packed = np.split(packed, W, axis=2)[VIEW]
            assert packed.shape[1:] == (held[name], -(-n // per_byte))
            base = 2 * limit + 1
            digits = [packed // base ** (per_byte - 1 - place) % base - limit for place in range(per_byte)]
            digits = [packed] if per_byte == 1 else digits
            parts.append(np.stack(digits, axis=-1).reshape(*packed.shape[:2], -1)[:, :, :n])
    parts.append(np.zeros((len(parts[0]), held["zero"], n), int))
    codes = np.concatenate(parts, axis=1)
    count, index, value = (read(store, f"{path}/escapes/{name}") for name in ("count", "index", "value"))
    for block, room in enumerate(count[:, VIEW]):
        where = index[block, VIEW, :room]
        codes[block, where // n, where % n] = value[block, VIEW, :room]
    assert codes.shape[1] == D
    return of_rows(read(store, f"{path}/step") * codes.reshape(-1, D, R, T).transpose(0, 2, 3, 1))


def int8(store: Path, path: str) -> Array:
    return of_view(read(store, f"{path}/codes") * read(store, f"{path}/scale")[:, None], T)


def int4(store: Path, path: str) -> Array:
    pairs = read(store, f"{path}/codes").astype(int)
    codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(pairs), D, -1) - 8
    return of_view(codes * np.repeat(read(store, f"{path}/scale").astype(np.float32), 32, axis=1), T)


def ids_of(planes: list[Array]) -> Array:
    return np.sum([plane.astype(int) << 8 * place for place, plane in enumerate(planes)], axis=0)


def assert_close(plain: Array, tensor: Any, mask: Any = True, tolerance: float = 1e-5) -> None:
    values = tensor.numpy()
    assert plain.shape == values.shape
    wrong = np.abs(np.where(mask, plain - values, 0)) > tolerance * np.abs(values).max()
    assert not wrong.any()


# ---- a causal teacher -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["all", "every:3", "share:0.4"])
def causal_store(
    request: pytest.FixtureRequest, causal_teacher: Path, causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("causal") / "cache.zarr"
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=str(out), seq_len=21, max_rows=ROWS,
            block_rows=R, k=K, positions=request.param,
        )
    )  # fmt: skip
    return out


def test_places_and_draws_of_a_causal_teacher(causal_store: Path) -> None:
    attributes = json.loads((causal_store / "zarr.json").read_text())["attributes"]
    assert attributes["teacher"]["kind"] == "causal-lm" and attributes["segments"] == "isolated"
    kind, _, number = attributes["positions"].partition(":")
    room = {
        "all": lambda: 20,
        "every": lambda: -(-20 // int(number)),
        "share": lambda: max(1, round(20 * float(number))),
    }
    places = room[kind]()
    want = CacheReader.open(causal_store).read_rows(0, ROWS, TargetRequest(logits=True))["plain"]
    assert want.places is not None and isinstance(want.logits, SampledLogits) and want.starts_BT is not None

    def bits(path: str) -> Array:
        values = of_rows(read(causal_store, path))
        assert values.shape == (ROWS, 3) and values.dtype == np.uint8
        return np.unpackbits(values, axis=1, bitorder="little")[:, :21].astype(bool)

    starts, kept, ids = bits("segments/starts"), bits("next/kept"), of_rows(read(causal_store, "input_ids"))
    assert (starts == want.starts_BT.numpy()).all() and starts[:, 0].all()
    assert not (kept[:, :-1] & starts[:, 1:]).any(), "nothing is kept at the last token of a segment"
    assert want.places.positions_BM.shape == (ROWS, places)
    distinct = read(causal_store, "logits/draws/distinct")
    assert distinct.shape == (-(-ROWS // R), R * places)
    gaps, counts = (read(causal_store, f"logits/draws/{name}") for name in ("ids/low", "counts"))
    for row in range(ROWS):
        positions = kept[row].nonzero()[0]
        count = int(want.places.count_B[row])
        assert want.places.positions_BM[row, :count].tolist() == positions.tolist()
        assert want.places.label_ids_BM[row, :count].tolist() == ids[row, positions + 1].tolist()
        block, inside = divmod(row, R)
        for place in range(places):
            at = inside * places + place
            held = int(distinct[block, at])
            assert (held > 0) == (place < count)
            part = slice(int(distinct[block, :at].sum(dtype=int)), int(distinct[block, : at + 1].sum(dtype=int)))
            drawn = dict(
                zip(gaps[block, 0, part].astype(int).cumsum().tolist(), counts[block, 0, part].tolist(), strict=True)
            )
            assert sum(drawn.values()) == (K if held else 0)
            pairs = zip(
                want.logits.ids_BMK[row, place].tolist(), want.logits.counts_BMK[row, place].tolist(), strict=True
            )
            assert drawn == {token: times for token, times in pairs if times}


@pytest.mark.parametrize("segments", ["isolated", "joined"])
def test_attention_that_is_replayed(segments: Any, causal_teacher: Path, causal_corpus: Path, tmp_path: Path) -> None:
    store, positions, layer = tmp_path / "cache.zarr", 21, "attention/3"
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=str(store), seq_len=positions, max_rows=ROWS,
            block_rows=R, targets="attention", attention_layer=3, precision="int8", segments=segments,
        )
    )  # fmt: skip
    want = CacheReader.open(store).read_rows(0, ROWS, TargetRequest(attention_layers=(3,)))["plain"]
    (spec,) = json.loads((store / "zarr.json").read_text())["attributes"]["targets"]["attention"]
    assert (spec["form"], spec["replay"], spec["widths"]) == ("replayed", {"head_width": 8, "rotated": 8}, [32, 16, 16])
    kept = read(store, f"{layer}/replayed/codes") * read(store, f"{layer}/replayed/scale")[:, None]
    kept = of_rows(kept.reshape(len(kept), D, R, positions).transpose(0, 2, 3, 1))
    place = np.tile(np.arange(positions), (ROWS, 1))
    if segments == "isolated":
        starts = np.unpackbits(of_rows(read(store, "segments/starts")), axis=1, bitorder="little")[:, :positions]
        place = place - np.maximum.accumulate(place * starts, axis=1)
        assert (place[:, -1] < positions - 1).any()
    cosine, sine = (read(store, f"{layer}/rotary/{part}")[place][:, :, None] for part in ("cosine", "sine"))
    vectors = want.attention[3]
    assert isinstance(vectors, AttentionVectors)
    for name in ("query", "key", "value"):
        weight, bias = (read(store, f"{layer}/projection/{name}/{part}") for part in ("weight", "bias"))
        made = kept @ weight.T + bias
        if name != "value":
            heads = made.reshape(ROWS, positions, -1, 8)
            other = np.concatenate([-heads[..., 4:], heads[..., :4]], axis=3)
            made = (heads * cosine + other * sine).reshape(made.shape)
        assert_close(made, getattr(vectors, f"{name}_BTD"), want.real_BT().numpy()[:, :, None])


def test_stores_of_masked_lms_say_nothing_of_it(stores: Path) -> None:
    attributes = json.loads((stores / "nmse" / "zarr.json").read_text())["attributes"]
    assert not {"segments", "positions"} & attributes.keys() and "kind" not in attributes["teacher"]
    assert not (stores / "nmse" / "next").exists() and not (stores / "nmse" / "segments").exists()


def test_inputs(stores: Path) -> None:
    store, want = stores / "float16", ours(stores / "float16")
    assert want.places is not None
    input_ids, count = of_rows(read(store, "input_ids")), masked(store, "count")
    for row, places in enumerate(count):
        positions = masked(store, "positions")[row, :places]
        assert (input_ids[row, positions] == masked(store, "original_ids")[row, :places]).all()
        input_ids[row, positions] = masked(store, "replacement_ids")[row, :places]
    assert (input_ids == want.input_ids_BT.numpy()).all()
    assert (of_rows(read(store, "length")) == want.length_B.numpy()).all()
    assert (of_rows(read(store, "row_id")) == want.row_id_B.numpy()).all()
    assert (masked(store, "positions") == want.places.positions_BM.numpy()).all()
    assert of_rows(read(store, "length")).min() < T, "some rows have padding"


def test_nmse(stores: Path) -> None:
    store, want = stores / "nmse", ours(stores / "nmse")
    real = want.real_BT().numpy()[:, :, None]
    hidden = read(store, "hidden/4/mean") + coordinates(store, "hidden/4") @ read(store, "hidden/4/basis").T
    assert_close(hidden, want.hidden[4], real)
    vectors = want.attention[3]
    assert isinstance(vectors, AttentionVectors)
    path = "attention/3/projected"
    stacked = read(store, f"{path}/mean") + coordinates(store, path) @ read(store, f"{path}/basis").T
    for part, tensor in zip(
        np.split(stacked, 3, axis=2), (vectors.query_BTD, vectors.key_BTD, vectors.value_BTD), strict=True
    ):
        assert_close(part, tensor, real)


def test_fixed_precisions(stores: Path) -> None:
    want = ours(stores / "sample")
    assert_close(int8(stores / "sample", "hidden/2"), want.hidden[2])
    vectors = want.attention[3]
    assert isinstance(vectors, AttentionVectors)
    assert_close(int8(stores / "sample", "attention/3/key"), vectors.key_BTD)
    assert_close(int4(stores / "int4", "hidden/2"), ours(stores / "int4").hidden[2])


def test_relations(stores: Path) -> None:
    relations = ours(stores / "int4").attention[3]
    assert isinstance(relations, AttentionRelations)
    values = read(stores / "int4", "attention/3/relations/value")
    assert_close(of_rows(values.reshape(-1, W, R, 4, T, T)[:, VIEW]), relations.value_BATT, tolerance=0)


@pytest.mark.parametrize("name", ["nmse", "float16"])
def test_most_probable_ids(stores: Path, name: str) -> None:
    store, want = stores / name, ours(stores / name).logits
    assert isinstance(want, TopkLogits)
    ids = ids_of([read(store, "logits/ids/low")])  # 200 ids need one byte
    assert (of_view(ids, M) == want.ids_BMK.numpy()).all()
    codes = read(store, "logits/log_probs")
    if name == "nmse":
        probabilities = (1 - codes.cumsum(axis=1, dtype=np.uint8) / 255.0) ** 8
    else:
        probabilities = np.exp(codes.astype(float))
    assert_close(of_view(probabilities, M), want.log_probs_BMK.exp())
    tail = of_view(read(store, "logits/log_tail")[:, None], M)[..., 0]
    assert (tail == want.log_tail_BM.numpy()).all()
    real = np.arange(M) < masked(store, "count")[:, None]
    mass = of_view(probabilities, M).sum(2) + np.exp(tail.astype(float))
    assert np.abs(mass - 1)[real].max() < 0.03


def test_draws(stores: Path) -> None:
    store, want = stores / "sample", ours(stores / "sample").logits
    assert isinstance(want, SampledLogits)
    distinct = read(store, "logits/draws/distinct")
    ids, counts = (read(store, f"logits/draws/{name}") for name in ("ids/low", "counts"))
    drawn = np.zeros((len(distinct) * R, M, 200), int)
    for block, of_block in enumerate(distinct):
        start = 0
        for place, number in enumerate(np.split(of_block, W)[VIEW]):
            part = slice(start, start + int(number))
            found = ids[block, VIEW, part].astype(int).cumsum()
            drawn[block * R + place // M, place % M, found] = counts[block, VIEW, part]
            start = part.stop
    expected = np.zeros((ROWS, M, 200), int)
    row, place = np.ogrid[:ROWS, :M]
    np.add.at(expected, (row[..., None], place[..., None], want.ids_BMK.numpy()), want.counts_BMK.numpy())
    assert (drawn[:ROWS] == expected).all()
    assert (drawn[:ROWS].sum(2) == np.where(np.arange(M) < masked(store, "count")[:, None], K, 0)).all()
