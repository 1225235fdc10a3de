"""What can happen to a store, each with what must be said of it, and how to look at one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from teacher_cache.contract.batch import TargetRequest
from teacher_cache.format.protocol import Commit, Seal
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.verify import VerifyReport, verify_store


def files_of(store: Path) -> dict[str, bytes]:
    return {
        file.relative_to(store).as_posix(): file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()
    }


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def drop_block(store: Path, block: int) -> None:
    for key in Commit.from_bytes((store / f"commits/{block:08d}.json").read_bytes()).shards:
        (store / key).unlink()


def forge_seal(store: Path, **changes: Any) -> None:
    """A seal that agrees with itself, not with the store."""
    seal = Seal.from_bytes((store / "seal.json").read_bytes())
    (store / "seal.json").write_bytes(replace(seal, **changes).to_bytes())


@dataclass(frozen=True)
class Damage:
    """What is done to a store, one key that must be named with its part, group and block, and the reader's view."""

    do: Callable[[Path], object]
    key: str
    part: str
    what: str
    block: int | None = None
    group: str = "the first build"
    readable: bool = False
    mendable: bool = True
    shared: bool = False


WEIGHTS, QUERY = "teacher/model.safetensors", "attention/3/projection/query/weight"


DAMAGES = {
    "a flipped bit": Damage(lambda s: flip(s / "input_ids/c/1/0/0"), "input_ids/c/1/0/0", "shard", "other contents", 1),
    "a truncated shard": Damage(
        lambda s: (s / "hidden/2/escapes/value/c/1/0/0").write_bytes(b"short"),
        "hidden/2/escapes/value/c/1/0/0", "shard", "has 5 bytes instead of", 1,
    ),
    "an empty shard": Damage(
        lambda s: (s / "logits/ids/low/c/2/0/0").write_bytes(b""), "logits/ids/low/c/2/0/0", "shard", "has 0 bytes", 2
    ),
    "a missing shard": Damage(lambda s: (s / "length/c/0/0").unlink(), "length/c/0/0", "shard", "is missing", 0),
    "two swapped shards": Damage(
        lambda s: swap(s / "input_ids/c/0/0/0", s / "input_ids/c/1/0/0"), "input_ids/c/1/0/0", "shard", "", 1
    ),
    "a commit without its shards": Damage(
        lambda s: drop_block(s, 1), "masked/count/c/1/0", "shard", "is missing", 1
    ),
    "a missing commit": Damage(
        lambda s: (s / "commits/00000001.json").unlink(), "commits/00000001.json", "commit", "is missing", 1
    ),
    "an empty commit": Damage(
        lambda s: (s / "commits/00000001.json").write_bytes(b""), "commits/00000001.json", "commit", "cannot be read", 1
    ),
    "two swapped commits": Damage(
        lambda s: swap(s / "commits/00000000.json", s / "commits/00000001.json"),
        "commits/00000000.json", "commit", "is not the one that was sealed", 0,
    ),
    "an added layer's shard": Damage(
        lambda s: flip(s / "hidden/3/escapes/count/c/2/0"),
        "hidden/3/escapes/count/c/2/0", "shard", "other contents", 2, group="extension 1",
    ),
    "an edited manifest": Damage(
        lambda s: edit(s / "zarr.json", '"seed": 0', '"seed": 7'),
        "zarr.json", "manifest", "does not match its own checksum", mendable=False,
    ),
    "a lost manifest": Damage(
        lambda s: (s / "extensions/1/zarr.json").unlink(),
        "extensions/1/zarr.json", "manifest", "is missing", group="extension 1", mendable=False,
    ),
    "an edited seal": Damage(
        lambda s: edit(s / "seal.json", '"rows": 40', '"rows": 41'),
        "seal.json", "seal", "does not match its own checksum",
    ),
    "a seal of fewer blocks": Damage(
        lambda s: forge_seal(s, blocks=1), "seal.json", "seal", "other rows or blocks than the manifest"
    ),
    "a damaged list of commits": Damage(
        lambda s: flip(s / "commits.sha256"), "commits.sha256", "seal", "other contents than were written"
    ),
    "a lost list of commits": Damage(
        lambda s: (s / "extensions/1/commits.sha256").unlink(),
        "extensions/1/commits.sha256", "seal", "is missing", group="extension 1",
    ),
    "a seal with other totals": Damage(
        lambda s: forge_seal(s, bytes_per_array={"input_ids": 1}),
        "seal.json", "seal", "other bytes than the commits", readable=True,
    ),
    "an edited zarr.json": Damage(
        lambda s: edit(s / "input_ids/zarr.json", '"int32"', '"int16"'),
        "input_ids/zarr.json", "metadata", "other contents",
    ),
    "a lost zarr.json of a group": Damage(
        lambda s: (s / "hidden/zarr.json").unlink(), "hidden/zarr.json", "metadata", "is missing", shared=True
    ),
    "a lost zarr.json around projections": Damage(
        lambda s: (s / "attention/3/zarr.json").unlink(), "attention/3/zarr.json", "metadata", "is missing"
    ),
    "a projection": Damage(lambda s: flip(s / f"{QUERY}/c/0/0"), f"{QUERY}/c/0/0", "constant", "other contents"),
    "a variance": Damage(
        lambda s: flip(s / "hidden/4/variance/c"), "hidden/4/variance/c", "constant", "other contents"
    ),
    "a rotation": Damage(
        lambda s: flip(s / "hidden/2/basis/c/0/0"),
        "hidden/2/basis/c/0/0", "constant", "other contents", mendable=False,
    ),
    "an added layer's step": Damage(
        lambda s: (s / "hidden/3/step/zarr.json").unlink(),
        "hidden/3/step/zarr.json", "constant", "is missing", group="extension 1", mendable=False,
    ),
    "the teacher's weights": Damage(lambda s: flip(s / WEIGHTS), WEIGHTS, "teacher", "other contents"),
    "a lost file of the teacher": Damage(
        lambda s: (s / "teacher/config.json").unlink(), "teacher/config.json", "teacher", "is missing"
    ),
    "an edited list of the teacher's files": Damage(
        lambda s: edit(s / "teacher.json", "config", "confit"), "teacher.json", "teacher", "other contents"
    ),
}  # fmt: skip


EVERYTHING = TargetRequest(hidden_layers=(2, 3, 4), attention_layers=(3,), logits=True)


def check(store: Path) -> VerifyReport:
    return verify_store(LocalStorage(store))


def read_everything(store: Path) -> None:
    reader = CacheReader.open(store)
    reader.read_rows(0, reader.rows, EVERYTHING)
    reader.teacher_folder()


UNSEALED = {
    "metadata": (lambda s: edit(s / "input_ids/zarr.json", '"int32"', '"int16"'), "input_ids/zarr.json"),
    "a rotation": (lambda s: flip(s / "hidden/2/basis/c/0/0"), "hidden/2/basis/c/0/0"),
    "a lost rotation": (lambda s: (s / "hidden/2/basis/c/0/0").unlink(), "hidden/2/basis/zarr.json"),
    "a shape": (lambda s: edit(s / "hidden/2/mean/zarr.json", "32", "31"), "hidden/2/mean/c/0"),
    "a manifest": (lambda s: edit(s / "zarr.json", '"seed": 0', '"seed": 1'), "zarr.json"),
    "a teacher": (lambda s: flip(s / WEIGHTS), WEIGHTS),
    "a teacher's list": (lambda s: edit(s / "teacher.json", "config", "confit"), "teacher.json"),
    "rows of a commit": (lambda s: edit(s / "commits/00000000.json", "16", "17"), "commits/00000000.json"),
}
