"""Stores that somebody made to do harm, with a right hash chain: nothing outside their own folder is read, written or
deleted, and nothing in them runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cli import kdtrain
from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import DamagedStoreError, DistillationError, StoreError
from teacher_cache.format.small_arrays import write_constant
from teacher_cache.read.pool import open_caches
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from teacher_cache.verify.verify import verify_store
from tests.forged import edit_array, edit_checked, edit_manifest, reseal

Edit = Callable[[NDArray[Any]], object]

SENTINEL = b"somebody else's"


@pytest.fixture(scope="session")
def whole_store(
    tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, BuildSettings]:
    out = tmp_path_factory.mktemp("whole") / "cache.zarr"
    settings = BuildSettings(
        teacher=str(tiny_teacher()), corpus=(str(tiny_corpus),), out=str(out), seq_len=24, max_rows=24, block_rows=8,
        k=8, layers="2,4", attention_layer=3, precision="nmse:1e-1",
    )  # fmt: skip
    build_cache(settings)
    return out, settings


@pytest.fixture
def store(whole_store: tuple[Path, BuildSettings], tmp_path: Path) -> Iterator[Path]:
    """A copy to be spoiled, in a folder with a file of somebody else's that must stay as it is."""
    victim = tmp_path / "victim"
    victim.write_bytes(SENTINEL)
    yield Path(shutil.copytree(whole_store[0], tmp_path / "stores" / "cache.zarr"))
    assert victim.read_bytes() == SENTINEL
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("derived", "stores")) == ["victim"]


def rename_teacher_file(store: Path, name: str) -> None:
    def edit(fields: dict[str, Any]) -> None:
        fields["files"][name] = fields["files"].pop("teacher/tokenizer.json")

    edit_checked(store / "teacher.json", edit)
    reseal(store)


def test_a_sealed_list_of_commits_that_is_none_is_a_message(store: Path) -> None:
    listed = store / "commits.sha256"
    listed.write_bytes(listed.read_bytes().replace(b"\n", b" "))
    digest = {"size": listed.stat().st_size, "sha256": hashlib.sha256(listed.read_bytes()).hexdigest()}
    edit_checked(store / "seal.json", lambda fields: fields["objects"].update({"commits.sha256": digest}))
    with pytest.raises(StoreError, match="'commits.sha256' was sealed, but it is no list of the hashes of commits"):
        open_caches([str(store)]).read_rows(8, 16, TargetRequest(hidden_layers=(2,)))
    [finding] = verify_store(store).findings
    assert (finding.key, finding.part) == ("commits.sha256", "seal")


def names_leading_out(tmp_path: Path) -> list[str]:
    return [
        "teacher/../../../victim",
        f"teacher/{tmp_path}/victim",
        f"{tmp_path}/victim",
        "teacher/",
        "teacher/..",
        "zarr.json",
    ]


@pytest.mark.parametrize("number", range(6))
def test_a_teacher_that_lists_files_elsewhere_is_refused(store: Path, tmp_path: Path, number: int) -> None:
    name = names_leading_out(tmp_path)[number]
    rename_teacher_file(store, name)
    with pytest.raises(StoreError, match="no file of the folder teacher/|does not lie inside the store"):
        open_caches([str(store)]).teacher_folder()
    with pytest.raises(DistillationError):
        derive_store(
            DeriveSettings(src=str(store), dst=str(tmp_path / "derived"), targets="hidden", layers="2"), Silent()
        )
    report = verify_store(LocalStorage(store))
    assert any(finding.key == "teacher.json" for finding in report.findings)
    evict_damage(LocalStorage(store))


