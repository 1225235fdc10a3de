"""The groups of a store: sets of targets that were built and sealed together, and what is committed of them.

The first group holds the rows and the targets of the first build. Targets that are added to a finished store make a
group of their own, an *extension*, with its own manifest, commits and seal below `extensions/<n>/`, so that adding them
touches nothing that is there. Arrays of all groups lie in one tree. A group without a seal is unfinished.

Extensions are found by listing, so that deleting the folder of one gives up its targets and nothing else; what a group
has given up in a finished store is left out of its manifest (`given_up.py`). A group may need what another one holds:
attention that is computed from a hidden state needs that state, and targets of masked views need the masks. Such a
group is read only together with a finished one that holds what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import HiddenSpec, TargetSpecs, describe_targets
from teacher_cache.errors import StoreError
from teacher_cache.format.arrays import ArraySpec, largest_shard
from teacher_cache.format.given_up import NOTHING, GivenUp, is_below, read_given_up, without
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    COMMITS,
    EXTENSIONS,
    METADATA,
    NOT_AN_OBJECT,
    SEAL,
    Commit,
    Seal,
    commit_hashes_size,
    commit_key,
    damage,
    parse_manifest,
    read_manifest,
    read_small,
    shard_key,
)
from teacher_cache.storage.base import Storage
from teacher_cache.threads import in_threads

_MASKS = "masked views"


@dataclass(frozen=True)
class Group:
    """A group as it is stored; `seal` is None while it is unfinished.

    `manifest` is what there is of it, `written` what was built, where it has given up some targets since.
    """

    prefix: str
    manifest: Manifest
    seal: Seal | None
    given_up: GivenUp = NOTHING
    written: Manifest | None = field(default=None, repr=False)

    @classmethod
    def of(cls, prefix: str, written: Manifest, seal: Seal | None, given_up: GivenUp) -> Group:
        """The group that was written with this manifest, and has given up some of its targets since."""
        left = without(written, given_up.folders)
        return cls(prefix=prefix, manifest=left, seal=seal, given_up=given_up, written=written)

    @property
    def built_as(self) -> Manifest:
        """The manifest that the group was built with."""
        return self.manifest if self.written is None else self.written

    def has_given_up(self, key: str) -> bool:
        """Whether a shard in a commit of this group belongs to what it has given up."""
        return is_below(key, self.given_up.folders)

    @cached_property
    def layout(self) -> StoreLayout:
        """What lies where."""
        return StoreLayout.of(self.manifest)

    @property
    def arrays(self) -> Mapping[str, ArraySpec]:
        """The arrays that are written block by block, by path."""
        return self.layout.arrays

    @property
    def name(self) -> str:
        """What a message calls it."""
        return name_group(self.prefix)

    @cached_property
    def holds(self) -> frozenset[str]:
        """What a group can be read with, in words: hidden states, and masked views."""
        masks = [] if "masked" in self.manifest.inputs_held else self._masks
        return frozenset([*_describe_hidden(self.manifest.targets.hidden), *masks])

    @cached_property
    def needs(self) -> frozenset[str]:
        """What it is read with and does not hold itself."""
        streams = [stream for read_from in self.layout.attention.values() for stream in read_from]
        lacking = [stream for stream in streams if stream not in self.layout.streams]
        inputs = [HiddenSpec(layer=stream.layer, codec=stream.codec, view=stream.view) for stream in lacking]
        return frozenset([*_describe_hidden(inputs), *self._masks]) - self.holds

    @property
    def _masks(self) -> list[str]:
        return [_MASKS] if "masked" in self.manifest.targets.views() else []

    @property
    def how_to_finish(self) -> str:
        """What to do about one that is unfinished."""
        commands = "`kdcache build` or `kdcache derive`" if self.manifest.imported is None else "`kdcache import`"
        return f"run the same {commands} again, which goes on where it stopped: {self.manifest.command}"


LOST_SEAL = (
    "its seal is missing though everything else of it is there; run the same `kdcache build`, `kdcache derive` or "
    "`kdcache import` again, which seals it"
)
"""What is to be said where `has_lost_seal`."""


def has_lost_seal(storage: Storage, group: Group) -> bool:
    """Whether a group without a seal has all commits and the list of them, which is written just before the seal.

    Either its seal was deleted, or the command that made it was killed just there; nothing tells one from the other.
    """
    if group.seal is not None or storage.size(group.prefix + COMMIT_HASHES) is None:
        return False
    there = storage.list(f"{group.prefix}{COMMITS}/")
    return all(group.prefix + commit_key(block) in there for block in range(group.manifest.blocks))


def _describe_hidden(specs: Iterable[HiddenSpec]) -> list[str]:
    described = describe_targets(TargetSpecs(hidden=tuple(specs)))
    return [f"{name} ({what})" for name, what in described.items()]


def name_group(prefix: str) -> str:
    """What a message calls the group whose protocol objects lie below `prefix`."""
    return f"extension {prefix.split('/')[1]}" if prefix else "the first build"


def extension_prefix(number: int) -> str:
    """Where the protocol objects of extension `number`, from 1, lie."""
    return f"{EXTENSIONS}/{number}/"


def read_groups(storage: Storage) -> list[Group]:
    """Every group of a store, finished or not, in the order in which they were added.

    An unfinished extension of which nothing says what it is (see `is_nameless`) is none.

    Raises:
        StoreError: there is no store of this format and version, or a seal is damaged.
    """
    groups = [_read_group(storage, "")]
    prefixes = map(extension_prefix, extension_numbers(storage.list(f"{EXTENSIONS}/")))
    return groups + [_read_group(storage, prefix) for prefix in prefixes if not is_nameless(storage, prefix)]


def extension_numbers(keys: Iterable[str]) -> list[int]:
    """The numbers of all extensions among the keys of a store, one that has lost its manifest or its seal included."""
    parts = [key.split("/") for key in keys if key.startswith(f"{EXTENSIONS}/")]
    there = {part[1] for part in parts if part[2:3] in ([METADATA], [SEAL], [COMMITS])}
    return sorted(int(number) for number in there if number.isdecimal() and str(int(number)) == number)


def is_nameless(storage: Storage, prefix: str) -> bool:
    """Whether this is an extension that was never finished, and whose manifest is damaged or lost."""
    if storage.size(prefix + SEAL) is not None:
        return False
    try:
        data = read_small(storage, prefix + METADATA)
    except (FileNotFoundError, ValueError):
        return True
    try:
        parse_manifest(data)
    except (StoreError, *NOT_AN_OBJECT):
        return True
    return False


def readable_groups(groups: Sequence[Group]) -> list[Group]:
    """Those of the groups that have everything that they need among them."""
    held = frozenset[str]().union(*(group.holds for group in groups))
    rest = [group for group in groups if group.needs <= held]
    return rest if len(rest) == len(groups) else readable_groups(rest)


def with_what_they_need(storage: Storage, groups: Sequence[Group], chosen: Iterable[Group]) -> list[Group]:
    """The chosen ones of all groups, and those that must be finished before these can be read.

    Raises:
        StoreError: no group holds what one of them needs.
    """
    finished = readable_groups([group for group in groups if group.seal is not None])
    found = list(chosen)
    for group in found:  # grows while it is walked through
        there = frozenset[str]().union(*(one.holds for one in (*finished, *found)))
        for need in sorted(group.needs - there):
            holder = next((one for one in groups if need in one.holds), None)
            if holder is None:
                raise StoreError(
                    f"{storage.location!r} has lost what {group.name} is read with, {need}: its targets are of no use; "
                    f"restore that from a copy, or delete {group.prefix!r} in the store to give up these targets, and "
                    "build what you need of them again"
                )
            if holder not in found:
                found.append(holder)
    return [group for group in groups if group in found]


def _read_group(storage: Storage, prefix: str) -> Group:
    written, seal = read_manifest(storage, prefix), read_seal(storage, prefix)
    group = Group.of(prefix, written, seal, read_given_up(storage, prefix, seal))
    if group.seal is not None and not counts_alike(group.seal, prefix, group.manifest):
        raise StoreError(
            f"{storage.location!r} is damaged: {prefix + SEAL!r} counts other rows or blocks than the manifest beside "
            "it, or lists commits of another number: one is of another store; restore both from a copy, or delete the "
            "store's folder and build again"
        )
    if group.seal is not None and group.layout.uncalibrated:
        raise StoreError(
            f"{storage.location!r} is damaged: the manifest of {group.name} does not say how "
            f"{group.layout.uncalibrated[0].path!r} was calibrated, so its codes mean nothing; restore it from a copy, "
            "or delete the store's folder and build again"
        )
    return group


def counts_alike(seal: Seal, prefix: str, manifest: Manifest) -> bool:
    """Whether the seal of a group is about as many rows and blocks as its manifest, and lists a commit for each.

    What this holds for takes memory for its blocks only where there is a list on the disk that is as long.
    """
    said = (seal.rows, seal.blocks, seal.format_version)
    listed = seal.objects.get(prefix + COMMIT_HASHES)
    counts = (manifest.rows, manifest.blocks, manifest.format_version)
    return said == counts and listed is not None and listed.size == commit_hashes_size(manifest.blocks)


def read_seal(storage: Storage, prefix: str) -> Seal | None:
    """The seal of a group, None where it is unfinished.

    Raises:
        StoreError: there is a seal, and it is damaged.
    """
    try:
        return Seal.from_bytes(read_small(storage, prefix + SEAL))
    except FileNotFoundError:
        return None
    except NOT_AN_OBJECT as error:
        raise StoreError(
            f"{storage.location!r} is damaged: {prefix + SEAL!r} cannot be read ({error!r}), so nothing in it can be "
            "trusted; restore that file from a copy, or delete it and run the same `kdcache build` again, which seals "
            "the store anew"
        ) from error


def committed_blocks(keys: Iterable[str], prefix: str, blocks: int) -> list[int]:
    """The blocks, of so many, that these keys have a commit of. The keys are looked at, not the blocks."""
    folder = f"{prefix}{COMMITS}/"
    names = [key.removeprefix(folder).removesuffix(".json") for key in keys if key.startswith(folder)]
    numbers = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
    return [block for block in numbers if block < blocks and prefix + commit_key(block) in keys]


def is_shard(key: str, arrays: Mapping[str, ArraySpec], blocks: int) -> bool:
    """Whether a key is that of one of so many blocks of one of these arrays."""
    path, _, place = key.partition("/c/")
    number = place.partition("/")[0]
    if path not in arrays or not (number.isascii() and number.isdecimal()):
        return False
    return int(number) < blocks and key == shard_key(arrays[path], int(number))


def read_commits(storage: Storage, group: Group) -> dict[int, Commit]:
    """Every commit of a group that can be read, by block."""
    blocks = committed_blocks(storage.list(f"{group.prefix}{COMMITS}/"), group.prefix, group.manifest.blocks)

    def read(block: int) -> Commit | None:
        try:
            return Commit.from_bytes(read_small(storage, group.prefix + commit_key(block)))
        except (FileNotFoundError, *NOT_AN_OBJECT):
            return None

    found = zip(blocks, in_threads(read, blocks), strict=True)
    return {block: commit for block, commit in found if commit is not None}


def mismatch(group: Group, block: int, commit: Commit) -> str | None:
    """What is wrong with a commit of a block, None if it says what the group's manifest implies."""
    if commit.block != block or commit.rows != group.manifest.block_range(block):
        return f"is about rows {commit.rows} of block {commit.block}"
    expected = {shard_key(spec, block) for spec in group.arrays.values()}
    lacking = sorted(expected - commit.shards.keys())
    foreign = sorted(key for key in commit.shards.keys() - expected if not group.has_given_up(key))
    if lacking or foreign:
        return f"lacks {lacking} and has {foreign}"
    for spec in group.arrays.values():
        size, most = commit.shards[shard_key(spec, block)].size, largest_shard(spec)
        if size > most:
            return f"says that {shard_key(spec, block)!r} has {size} bytes, where there can be {most} at most"
    return None


def damaged_objects(
    storage: Storage, group: Group, chosen: Callable[[str], bool] = lambda _key: True
) -> Iterator[tuple[str, str]]:
    """Keys of objects beside the blocks that are not what the group's seal says, and what is wrong with each."""
    for key, digest in (group.seal.objects if group.seal is not None else {}).items():
        if chosen(key) and (what := damage(storage, key, digest)) is not None:
            yield key, what


def whole_blocks(group: Group, commits: Mapping[int, Commit], sizes: Mapping[str, int]) -> set[int]:
    """Blocks that are finished: there is a commit, and every shard has the size that it says.

    `sizes` are those of all objects of the store. Contents are compared when they are read, or by `kdcache verify`; a
    look at sizes finds what was deleted or cut short.
    """
    whole = set()
    for block, commit in commits.items():
        held = {key: digest for key, digest in commit.shards.items() if not group.has_given_up(key)}
        sized = all(sizes.get(key) == digest.size for key, digest in held.items())
        if sized and mismatch(group, block, commit) is None:
            whole.add(block)
    return whole
