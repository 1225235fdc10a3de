"""The flags of `kdtrain`: those of a training, and those of sweeps and of dry runs, which say nothing of a student."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError
from teacher_cache.prices import check_price


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Of a sweep, which runs this process takes part in; of a dry run, what it is priced with."""

    only: tuple[str, ...] = ()
    """Of a sweep: these runs alone, by name or by number in the order of --dry-run, the first being 1."""

    wait: bool = True
    """Of a sweep: where only runs are left that other processes train, wait for them, and take over those whose
    processes are lost."""

    price_per_hour: float | None = None
    """With --dry-run: what an hour of one process costs, in any currency, to say what the training would cost."""

    profile: str | None = None
    """With --dry-run: what benchmarks/device_profile.py wrote on another device, to say how long it takes there."""

    def __post_init__(self) -> None:
        check_price(self.price_per_hour)


@dataclass(frozen=True, kw_only=True)
class TrainFlags(SweepFlags, TrainSettings):
    """Train a student from a teacher cache and write it as a Hugging Face directory."""

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        SweepFlags.__post_init__(self)

    def training(self) -> TrainSettings:
        """Those of the training alone.

        Raises:
            SettingsError: one is given that means something to sweeps alone, or to dry runs.
        """
        if self.only or not self.wait:
            flag = f"--only {' '.join(self.only)}" if self.only else "--no-wait"
            raise SettingsError(
                f"{flag} chooses among the runs of a sweep, and this is one training: leave it out, or give a --config "
                "file with `runs:` or `grid:` in it"
            )
        refuse_without_dry_run(self, dry_run=self.dry_run)
        return TrainSettings(**{field.name: getattr(self, field.name) for field in fields(TrainSettings)})


def refuse_without_dry_run(flags: SweepFlags, *, dry_run: bool) -> None:
    """Refuse what only a dry run reads.

    Raises:
        SettingsError: it was given to a training.
    """
    given = {"--price-per-hour": flags.price_per_hour, "--profile": flags.profile}
    wrong = next((flag for flag, value in given.items() if value is not None), None)
    if wrong is not None and not dry_run:
        raise SettingsError(f"{wrong} {given[wrong]!r} changes nothing in a training: add --dry-run, or leave it out")


def split_sweep_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are of `SweepFlags`, and all others."""
    finder = argparse.ArgumentParser(prog="kdtrain", add_help=False, allow_abbrev=False)
    finder.add_argument("--only", nargs="+", action="append", default=[])
    finder.add_argument("--wait", "--no-wait", dest="wait", action=_Written, nargs=0, default=[])
    finder.add_argument("--price-per-hour", "--price_per_hour", action="append", default=[])
    finder.add_argument("--profile", action="append", default=[])
    found, rest = finder.parse_known_args(list(argv))
    ours = [argument for group in found.only for argument in ("--only", *group)]
    ours += [*found.wait]
    ours += [f"--price-per-hour={value}" for value in found.price_per_hour]
    ours += [f"--profile={value}" for value in found.profile]
    return ours, rest


class _Written(argparse.Action):
    """Keeps a switch as it was written."""

    def __call__(self, _parser: object, namespace: argparse.Namespace, _values: object, option: object = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), option])
