"""What a user may ask of `kdcache drop`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

import re
from dataclasses import dataclass

from teacher_cache.contract.targets import TARGETS
from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

_TARGET = re.compile(r"(?P<kind>[a-z]+)(:(?P<layer>\d{1,6}))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class DropSettings:
    """Give up targets of a finished store, and free what they take: the rest stays as it is, and can be read on."""

    targets: tuple[str, ...] = ()
    """What to give up: logits, hidden (all of them), hidden:2, attention, attention:5; several may be given."""
    extension: int | None = None
    """Give up all targets of extension N, as `kdcache info` numbers them."""
    dry_run: bool = False
    """Say what would be freed, and change nothing."""

    def __post_init__(self) -> None:
        if self.targets and self.extension is not None:
            raise SettingsError(
                f"--targets {' '.join(self.targets)} and --extension {self.extension} both say what is to be given up: "
                "leave one out"
            )
        if not self.targets and self.extension is None:
            raise SettingsError(
                "nothing says what is to be given up: give --targets or --extension; `kdcache info` lists both"
            )
        if self.extension is not None and self.extension < 1:
            raise SettingsError(
                f"--extension {self.extension!r} does not exist: extensions count from 1, and what the first build "
                "holds is named with --targets"
            )
        self.wanted()

    def wanted(self) -> tuple[tuple[str, int | None], ...]:
        """Each target that is named: its kind, and its layer where one is named.

        Raises:
            SettingsError: there is no such target.
        """
        return tuple(_read(name.strip()) for text in self.targets for name in text.split(","))


def _read(name: str) -> tuple[str, int | None]:
    match = _TARGET.fullmatch(name)
    kind = "" if match is None else match["kind"]
    if match is None or kind not in TARGETS or (kind == "logits" and match["layer"]):
        raise SettingsError(
            f"--targets {name!r} names no target: {did_you_mean(kind or name, TARGETS)} logits, hidden, hidden:LAYER, "
            "attention or attention:LAYER"
        )
    return kind, None if match["layer"] is None else int(match["layer"])
