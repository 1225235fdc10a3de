"""A sealed store -> decoded targets by row range. What does not match its hashes is refused, never read.

Reading goes in two steps so that they can run in different threads and places: `load_block` reads, checks and
decompresses on the CPU (thread-safe, no torch); `decode` turns a range of its rows into float tensors on any device.
Every shard is compared with the commit's size and SHA-256 before zarr sees it, because zarr reads what is missing as
zeros. Opening costs one seal object and the hashes of small metadata files, whatever the number of rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from teacher_cache.batch import Batch, TargetBatch, TargetRequest, concatenate
from teacher_cache.contract import Manifest, View, describe_targets, sha256_of_json
from teacher_cache.decode import CodedBlock, RowDecoder, in_view
from teacher_cache.errors import StoreError, TargetsError
from teacher_cache.layout import attention_input_path, block_arrays
from teacher_cache.objects import (
    SEAL,
    Commit,
    ObjectDigest,
    commit_key,
    digest_file,
    read_constant,
    read_manifest,
    shard_key,
)
from teacher_cache.relations import VECTORS, AttentionProjections, Projection
from teacher_cache.transform import Transform, fold_projections, projections_of_projected


class CacheReader:
    """One store, for reading."""

    def __init__(self, path: Path, manifest: Manifest, seal: dict[str, Any] | None) -> None:
        self.path = str(path)
        self.manifest = manifest
        self._folder = path
        self._seal = seal
        self._root = zarr.open_group(str(path), mode="r")
        self._specs = {spec.path: spec for spec in block_arrays(manifest)}
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._projections: dict[tuple[int, str], AttentionProjections] = {}
        self._transforms: dict[tuple[str, str], Transform] = {}

    @classmethod
    def open(cls, path: str | Path, *, allow_unsealed: bool = False) -> CacheReader:
        """Open a store.

        Raises:
            StoreError: there is no store, it is of another format version, unfinished, or its metadata was changed.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        seal = _read_seal(folder)
        if seal is None and not allow_unsealed:
            done = len(list((folder / "commits").glob("*.json")))
            raise StoreError(
                f"{str(path)!r} is unfinished ({done} of {manifest.blocks} blocks): what is missing would be read as "
                "zeros; run the same `kdcache build` command again, it continues where it stopped"
            )
        reader = cls(folder, manifest, seal)
        reader._check_objects(lambda key: not key.startswith("teacher/"))
        return reader

    @property
    def rows(self) -> int:
        """Number of rows in the store."""
        return self.manifest.rows

    @property
    def identity_sha256(self) -> str:
        """Hash of everything that makes this store what it is; equal for equal contents."""
        return sha256_of_json(self.manifest.identity())

    def require(self, request: TargetRequest) -> None:
        """Check that the store holds what is asked for.

        Raises:
            TargetsError: it does not; the message names what it has, and the flags that would add the rest.
        """
        targets = self.manifest.targets
        lacking_hidden = sorted(set(request.hidden_layers) - set(targets.hidden_layers()))
        lacking_attention = sorted(set(request.attention_layers) - set(targets.attention_layers()))
        lacking = [f"hidden {layer}" for layer in lacking_hidden] + [
            f"attention {layer}" for layer in lacking_attention
        ]
        if request.logits and targets.logits is None:
            lacking.append("logits")
        if not lacking:
            return
        names = set(request_names(request)) | {name.split()[0] for name in describe_targets(targets)}
        flags = ["--targets " + ",".join(name for name in ("logits", "hidden", "attention") if name in names)]
        if lacking_hidden:
            wanted = sorted(set(request.hidden_layers) | set(targets.hidden_layers()))
            flags.append("--layers " + ",".join(map(str, wanted)))
        if lacking_attention:
            flags.append(f"--attention-layer {lacking_attention[0]}")
        raise TargetsError(
            f"{self.path!r} lacks {', '.join(lacking)}: the student would have nothing to learn from. It has "
            f"{', '.join(describe_targets(targets)) or 'no targets'}; build a store with `kdcache build "
            f"{' '.join(flags)}` and "
            "the other flags as before, or ask for what is there"
        )

    def views_for(self, request: TargetRequest) -> tuple[View, ...]:
        """The views that hold the targets asked for; the store's first view if none are."""
        targets = self.manifest.targets
        used: set[View] = {spec.view for spec in targets.hidden if spec.layer in request.hidden_layers}
        used |= {spec.view for spec in targets.attention if spec.layer in request.attention_layers}
        if request.logits and targets.logits is not None:
            used.add(targets.logits.view)
        order: tuple[View, ...] = ("plain", "masked")
        return tuple(view for view in order if view in used) or targets.views()[:1]

    def hidden_variance(self, layer: int) -> float:
        """E||h - mean||^2 of hidden state `layer`, summed over components: what HS losses are normalised by."""
        return float(np.asarray(self._array(f"hidden/{layer}/variance")[...]))

    def teacher_folder(self) -> Path:
        """A Hugging Face folder with the teacher's configuration, weights and tokenizer, checked against the seal."""
        self._check_objects(lambda key: key.startswith("teacher/"))
        return self._folder / "teacher"

    def load_block(self, block: int, request: TargetRequest, view: View, masked_view: int = 0) -> CodedBlock:
        """Read, check and decompress what `request` needs of one block in one view. Thread-safe.

        Raises:
            StoreError: a shard is missing or not what was committed.
        """
        commit = self._commit(block)
        arrays = {path: self._load(path, commit, view, masked_view) for path in self._paths(request, view)}
        return CodedBlock(block=block, view=view, request=request, arrays=arrays)

    def decode(
        self, coded: CodedBlock, start: int, stop: int, device: str | torch.device = "cpu", *, rotated: bool = False
    ) -> TargetBatch:
        """Rows start..stop of a block, counted from its first row, as tensors on `device`.

        With `rotated`, hidden states come in the coordinates in which they are coded (see `rotation`), which saves a
        matrix product where a learned map follows. Distances and variances are the same in both.
        """

        def projections(layer: int) -> AttentionProjections:
            return self._projections_on(layer, device)

        def transforms(path: str) -> Transform:
            return self._transform_on(path, device)

        decoder = RowDecoder(
            self.manifest,
            coded,
            start,
            stop,
            device=device,
            projections=projections,
            transforms=transforms,
            rotated=rotated,
        )
        return decoder.decode()

    def rotation(self, layer: int, device: str | torch.device = "cpu") -> Transform | None:
        """What takes rotated coordinates of hidden state `layer` back (`synthesise`); None if it is coded as it is."""
        path = f"hidden/{layer}"
        return self._transform_on(path, device) if path in self.manifest.calibration else None

    def read_rows(
        self,
        start: int,
        stop: int,
        request: TargetRequest,
        *,
        masked_view: int = 0,
        device: str | torch.device = "cpu",
    ) -> Batch:
        """Rows start..stop of the store, in every view that the request needs.

        Raises:
            StoreError: a shard is missing or damaged.
            TargetsError: the store does not hold what is asked for.
        """
        self.require(request)
        if not 0 <= start < stop <= self.rows:
            raise ValueError(f"rows {start}..{stop} are not within 0..{self.rows}")
        batch: Batch = {}
        for view in self.views_for(request):
            parts = []
            for block in range(start // self.manifest.block_rows, -(-stop // self.manifest.block_rows)):
                first, last = self.manifest.block_range(block)
                coded = self.load_block(block, request, view, masked_view)
                parts.append(self.decode(coded, max(start, first) - first, min(stop, last) - first, device))
            batch[view] = concatenate(parts)
        return batch

    def _paths(self, request: TargetRequest, view: View) -> list[str]:
        """The arrays to load for a request in one view."""
        targets = self.manifest.targets
        folders = [f"hidden/{n}" for n in request.hidden_layers if in_view(targets.find_hidden(n), view)]
        for layer in request.attention_layers:
            spec = targets.find_attention(layer)
            if spec is not None and spec.view == view:
                is_input = spec.mode == "hidden"
                folders += (
                    [attention_input_path(self.manifest, spec)]
                    if is_input
                    else [f"attention/{layer}/{v}" for v in VECTORS]
                )
        paths = ["input_ids", "length", "row_id"]
        if view == "masked":
            paths += [path for path in self._specs if path.startswith("masked/")]
        if request.logits and in_view(targets.logits, view):
            paths += [path for path in self._specs if path.startswith("logits/")]
        paths += [path for path in self._specs if path.startswith(tuple(f"{folder}/" for folder in folders))]
        return paths

    def _load(self, path: str, commit: Commit, view: View, masked_view: int) -> NDArray[np.generic]:
        spec = self._specs[path]
        key = shard_key(spec, commit.block)
        self._check(key, commit.shards.get(key))
        block = self._array(path)
        if "/escapes/" in path:
            counts_path = f"{path.rpartition('/')[0]}/count"
            if path == counts_path:
                return cast("NDArray[np.generic]", block[commit.block, masked_view : masked_view + 1])
            count = int(cast("Any", self._array(counts_path)[commit.block, masked_view]))
            return cast("NDArray[np.generic]", block[commit.block, masked_view, :count])
        if view == "plain" or path in ("input_ids", "length", "row_id"):
            return cast("NDArray[np.generic]", block[commit.block])
        if path.startswith("masked/"):
            rows = self.manifest.block_rows
            return cast("NDArray[np.generic]", block[commit.block, masked_view * rows : (masked_view + 1) * rows])
        tokens = spec.chunk_shape[-1]
        return cast("NDArray[np.generic]", block[commit.block, ..., masked_view * tokens : (masked_view + 1) * tokens])

    def _projections_on(self, layer: int, device: str | torch.device) -> AttentionProjections:
        """What takes the stored input of an attention layer to its q, k, v; read and combined once per device."""
        key = (layer, str(device))
        if key not in self._projections:
            spec = self.manifest.targets.find_attention(layer)
            assert spec is not None
            path = attention_input_path(self.manifest, spec)
            if path.endswith("/projected"):
                found = projections_of_projected(self._transform_on(path, "cpu"))
            else:
                found = self._read_projections(layer)
                if path in self.manifest.calibration:
                    found = fold_projections(self._transform_on(path, "cpu"), found)
            self._projections[key] = found.to(device)
        return self._projections[key]

    def _read_projections(self, layer: int) -> AttentionProjections:
        loaded = {}
        for name in VECTORS:
            folder = f"attention/{layer}/projection/{name}"
            parts = {p: torch.from_numpy(read_constant(self._folder, f"{folder}/{p}")) for p in ("weight", "bias")}
            loaded[name] = Projection(**parts)
        return AttentionProjections(**loaded)

    def _transform_on(self, path: str, device: str | torch.device) -> Transform:
        """The constants of a calibrated stream, read once per device."""
        key = (path, str(device))
        if key not in self._transforms:
            self._transforms[key] = read_transform(self._folder, path).to(device)
        return self._transforms[key]

    def _array(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            self._arrays[path] = cast("zarr.Array[Any]", self._root[path])
        return self._arrays[path]

    def _commit(self, block: int) -> Commit:
        try:
            data = (self._folder / commit_key(block)).read_bytes()
            commit = Commit.from_bytes(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(commit_key(block), f"cannot be read ({type(error).__name__})") from error
        if self._seal is not None and ObjectDigest.of(data).sha256 != self._seal["commits"][block]:
            raise self._damaged(commit_key(block), "was changed after the store was sealed")
        return commit

    def _check_objects(self, chosen: Callable[[str], bool]) -> None:
        for key, digest in self._sealed_objects.items():
            if chosen(key):
                self._check(key, digest)

    @cached_property
    def _sealed_objects(self) -> dict[str, ObjectDigest]:
        objects = self._seal["objects"] if self._seal is not None else {}
        return {key: ObjectDigest(**digest) for key, digest in objects.items()}

    def _check(self, key: str, expected: ObjectDigest | None) -> None:
        """Compare one object with its recorded size and hash."""
        file = self._folder / key
        if expected is None:
            raise self._damaged(key, "is not part of its block's commit")
        if not file.is_file():
            raise self._damaged(key, "is missing")
        if (size := file.stat().st_size) != expected.size:
            raise self._damaged(key, f"has {size} bytes instead of {expected.size}")
        if digest_file(file).sha256 != expected.sha256:
            raise self._damaged(key, "has other contents than were committed")

    def _damaged(self, key: str, what: str) -> StoreError:
        mend = "restore it from a copy, or delete the store's folder and build again"
        if key.startswith("commits/") or "/c/" in key:
            mend = (
                "restore it from a copy, or delete it and run the same `kdcache build` again, which computes the rows "
                "of this block anew"
            )
        return StoreError(
            f"{self.path!r} is damaged: {key!r} {what}. Its numbers would be wrong targets, so nothing was read; {mend}"
        )


def read_transform(folder: Path, path: str) -> Transform:
    """The constants of a calibrated stream of the store in `folder`: what every run of its build codes with."""
    basis, mean, step = (read_constant(folder, f"{path}/{name}") for name in ("basis", "mean", "step"))
    return Transform(basis_DK=torch.from_numpy(basis), mean_D=torch.from_numpy(mean), step=float(step))


def request_names(request: TargetRequest) -> tuple[str, ...]:
    """The kinds of target in a request, as `--targets` names them."""
    wanted = {"logits": request.logits, "hidden": request.hidden_layers, "attention": request.attention_layers}
    return tuple(name for name, value in wanted.items() if value)


def _read_seal(folder: Path) -> dict[str, Any] | None:
    file = folder / SEAL
    if not file.exists():
        return None
    try:
        seal = cast("dict[str, Any]", json.loads(file.read_bytes()))
        return {"commits": list(seal["commits"]), "objects": dict(seal["objects"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{str(file)!r} is damaged ({error}): the store cannot be trusted; build it again") from error