@pytest.mark.parametrize("name", ["../../victim", "teacher/../../../victim", "/etc/hostname"])
def test_objects_that_a_seal_lists_elsewhere_are_never_deleted(store: Path, name: str) -> None:
    edit_checked(store / "seal.json", lambda fields: fields["objects"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(StoreError, match="does not lie inside the store"):
        open_caches([str(store)])
    with suppress(StoreError):
        verify_store(LocalStorage(store))
    with suppress(StoreError):
        evict_damage(LocalStorage(store))


def test_an_unsealed_store_lists_nothing_elsewhere_either(store: Path, tmp_path: Path) -> None:
    rename_teacher_file(store, f"{tmp_path}/victim")
    (store / "seal.json").unlink()
    evict_damage(LocalStorage(store))


@pytest.mark.parametrize("sha256", ["../../../victim", "", "0" * 63, None, 3])
def test_commits_name_objects_by_hashes(store: Path, sha256: object) -> None:
    def edit(fields: dict[str, Any]) -> None:
        next(iter(fields["shards"].values()))["sha256"] = sha256

    edit_checked(store / "commits" / "00000000.json", edit)
    # the chain above it is made right, the shard's own digest stays forged
    spoiled = (store / "commits" / "00000000.json").read_bytes()
    reseal_keeping(store, spoiled)
    with pytest.raises(StoreError, match=r"sha256. is (None|3|.\.\./|..:|.0)"):
        open_caches([str(store)]).read_rows(0, 4, TargetRequest(hidden_layers=(2,)))


def reseal_keeping(store: Path, commit: bytes) -> None:
    """`reseal`, but the first commit stays as it was spoiled."""
    import hashlib

    reseal(store)
    (store / "commits" / "00000000.json").write_bytes(commit)
    hashes = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  commits/{path.name}\n"
        for path in sorted((store / "commits").iterdir())
    ]
    (store / "commits.sha256").write_text("".join(hashes))
    data = (store / "commits.sha256").read_bytes()
    digest = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_checked(store / "seal.json", lambda fields: fields["objects"].update({"commits.sha256": digest}))


@pytest.mark.parametrize(
    "key, named",
    [
        ("hidden/2/basis/zarr.json", "hidden/2/basis/zarr.json"),
        ("hidden/2/basis/c/0/0", "hidden/2/basis/c"),
        ("hidden/2/variance/c", "hidden/2/variance/c"),
        ("hidden/zarr.json", "hidden/zarr.json"),
        ("input_ids/zarr.json", "input_ids/zarr.json"),
        ("teacher.json", "teacher.json"),
        ("zarr.json", "zarr.json"),
    ],
)
def test_a_seal_that_leaves_out_what_decides_how_numbers_are_read(store: Path, key: str, named: str) -> None:
    """Whatever nothing vouches for could be changed without a word."""
    edit_checked(store / "seal.json", lambda fields: fields["objects"].pop(key))
    with pytest.raises(DamagedStoreError, match=f"'{named}' is not listed in the seal"):
        open_caches([str(store)])
    assert named in [finding.key for finding in verify_store(LocalStorage(store)).findings]


def test_a_tokenizer_that_cannot_be_read_is_found_before_a_training(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store / "teacher" / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["added_tokens"][3]["normalized"] = 2147483647
    path.write_text(json.dumps(fields))
    reseal(store)
    out = tmp_path / "derived"
    assert kdtrain.main(["--cache", str(store), "--method", "hs", "--steps", "1", "--out", str(out)]) == 1
    assert "kdtrain: the tokenizer of the cache's teacher cannot be read" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("token_id", [2**31 - 1, -1, "\x1b[31m7", None])
def test_ids_beyond_the_vocabulary_are_refused_before_a_tokenizer_makes_room_for_them(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], token_id: object
) -> None:
    """The tokenizers library makes room for every id below the largest: 8.6 GB for 2147483647."""
    path = store / "teacher" / "tokenizer.json"
    fields = json.loads(path.read_text())
    token = next(iter(fields["model"]["vocab"]))
    fields["model"]["vocab"][token] = token_id
    path.write_text(json.dumps(fields))
    reseal(store)
    out = tmp_path / "derived"
    assert kdtrain.main(["--cache", str(store), "--method", "hs", "--steps", "1", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "has other ids than the teacher: tokenizer.json gives the token" in said and f"the id {token_id!r}:" in said
    assert not out.exists()


def test_a_manifest_that_has_lost_targets_is_refused(store: Path) -> None:
    """The numbers of `hidden/4` lie there sealed, and whoever asks for them would be told that nobody kept any."""
    seal = json.loads((store / "seal.json").read_text())
    edit_manifest(store, lambda fields: fields["targets"].update(hidden=fields["targets"]["hidden"][:1]))
    edit_manifest(store, lambda fields: fields["calibration"].pop("hidden/4"))
    assert any(key.startswith("hidden/4/") for key in seal["objects"])
    reseal(store)
    with pytest.raises(DamagedStoreError, match="'hidden/4/[^']*' is listed in the seal and is part of nothing"):
        open_caches([str(store)])
    found = [finding.key for finding in verify_store(LocalStorage(store)).findings]
    assert "hidden/4/basis/c/0/0" in found and "hidden/2/basis/c/0/0" not in found


def test_a_link_in_place_of_an_array_is_refused_and_nothing_is_unsealed(
    store: Path, whole_store: tuple[Path, BuildSettings], tmp_path: Path
) -> None:
    shutil.move(store / "hidden" / "2", tmp_path / "stores" / "elsewhere")
    (store / "hidden" / "2").symlink_to(tmp_path / "stores" / "elsewhere")
    before = (store / "seal.json").read_bytes()
    with pytest.raises(StoreError, match="is a link"):
        build_cache(replace(whole_store[1], out=str(store)))
    assert (store / "seal.json").read_bytes() == before
    with pytest.raises(StoreError, match="is a link"):
        open_caches([str(store)]).read_rows(0, 4, TargetRequest(hidden_layers=(2,)))


def test_a_pipe_in_place_of_the_seal_is_not_waited_for(store: Path) -> None:
    (store / "seal.json").unlink()
    os.mkfifo(store / "seal.json")
    with pytest.raises(StoreError, match="is no file"):
        open_caches([str(store)])


def test_files_that_no_list_names_do_not_reach_the_tokenizer(store: Path) -> None:
    listed = {key.removeprefix("teacher/") for key in json.loads((store / "teacher.json").read_text())["files"]}
    (store / "teacher" / "special_tokens_map.json").write_text('{"mask_token": "[UNK]"}')
    (store / "teacher" / "added_tokens.json").write_text('{"ba": 3}')
    reader = open_caches([str(store)])
    folder = reader.teacher_folder()
    assert {path.name for path in folder.iterdir()} == listed
    assert (folder / "config.json").read_bytes() == (store / "teacher" / "config.json").read_bytes()


@pytest.mark.parametrize(
    "name, fields, what",
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "someone/kernel"),
        ("config.json", {"_attn_implementation": "someone/kernel"}, "someone/kernel"),
    ],
)
def test_a_teacher_that_names_code_is_refused(store: Path, name: str, fields: dict[str, Any], what: str) -> None:
    path = store / "teacher" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    reseal(store)
    with pytest.raises(StoreError, match="never decides what code runs") as caught:
        open_caches([str(store)]).teacher_folder()
    assert what in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_evil.py", "weights.pkl", "tf_model.h5"])
def test_pickles_and_code_beside_the_teacher_are_refused(store: Path, name: str) -> None:
    (store / "teacher" / name).write_bytes(pickle.dumps(Evil()))
    edit_checked(
        store / "teacher.json",
        lambda fields: fields["files"].update({f"teacher/{name}": {"size": 1, "sha256": "0" * 64}}),
    )
    reseal(store)
    with pytest.raises(StoreError, match=f"teacher/{name}"):
        open_caches([str(store)]).teacher_folder()


def spoil_metadata(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(store: Path) -> None:
        path = store / "hidden" / "2" / "basis" / "zarr.json"
        metadata = json.loads(path.read_text())
        change(metadata)
        path.write_text(json.dumps(metadata))

    return spoil


def as_format_two(store: Path) -> None:
    """What made zarr unpickle: an array of objects of format 2 with a filter that runs code."""
    folder = store / "hidden" / "2" / "basis"
    metadata = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": None, "fill_value": None,
                "order": "C", "filters": [{"id": "pickle", "protocol": 5}]}  # fmt: skip
    (folder / "zarr.json").write_text(json.dumps(metadata))
    (folder / ".zarray").write_text(json.dumps(metadata))
    (folder / "0").write_bytes(pickle.dumps([Evil()]))


@pytest.mark.parametrize(
    "spoil",
    [
        as_format_two,
        spoil_metadata(lambda metadata: metadata.update(data_type="object")),
        spoil_metadata(lambda metadata: metadata.update(data_type="complex128")),
        spoil_metadata(lambda metadata: metadata.update(shape=[50_000, 50_000])),
        spoil_metadata(lambda metadata: metadata.update(shape=[-1, 32])),
        spoil_metadata(lambda metadata: metadata.update(shape="32")),
        spoil_metadata(lambda metadata: metadata["codecs"].append({"name": "numcodecs.pickle"})),
        spoil_metadata(lambda metadata: metadata.update(codecs=[{"name": "gzip"}])),
        spoil_metadata(lambda metadata: metadata.update(storage_transformers=[{"name": "other"}])),
        spoil_metadata(lambda metadata: metadata.clear()),
    ],
)
def test_constants_are_decoded_as_they_are_written_and_in_no_other_way(
    store: Path, spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store)
    spoil(store)
    reseal(store)
    with pytest.raises(StoreError, match="cannot be read"):
        open_caches([str(store)]).read_rows(0, 4, TargetRequest(hidden_layers=(2,)))
    findings = verify_store(LocalStorage(store)).findings
    assert [finding.key for finding in findings] == ["hidden/2/basis/zarr.json"]
    assert not (store / "pwned").exists()


CONSTANTS = {
    "a mean of another width": ("hidden/2/mean", np.zeros(7, np.float32)),
    "a step below 0": ("hidden/2/step", np.array(-1.0)),
    "a step that is no number": ("hidden/2/step", np.array(np.nan)),
    "a step that the manifest does not have": ("hidden/2/step", np.array(123.0)),
    "a basis of one number": ("hidden/2/basis", np.ones((1, 1), np.float32)),
    "a basis that is too wide": ("hidden/2/basis", np.ones((32, 5000), np.float32)),
    "a basis of half precision": ("hidden/2/basis", np.ones((32, 32), np.float16)),
    "a basis that is not finite": ("hidden/2/basis", np.full((32, 32), np.inf, np.float32)),
    "a projection of another width": ("attention/3/projection/query/weight", np.ones((32, 16), np.float32)),
    "a bias of another width": ("attention/3/projection/value/bias", np.ones(96, np.float32)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_cannot_be_are_refused(store: Path, name: str) -> None:
    path, value = CONSTANTS[name]
    write_constant(LocalStorage(store), path, value)
    reseal(store)
    with pytest.raises(StoreError, match=f"'{path}' (cannot be read|is 123.0)"):
        open_caches([str(store)]).read_rows(0, 4, TargetRequest(hidden_layers=(2,), attention_layers=(3,)))
    if value.size and float(value.flat[0]) != 123:
        assert [finding.key for finding in verify_store(LocalStorage(store)).findings] == [f"{path}/zarr.json"]


@pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf])
def test_a_variance_is_a_number_above_0(store: Path, value: float) -> None:
    write_constant(LocalStorage(store), "hidden/2/variance", np.array(value))
    reseal(store)
    with pytest.raises(StoreError, match="'hidden/2/variance' cannot be read"):
        open_caches([str(store)]).hidden_variance(2)


def test_attention_of_a_hidden_state_that_is_not_there_is_refused(store: Path) -> None:
    edit_manifest(store, lambda fields: fields["targets"]["attention"][0].update(layer=1))
    reseal(store)
    with pytest.raises(StoreError, match="is read with hidden 0"):
        open_caches([str(store)])


def test_a_finished_store_without_its_calibration_is_refused(store: Path, tmp_path: Path) -> None:
    edit_manifest(store, lambda fields: fields["calibration"].clear())
    reseal(store)
    for read in (
        lambda: open_caches([str(store)]),
        lambda: derive_store(DeriveSettings(src=str(store), dst=str(tmp_path / "derived"))),
    ):
        with pytest.raises(StoreError, match="does not say how 'hidden/2' was calibrated"):
            read()


def first(value: int) -> Edit:
    return lambda values: values.flat.__setitem__(0, value)


NUMBERS: dict[str, tuple[str, Edit, str]] = {
    "an id far beyond the vocabulary": ("input_ids", first(10**6), "holds 1000000, which must be an id"),
    "an id below 0": ("input_ids", first(-1), "holds -1"),
    "the largest id": ("input_ids", first(2**31 - 1), "holds 2147483647"),
    "a length below 0": ("length", first(-5), "holds -5, which must be a number of tokens, 1 to 24"),
    "no length": ("length", first(0), "holds 0"),
    "a length beyond the row": ("length", first(1000), "holds 1000"),
    "a row of another text": ("row_id", first(2**40), "holds 1099511627776"),
    "a masked position beyond the row": ("masked/positions", first(999), "holds 999"),
    "a masked position before the row": ("masked/positions", first(-30), "holds -30"),
    "more masked positions than there is room": ("masked/count", first(99), "holds 99"),
    "a replacement that is no id": ("masked/replacement_ids", first(10**6), "holds 1000000"),
    "an original that is no id": ("masked/original_ids", first(-1), "holds -1"),
    "an original that the row does not have": (
        "masked/original_ids", lambda ids: np.add(ids, ids == ids.flat[0], ids), "its row has",
    ),
    "a probable id beyond the vocabulary": ("logits/ids/low", first(255), "below"),
    "a tail that is no number": ("logits/log_tail", lambda tail: tail.fill(np.nan), "the logarithm of a probability"),
    "a tail above 1": ("logits/log_tail", lambda tail: tail.fill(1), "the logarithm of a probability"),
    "escapes below 0": ("hidden/2/escapes/count", first(-3), "counts -3 entries"),
    "more escapes than room": ("hidden/2/escapes/count", first(10**6), "counts 1000000 entries"),
    "an escape beyond its stream": ("hidden/2/escapes/index", lambda index: index.fill(10**9), "holds 1000000000"),
    "escapes that fall": ("hidden/2/escapes/index", lambda index: index.fill(0), "above the one before it"),
}  # fmt: skip
DRAWS: dict[str, tuple[str, Edit, str]] = {
    "more ids than draws": ("logits/draws/distinct", lambda distinct: distinct.fill(255), "at most 30|counts"),
    "no ids at a masked position": ("logits/draws/distinct", lambda distinct: distinct.fill(0), "above 0"),
    "draws of no one": ("logits/draws/counts", lambda counts: counts.fill(0), "at least 1"),
    "more draws than were drawn": ("logits/draws/counts", lambda counts: counts.fill(255), "30 together"),
    "a drawn id beyond the vocabulary": ("logits/draws/ids/low", lambda ids: ids.fill(255), "below"),
}
EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True, masked=True)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be_are_refused_with_their_array_and_block(store: Path, name: str) -> None:
    path, edit, what = NUMBERS[name]
    if "escapes" in path:
        edit_array(store, "hidden/2/escapes/count", 1, lambda count: count.fill(3))
        edit_array(store, "hidden/2/escapes/index", 1, lambda index: np.copyto(index[:, :3], [1, 2, 3]))
    edit_array(store, path, 1, edit)
    reseal(store)
    reader = open_caches([str(store)])
    reader.read_rows(0, 8, EVERYTHING)
    with pytest.raises(DamagedStoreError, match=f"of block 1 .*({what})"):
        reader.read_rows(8, 16, EVERYTHING)


