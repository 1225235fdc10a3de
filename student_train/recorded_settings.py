"""The flags of `kdtrain` as a student's record holds them, read back.

The record may be of an older version, which knew fewer flags, or anybody's. The types are those of `TrainSettings`,
whose own checks follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, get_origin, get_type_hints

from pydantic import Field, create_model

from student_train.settings import LOWEST, TrainSettings
from teacher_cache.errors import SettingsError
from teacher_cache.fields import OpenFields, check_fields

_MOST = 2**63
FLAGS = frozenset(field.name for field in fields(TrainSettings))


def check_recorded(provenance: Mapping[str, Any]) -> None:
    """Refuse provenance whose `settings` have a flag of another type, or a number below its least.

    Flags may be missing, and others may be there.

    Raises:
        ValueError: there is one; the message names it.
    """
    check_fields(_PROVENANCE, provenance)


def as_today(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings in today's types: the first versions knew one store, and one layer of attention, by number."""
    found = dict(recorded)
    if isinstance(found.get("cache"), str):
        found["cache"] = [found["cache"]]
    _number_as_text(found, "attention_layer")
    return found


def checkpoint_identity(recorded: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What a checkpoint says its run was, in today's flags: those that it lacks are newer, and had their default."""
    found = {**TrainSettings(method=method).identity(), **recorded}
    _number_as_text(found, "--attention-layer")
    return found


def _number_as_text(found: dict[str, Any], name: str) -> None:
    if type(found.get(name)) is int:
        found[name] = str(found[name])


def recorded_identity(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` of the settings that a student's record holds. Flags that it lacks are newer, and had their default.

    The folders that `--student` and `--init` named may be gone by now, so these two are taken as they are.

    Raises:
        SettingsError: a value cannot be, a flag is unknown, or --method is lacking.
    """
    recorded = as_today(recorded)
    unknown = sorted(recorded.keys() - FLAGS)
    if unknown:
        raise SettingsError(f"{unknown[0]!r} is no flag of this version of kdtrain")
    if "method" not in recorded:
        raise SettingsError("the field 'method' is missing")
    try:
        check_fields(_SETTINGS, recorded)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    folders = {name: recorded[name] for name in ("student", "init") if name in recorded}
    settings = TrainSettings(**{name: value for name, value in recorded.items() if name not in folders})
    return {**settings.identity(), **{f"--{name}": value for name, value in folders.items()}}


def _field(name: str, hint: Any) -> Any:
    # a schema has attributes of its own that flags are called like
    if name in LOWEST:
        return Annotated[hint, Field(alias=name, ge=LOWEST[name], le=_MOST)]
    # JSON has lists where the settings have tuples
    return Annotated[hint, Field(alias=name, strict=False if get_origin(hint) is tuple else None)]


_SETTINGS: type[OpenFields] = create_model(
    "RecordedSettings",
    __base__=OpenFields,
    **{f"flag_{name}": (_field(name, hint), None) for name, hint in get_type_hints(TrainSettings).items()},  # type: ignore[call-overload]
)
_PROVENANCE: type[OpenFields] = create_model("RecordedProvenance", __base__=OpenFields, settings=(_SETTINGS, ...))
