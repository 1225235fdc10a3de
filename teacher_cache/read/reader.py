"""A sealed store -> decoded targets by row range. What does not match its hashes is refused, never read.

Reading goes in two steps so that they can run in different threads and places: `load_block` reads, checks and
decompresses on the CPU (thread-safe, no torch); `decode` turns a range of its rows into float tensors on any device.
Every shard is compared with the commit's size and SHA-256 before zarr sees it, because zarr reads what is missing as
zeros. Opening costs one seal object and the hashes of small metadata files, whatever the number of rows; of targets
that were added later, the names of their commits are listed too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.nmse import Transform, fold_projections, projections_of_projected
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest, concatenate
from teacher_cache.contract.manifest import Manifest, merge_manifests, sha256_of_json
from teacher_cache.contract.targets import VIEWS, View, describe_targets
from teacher_cache.errors import StoreError, TargetsError
from teacher_cache.format.groups import (
    LOST_SEAL,
    Group,
    has_lost_seal,
    read_commits,
    read_groups,
    readable_groups,
    whole_blocks,
)
from teacher_cache.format.layout import StoreLayout, variance_constant
from teacher_cache.format.small_arrays import read_constant
from teacher_cache.format.transforms import read_projections, read_replay, read_transform
from teacher_cache.format.verified import VerifiedObjects
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.read.decode import CodedBlock, RowDecoder
from teacher_cache.read.load import BlockLoader
from teacher_cache.read.missing import check_request, check_rotated
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.local_cache import LocalCache


class CacheReader:
    """One store, for reading."""

    def __init__(
        self,
        storage: Storage,
        groups: Sequence[Group],
        left_out: Sequence[Group] = (),
        copies: LocalCache | None = None,
    ) -> None:
        """Read these groups; `left_out` are those of the store that are not to be read, for messages."""
        self.path = storage.location
        self.storage = storage
        self.manifest: Manifest = merge_manifests([group.manifest for group in groups])
        self.layout = StoreLayout.of(self.manifest)
        self.block_bounds = np.minimum(
            np.arange(self.manifest.blocks + 1, dtype=np.int64) * self.manifest.block_rows, self.manifest.rows
        )
        self._groups = groups
        self._left_out = left_out
        self._objects = VerifiedObjects(storage, groups, copies)
        self._loader = BlockLoader(self.layout, self._objects)
        self._projections: dict[tuple[int, str], AttentionProjections] = {}
        self._transforms: dict[tuple[str, str], Transform] = {}

    @classmethod
    def open(
        cls, location: str | Path, *, allow_unsealed: bool = False, copies: LocalCache | None = None
    ) -> CacheReader:
        """Open a store. Added targets that are not finished are left out, and those that cannot be read without them.

        Shards, commits and the lists of these are kept in `copies`, and read there instead of from the store.

        Raises:
            StoreError: there is no store, it is of another format version, unfinished, or its metadata was changed.
        """
        return cls.of(open_storage(location), allow_unsealed=allow_unsealed, copies=copies)

    @classmethod
    def of(
        cls,
        storage: Storage,
        *,
        allow_unsealed: bool = False,
        complete: Collection[str] = (),
        copies: LocalCache | None = None,
    ) -> CacheReader:
        """`open` for a storage that is at hand. `complete` are prefixes of groups that only lack their seal."""
        groups = read_groups(storage)
        finished = [group for group in groups if group.seal is not None or group.prefix in complete]
        if groups[0] not in finished and not allow_unsealed:
            raise _unfinished(storage, groups[0])
        chosen = groups if allow_unsealed else readable_groups(finished)
        if groups[0] not in chosen:
            raise _needs_what_is_not_there(storage, groups[0])
        reader = cls(storage, chosen, [group for group in groups if group not in chosen], copies)
        reader._objects.check_metadata()
        return reader

    @property
    def rows(self) -> int:
        """Number of rows in the store."""
        return self.manifest.rows

    @property
    def identity_sha256(self) -> str:
        """Hash of everything that makes this store what it is; equal for equal contents.

        Targets that were added later do not count, nor that some were given up: what was trained or measured before
        still belongs to this store.
        """
        return sha256_of_json(self._groups[0].built_as.identity())

    def require(self, request: TargetRequest) -> None:
        """Check that the store holds what is asked for.

        Raises:
            TargetsError: it does not; the message names what it has, and the flags that add the rest.
        """
        try:
            check_request(request, self.manifest, self.path)
        except TargetsError as error:
            raise TargetsError(f"{error}{''.join(map(self._why_left_out, self._left_out))}") from None
        check_rotated(request, self.rotation, self.path)

    def _why_left_out(self, group: Group) -> str:
        names = f"\n{group.name} ({', '.join(describe_targets(group.manifest.targets))}) is left out: "
        if has_lost_seal(self.storage, group):
            return f"{names}{LOST_SEAL}: {group.manifest.command}"
        if group.seal is None:
            return f"{names}it is unfinished; {group.how_to_finish}"
        return f"{names}it needs {', '.join(sorted(group.needs))}, which is not finished"

    def views_for(self, request: TargetRequest) -> tuple[View, ...]:
        """The views that hold the targets asked for; the store's first view if none are."""
        targets = self.manifest.targets
        used: set[View] = {spec.view for spec in targets.hidden if spec.layer in request.hidden_layers}
        used |= {spec.view for spec in targets.attention if spec.layer in request.attention_layers}
        if request.logits and targets.logits is not None:
            used.add(targets.logits.view)
        if request.masked:
            used.add("masked")
        if request.next_tokens:
            used.add("plain")
        return tuple(view for view in VIEWS if view in used) or targets.views()[:1]

    def hidden_variance(self, layer: int) -> float:
        """E||h - mean||^2 of hidden state `layer`, summed over components: what HS losses are normalised by."""
        return float(read_constant(self.storage, *variance_constant(layer)))

    def teacher_folder(self) -> Path:
        """A Hugging Face folder with the teacher's configuration, weights and tokenizer, as it was written.

        Raises:
            StoreError: one of its files is missing or damaged.
        """
        return self._objects.teacher_folder()

    def load_block(
        self, block: int, request: TargetRequest, view: View, masked_view: int = 0, threads: Executor | None = None
    ) -> CodedBlock:
        """Read, check and decompress what `request` needs of one block in one view, arrays side by side in `threads`.

        Thread-safe.

        Raises:
            StoreError: a shard is missing or not what was committed.
        """
        return self._loader.load(block, request, view, masked_view, threads)

    def load_array(self, path: str, block: int) -> NDArray[Any]:
        """A block of one array: read, checked and decompressed. Thread-safe.

        Raises:
            StoreError: the shard is missing or not what was committed.
        """
        return self._loader.load_array(path, block)

    def load_beside(self, folder: str, block: int) -> list[dict[str, NDArray[Any]]]:
        """Escapes or sinks of a block (`hidden/4/escapes`): of each view the entries that it has, by name. Thread-safe.

        Raises:
            StoreError: a shard is missing, not what was committed, or holds numbers that cannot be.
        """
        return self._loader.load_beside(folder, block)

    def load_distinct(self, block: int) -> NDArray[Any]:
        """How many different ids were drawn at each place of a block. Thread-safe.

        Raises:
            StoreError: the shard is missing, not what was committed, or says more than were drawn.
        """
        return self._loader.load_distinct(block)

    def shards_read(self, request: TargetRequest) -> tuple[int, int]:
        """Objects that one pass over all rows reads for a request, and their bytes.

        Raises:
            StoreError: the seal does not say how large an array is.
        """
        sizes: dict[str, int] = {}
        for group in self._groups:
            sizes |= {} if group.seal is None else group.seal.bytes_per_array
        paths = [path for view in self.views_for(request) for path in self._loader.paths(request, view)]
        for path in paths:
            if path not in sizes:
                raise StoreError(
                    f"{self.path!r} is damaged: no seal says how large {path!r} is, which every build writes there; "
                    "restore seal.json from a copy, or build the store again"
                )
        return len(paths) * self.manifest.blocks, sum(sizes[path] for path in paths)

    def read_shard(self, path: str, block: int) -> bytes:
        """The shard of one array and block as it was committed. Thread-safe.

        Raises:
            StoreError: it is missing or not what was committed.
        """
        return self._objects.shard(path, block)

    def decode(self, coded: CodedBlock, start: int, stop: int, device: str | torch.device = "cpu") -> TargetBatch:
        """Rows start..stop of a block, counted from its first row, as tensors on `device`."""

        def projections(layer: int) -> AttentionProjections:
            return self._projections_on(layer, device)

        def transforms(path: str) -> Transform:
            return self._transform_on(path, device)

        decoder = RowDecoder(
            self.layout,
            coded,
            start,
            stop,
            device=device,
            projections=projections,
            transforms=transforms,
        )
        return decoder.decode()

    def rotation(self, layer: int) -> Transform | None:
        """What takes rotated coordinates of hidden state `layer` back (`synthesise`); None if it is coded as it is."""
        path = f"hidden/{layer}"
        return self._transform_on(path, "cpu") if path in self.manifest.calibration else None

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

    def _projections_on(self, layer: int, device: str | torch.device) -> AttentionProjections:
        """What takes the stored input of an attention layer to its q, k, v; read and combined once per device."""
        key = (layer, str(device))
        if key not in self._projections:
            stream = self.layout.attention_input(layer)
            assert stream is not None
            if stream.projected:
                assert stream.made_widths is not None
                replay = read_replay(self.storage, self.manifest, layer)
                found = projections_of_projected(self._transform_on(stream.path, "cpu"), stream.made_widths, replay)
            else:
                found = read_projections(self.storage, self.manifest, layer)
                if stream.calibration is not None:
                    found = fold_projections(self._transform_on(stream.path, "cpu"), found)
            self._projections[key] = found.to(device)
        return self._projections[key]

    def _transform_on(self, path: str, device: str | torch.device) -> Transform:
        """The constants of a calibrated stream, read once per device."""
        key = (path, str(device))
        if key not in self._transforms:
            self._transforms[key] = read_transform(self.storage, self.layout.stream(path)).to(device)
        return self._transforms[key]


def _unfinished(storage: Storage, group: Group) -> StoreError:
    done = len(whole_blocks(group, read_commits(storage, group), storage.list()))
    if done == group.manifest.blocks and has_lost_seal(storage, group):
        return StoreError(
            f"{storage.location!r} is unfinished: without its seal nothing says that it is whole. For {group.name}, "
            f"{LOST_SEAL}: {group.manifest.command}"
        )
    return StoreError(
        f"{storage.location!r} is unfinished ({done} of {group.manifest.blocks} blocks): what is missing would be read "
        f"as zeros; {group.how_to_finish}"
    )


def _needs_what_is_not_there(storage: Storage, group: Group) -> StoreError:
    return StoreError(
        f"{storage.location!r} is damaged: {group.name} is read with {', '.join(sorted(group.needs))}, which no "
        "finished part of the store holds, so nothing of it can be decoded; restore it from a copy, or build it again"
    )
