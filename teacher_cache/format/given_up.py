"""Targets that a finished group has given up: its arrays and constants below some folders, which are deleted.

Its manifest, commits and list of commits stay as they were, so that whoever has opened the store goes on with what is
left. What is given up, since the group was built, stands in an object of its own, `given-up/<n>.json`, and counts from
the moment on at which the group's seal lists that: this one write takes the store from what it was to what it is. The
next time it is another object. Without a seal the one of the highest number counts. Readers take the manifest without
these targets.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.errors import StoreError
from teacher_cache.fields import check_fields
from teacher_cache.format.protocol import NOT_AN_OBJECT, ObjectDigest, Seal, read_checked, read_small, write_checked
from teacher_cache.format.schema import GivenUpSchema
from teacher_cache.storage.base import Storage

GIVEN_UP = "given-up"
MASKED, LOGITS = "masked", "logits"


@dataclass(frozen=True)
class GivenUp:
    """The folders that a group has given up, and the object that says so; neither where it has everything."""

    folders: frozenset[str] = frozenset()
    key: str | None = None


NOTHING = GivenUp()


def folders_of(targets: TargetSpecs) -> set[str]:
    """The folders below which these targets have their arrays and constants."""
    folders = {f"hidden/{layer}" for layer in targets.hidden_layers()}
    folders |= {f"attention/{layer}" for layer in targets.attention_layers()}
    return folders if targets.logits is None else folders | {LOGITS}


def without(manifest: Manifest, folders: Collection[str]) -> Manifest:
    """The manifest of a group that has given up the targets in these folders."""
    if not folders:
        return manifest
    targets = manifest.targets
    left = TargetSpecs(
        logits=None if LOGITS in folders else targets.logits,
        hidden=tuple(spec for spec in targets.hidden if f"hidden/{spec.layer}" not in folders),
        attention=tuple(spec for spec in targets.attention if f"attention/{spec.layer}" not in folders),
    )
    calibration = {path: found for path, found in manifest.calibration.items() if not is_below(path, folders)}
    return replace(manifest, targets=left, calibration=calibration)


def is_below(key: str, folders: Collection[str]) -> bool:
    """Whether a key, or the path of an array or stream, lies in one of these folders."""
    return any(key.startswith(f"{folder}/") for folder in folders)


def write_given_up(folders: Collection[str]) -> bytes:
    """The object that says so."""
    return write_checked({"folders": sorted(folders)})


def number_of(key: str, prefix: str) -> int:
    """The number of an object that says what the group at `prefix` has given up; 0 where it is none."""
    name = key.removeprefix(f"{prefix}{GIVEN_UP}/").removesuffix(".json")
    there = name.isascii() and name.isdecimal() and key == given_up_key(prefix, int(name))
    return int(name) if there else 0


def given_up_key(prefix: str, number: int) -> str:
    """Where the group at `prefix` says, for the n-th time, what it has given up."""
    return f"{prefix}{GIVEN_UP}/{number}.json"


def read_given_up(storage: Storage, prefix: str, seal: Seal | None) -> GivenUp:
    """What the group at `prefix` has given up.

    Raises:
        StoreError: its seal lists the object that says so, and that is missing or damaged.
    """
    # one that no seal lists: a command was killed before it counted
    there = storage.list(f"{prefix}{GIVEN_UP}/") if seal is None else seal.objects
    number = max((number_of(key, prefix) for key in there), default=0)
    if number == 0:
        return NOTHING
    key = given_up_key(prefix, number)
    try:
        data = read_small(storage, key)
        if seal is not None and ObjectDigest.of(data) != seal.objects[key]:
            raise ValueError("it has other contents than were sealed")
        fields = read_checked(data)
        check_fields(GivenUpSchema, fields)
        return GivenUp(frozenset(fields["folders"]), key)
    except (FileNotFoundError, *NOT_AN_OBJECT) as error:
        raise _unreadable(storage, key, error) from error


def _unreadable(storage: Storage, key: str, error: Exception) -> StoreError:
    return StoreError(
        f"{storage.location!r} is damaged: {key!r} cannot be read ({type(error).__name__}: {error}), so which of its "
        "targets were given up is not known; restore that file from a copy, or delete the store's folder and build "
        "again"
    )