@pytest.fixture(scope="session")
def drawn_store(whole_store: tuple[Path, BuildSettings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "cache.zarr"
    build_cache(replace(whole_store[1], out=str(out), targets="logits", logits="sample", k=30))
    return out


@pytest.mark.parametrize("name", DRAWS)
def test_draws_that_cannot_be_are_refused(drawn_store: Path, tmp_path: Path, name: str) -> None:
    store = Path(shutil.copytree(drawn_store, tmp_path / "cache.zarr"))
    path, edit, what = DRAWS[name]
    open_caches([str(store)]).read_rows(0, 24, TargetRequest(logits=True))
    edit_array(store, path, 1, edit)
    reseal(store)
    with pytest.raises(DamagedStoreError, match=f"of block 1 .*({what})"):
        open_caches([str(store)]).read_rows(8, 16, TargetRequest(logits=True))


# ---- causal stores --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole_causal_store(causal_teacher: Path, causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of 21 positions, so that the last of three bytes has three bits that mean nothing."""
    out = tmp_path_factory.mktemp("causal") / "cache.zarr"
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=str(out), seq_len=21, max_rows=24,
            block_rows=8, k=8, positions="every:2",
        )
    )  # fmt: skip
    return out


@pytest.fixture
def causal(whole_causal_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_causal_store, tmp_path / "stores" / "cache.zarr"))


