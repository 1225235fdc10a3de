"""Stores as somebody else could make them: changed at will, with a hash chain that is right.

`reseal` makes every digest of a store right again after its objects were changed, so that what readers refuse is
refused for what it says and not for a wrong hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from teacher_cache.contract.manifest import sha256_of_json
from teacher_cache.read.load import BlockLoader

Edit = Callable[[dict[str, Any]], object]


def edit_manifest(store: Path, edit: Edit, prefix: str = "") -> None:
    """Change the manifest of a group."""
    path = store / prefix / "zarr.json"
    document = json.loads(path.read_bytes())
    attributes = document["attributes"]
    attributes.pop("sha256")
    edit(attributes)
    attributes["sha256"] = sha256_of_json(attributes)
    path.write_bytes(json.dumps(document, indent=2).encode())


def edit_checked(path: Path, edit: Edit) -> None:
    """Change an object that carries its own hash: a commit, a seal, the list of the teacher's files."""
    fields = json.loads(path.read_bytes())
    fields.pop("sha256")
    edit(fields)
    path.write_bytes((json.dumps({**fields, "sha256": sha256_of_json(fields)}, indent=1) + "\n").encode())


def edit_array(store: Path, path: str, block: int, edit: Callable[[NDArray[Any]], object]) -> None:
    """Change one block of an array in place; its shard is written as a build writes it."""
    array = zarr.open_array(str(store / path), mode="r+").with_config({"write_empty_chunks": True})
    values = np.array(array[block])
    edit(values)
    array[block] = values


def reseal(store: Path) -> None:
    """Make digests right from the leaves up: shards in commits, commits in their list, everything in the seals."""

    def digest(key: str) -> dict[str, Any]:
        data = (store / key).read_bytes()
        return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def refresh(listed: dict[str, Any]) -> None:
        for key in listed:
            if not key.startswith("/") and ".." not in key and (store / key).is_file():
                listed[key] = digest(key)

    if (store / "teacher.json").is_file():
        edit_checked(store / "teacher.json", lambda fields: refresh(fields["files"]))
    for seal in sorted(store.rglob("seal.json")):
        group = seal.parent
        commits = sorted((group / "commits").glob("*.json"))
        for commit in commits:
            edit_checked(commit, lambda fields: refresh(fields["shards"]))
        hashes = [f"{hashlib.sha256(one.read_bytes()).hexdigest()}  commits/{one.name}\n" for one in commits]
        (group / "commits.sha256").write_text("".join(hashes))
        edit_checked(seal, lambda fields: refresh(fields["objects"]))


def forge_entries(
    monkeypatch: pytest.MonkeyPatch, kind: str, *, index: list[int], count: int = 2, value: float | None = None
) -> None:
    """Have every block that is loaded hold such escapes or sinks: the first two, said to be `count`."""
    load = BlockLoader.load_array

    def forge(self: BlockLoader, path: str, block: int, part: Any = None) -> Any:
        array = load(self, path, block, part)
        if path.endswith(f"{kind}/count"):
            return np.full_like(array, count)
        if path.endswith(f"{kind}/index"):
            array = array.copy()
            array[0, :2] = index
        if path.endswith(f"{kind}/value") and value is not None:
            array = array.copy()
            array[0, 1, 0] = value
        return array

    monkeypatch.setattr(BlockLoader, "load_array", forge)
