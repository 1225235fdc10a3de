"""Methods and mappings that other packages add: what is registered under which name, and which package it comes from.

A module adds one with a decorator, `student_train.register_method` or `student_train.register_mapping`. That is enough
where the module has been imported, as in a script or a notebook. Commands import nobody's module of their own accord:
for them a package names the module in an entry point of the group `kdcache.methods` or `kdcache.mappings`, under the
name that the decorator gives:

    [project.entry-points."kdcache.methods"]
    mine = "my_package.my_module"

The module is imported when the name is first asked for and is none of ours. Standard library only: nothing is imported
for names that are known, and asking for an unknown one reads the metadata of the installed packages (some
milliseconds).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from typing import Any

from teacher_cache.errors import DistillationError, SettingsError

_NAME = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Something that was registered. `reads_logits` says of a method whether it needs the student's head."""

    name: str
    make: Callable[..., Any]
    reads_logits: bool = False

    @property
    def place(self) -> str:
        """The module and the name of what was registered, such as `my_package.my_module.Mine`."""
        return f"{self.make.__module__}.{getattr(self.make, '__qualname__', repr(self.make))}"


class Registry:
    """What is added of one kind, `method` or `mapping`, by name."""

    def __init__(self, kind: str, group: str) -> None:
        self._kind = kind
        self._group = group
        self._added: dict[str, Addition] = {}

    def add(self, addition: Addition, taken: Collection[str]) -> None:
        """Register it. What is defined again in the same place, as by a cell of a notebook, takes its own place.

        Raises:
            SettingsError: the name is in `taken`, is registered already, or cannot be written in a flag.
        """
        name, earlier = addition.name, self._added.get(addition.name)
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"a {self._kind} cannot be called {name!r} ({addition.place}): --{self._kind} takes sums of names; "
                "give it a name of letters, digits, - and _ that begins with a letter"
            )
        if name in taken or (earlier is not None and earlier.place != addition.place):
            owner = "this package" if earlier is None else earlier.place
            raise SettingsError(
                f"{addition.place} cannot be registered as {self._kind} {name!r}, a name that belongs to {owner} "
                f"already: --{self._kind} {name} would mean two things; choose another name"
            )
        self._added[name] = addition

    def find(self, name: str) -> Addition | None:
        """What is registered under a name, by a module that an entry point names if need be; None if nothing is.

        Raises:
            SettingsError: several packages have it, or the one that has it cannot be imported or does not register it.
        """
        announced = self._entry_points(name) if name not in self._added else []
        if len(announced) > 1:
            raise SettingsError(
                f"--{self._kind} {name!r} comes from {' and from '.join(map(_package_of, announced))}: which of them "
                "is meant cannot be told; uninstall all but one"
            )
        for entry in announced:
            self._load(entry)
        return self._added.get(name)

    def names(self) -> tuple[str, ...]:
        """Every name that is registered or that an installed package announces, sorted. Imports none of them."""
        return tuple(sorted({*self._added, *(entry.name for entry in entry_points(group=self._group))}))

    def origin(self, name: str) -> dict[str, str | None]:
        """Where something registered comes from: `module`, `package` and `version`, the last two None if not known."""
        addition = self._added[name]
        module: str = addition.make.__module__
        for entry in self._entry_points(name):
            if entry.dist is not None:
                return {"module": module, "package": entry.dist.name, "version": entry.dist.version}
        top = module.partition(".")[0]
        for package in packages_distributions().get(top, ()):
            return {"module": module, "package": package, "version": version(package)}
        own_version = getattr(sys.modules.get(top), "__version__", None)
        return {"module": module, "package": None, "version": None if own_version is None else str(own_version)}

    def _entry_points(self, name: str) -> list[EntryPoint]:
        return list(entry_points(group=self._group, name=name))

    def _load(self, entry: EntryPoint) -> None:
        source = f"--{self._kind} {entry.name!r} comes from {_package_of(entry)}"
        try:
            entry.load()
        except DistillationError as error:
            raise SettingsError(f"{source}, which cannot be used: {error}") from error
        except Exception as error:  # whatever a stranger's module may raise
            raise SettingsError(
                f"{source}, which cannot be imported ({type(error).__name__}: {error}): there is nothing to train "
                "with; mend that package, or uninstall it"
            ) from error
        if entry.name not in self._added:
            raise SettingsError(
                f"{source}, which registers no {self._kind} of that name when it is imported: there is nothing to "
                f"train with; in that module, put @student_train.register_{self._kind}({entry.name!r}) before it"
            )


def _package_of(entry: EntryPoint) -> str:
    package = "an unnamed package" if entry.dist is None else f"the package {entry.dist.name} {entry.dist.version}"
    return f"{package} ({entry.value})"


ADDED_METHODS = Registry("method", "kdcache.methods")
ADDED_MAPPINGS = Registry("mapping", "kdcache.mappings")