def bit(row: int, position: int, value: int) -> Edit:
    def edit(bytes_BN: NDArray[Any]) -> None:
        byte, place = divmod(position, 8)
        bytes_BN[row, byte] = int(bytes_BN[row, byte]) & (255 - (1 << place)) | value << place

    return edit


BITS: dict[str, tuple[str, Edit, str]] = {
    "a segment that begins beyond the row": ("segments/starts", bit(2, 21, 1), "bits within the row"),
    "no segment at the first position": ("segments/starts", bit(3, 0, 0), "position 0 of row 3 .* first position"),
    "segments everywhere": ("segments/starts", lambda starts: starts.fill(255), "bits within the row"),
    "a place beyond the row": ("next/kept", bit(1, 23, 1), "bits within the row"),
    "a place at the last position": ("next/kept", bit(0, 20, 1), "position 20 of row 0 .* next token"),
    "places everywhere": ("next/kept", lambda kept: np.copyto(kept, np.uint8([255, 255, 31])), "of the same segment"),
    "no places": ("next/kept", lambda kept: kept.fill(0), "above 0 at places that are kept and 0 elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_bits_that_cannot_be_are_refused(causal: Path, name: str) -> None:
    path, edit, what = BITS[name]
    edit_array(causal, path, 1, edit)
    reseal(causal)
    reader = open_caches([str(causal)])
    reader.read_rows(0, 8, TargetRequest(logits=True))
    with pytest.raises(DamagedStoreError, match=f"of block 1 .*({what})"):
        reader.read_rows(8, 16, TargetRequest(logits=True))


def test_a_place_at_the_last_token_of_a_segment_is_refused(causal: Path) -> None:
    """What follows it belongs to another document, or is padding."""
    reader = open_caches([str(causal)])
    batch = reader.read_rows(8, 16, TargetRequest(next_tokens=True))["plain"]
    assert batch.starts_BT is not None
    row, position = batch.starts_BT[:, 1:].nonzero()[0].tolist()
    edit_array(causal, "next/kept", 1, bit(row, position, 1))
    reseal(causal)
    with pytest.raises(DamagedStoreError, match=f"marks position {position} of row {row} of the block wrongly"):
        open_caches([str(causal)]).read_rows(8, 16, TargetRequest(logits=True))


def test_more_places_than_there_is_room_for_are_refused(causal: Path) -> None:
    """Every second position of a row has 10 places; its segments leave room to mark more."""
    batch = open_caches([str(causal)]).read_rows(8, 16, TargetRequest(next_tokens=True))["plain"]
    assert batch.starts_BT is not None
    real_BT, starts_BT = batch.real_BT().numpy(), batch.starts_BT.numpy()
    possible_BT = np.pad(real_BT[:, 1:] & ~starts_BT[:, 1:], ((0, 0), (0, 1)))
    assert possible_BT.sum(axis=1).max() > 10
    edit_array(
        causal, "next/kept", 1, lambda kept: np.copyto(kept, np.packbits(possible_BT, axis=1, bitorder="little"))
    )
    reseal(causal)
    with pytest.raises(DamagedStoreError, match="at most 10 positions of a row"):
        open_caches([str(causal)]).read_rows(8, 16, TargetRequest(next_tokens=True))


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "positions of none": ({"positions": "every:0"}, "'positions' is 'every:0'"),
    "positions of too many": ({"positions": "share:1.5"}, "'positions' is 'share:1.5'"),
    "positions written otherwise": ({"positions": "share:1.0"}, "'positions' is 'share:1.0'"),
    "positions of another type": ({"positions": 2}, "'positions' is 2"),
    "positions without end": ({"positions": "every:" + "9" * 10_000}, "'positions' is 'every:999"),
    "no positions": ({"positions": None}, "'positions' is None: causal teachers have some"),
    "another kind": ({"teacher": {"kind": "x"}}, "'teacher.kind' is 'x'"),
    "a kind of another type": ({"teacher": {"kind": ["causal-lm"]}}, "'teacher.kind'"),
    "an encoder with positions": ({"teacher": {"kind": "masked-lm"}}, "'positions' is 'every:2': causal teachers"),
    "other segments": ({"segments": "apart"}, "'segments' is 'apart'"),
    "distributions of masked views": ({"targets": {"logits": {"view": "masked"}}}, "'targets.logits.view' is 'masked'"),
    "hidden states of masked views": (
        {"targets": {"hidden": [{"layer": 2, "codec": "float16", "view": "masked"}]}},
        "'targets.hidden.0.view' is 'masked': a causal teacher",
    ),
    "a row of one": ({"seq_len": 1}, "'seq_len' is 1: rows of a causal teacher have 2"),
}


def merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict):
            merge(fields[name], value)
        else:
            fields[name] = value


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_causal_store_that_cannot_be_are_refused(causal: Path, name: str) -> None:
    changes, what = FIELDS[name]
    edit_manifest(causal, lambda fields: merge(fields, changes))
    reseal(causal)
    with pytest.raises(StoreError, match=what) as caught:
        open_caches([str(causal)])
    assert len(str(caught.value)) < 1000


def test_an_encoder_store_that_claims_positions_is_refused(store: Path) -> None:
    edit_manifest(store, lambda fields: fields.update(positions="all"))
    reseal(store)
    with pytest.raises(StoreError, match="'positions' is 'all': causal teachers have some, others none"):
        open_caches([str(store)])


@pytest.mark.parametrize("changes", [{"segments": "joined"}, {"positions": "every:3"}, {"positions": "all"}])
def test_fields_that_could_be_but_are_not_those_of_the_arrays(causal: Path, changes: dict[str, str]) -> None:
    """A forged field that names other shapes, or leaves an array out, is refused with the array or the seal."""
    edit_manifest(causal, lambda fields: fields.update(changes))
    reseal(causal)
    with pytest.raises(StoreError):
        open_caches([str(causal)]).read_rows(0, 24, TargetRequest(logits=True))


def test_sizes_are_looked_at_before_anything_is_read(store: Path) -> None:
    """Sparse files of 10 GB: reading one would take its memory."""
    for name in ("seal.json", "zarr.json", "commits.sha256", "commits/00000001.json", "hidden/2/codes/byte/c/1/0/0"):
        path = store / name
        if not path.exists():
            path = next((store / "hidden" / "2" / "codes").rglob("c/1/0/0"))
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(10 * 2**30)
        with pytest.raises(StoreError, match="10737418240 bytes|damaged"):
            open_caches([str(store)]).read_rows(8, 16, TargetRequest(hidden_layers=(2,)))
        path.write_bytes(data)
    open_caches([str(store)]).read_rows(8, 16, TargetRequest(hidden_layers=(2,)))


@pytest.mark.parametrize("rows", [10**12, 3 * 10**7])
def test_rows_that_nothing_vouches_for_take_no_memory(store: Path, rows: int) -> None:
    edit_manifest(store, lambda fields: fields.update(rows=rows))
    edit_checked(store / "seal.json", lambda fields: fields.update(rows=rows, blocks=-(-rows // 8)))
    reseal(store)
    tracemalloc.start()
    with pytest.raises(StoreError, match="more than the 4194304|commits of another number"):
        open_caches([str(store)])
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_json_nested_without_end_is_a_message(store: Path) -> None:
    for name in ("seal.json", "zarr.json"):
        data = (store / name).read_bytes()
        (store / name).write_bytes(b"[" * 200_000 + b"]" * 200_000)
        with pytest.raises(StoreError):
            open_caches([str(store)])
        (store / name).write_bytes(data)


def test_a_forged_store_that_is_right_is_read(store: Path) -> None:
    """The forging itself is no reason to refuse: all tests above would pass otherwise."""
    edit_manifest(store, lambda fields: fields.update(command="somebody else's"))
    reseal(store)
    reader = open_caches([str(store)])
    assert reader.manifest.command == "somebody else's"
    reader.read_rows(0, 24, TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True))
    reader.teacher_folder()
