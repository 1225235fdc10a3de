"""`--dry-run` of a sweep: every run held against its cache, with all its flags, and what all of them would take.

What runs differ in and what does not change how long a step takes (seeds, learning rates) is measured once. Complete
students take nothing any more. Cost: a few steps for each kind of run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.display import StatusLine
from cli.sweep_file import PROG, SweepRun
from cli.sweep_summary import completed
from cli.train_flags import SweepFlags
from cli.train_plan import TrainPlan, measured, priced
from student_train.settings import TrainSettings
from teacher_cache.errors import DistillationError, SettingsError
from teacher_cache.profiles import read_profile
from teacher_cache.wording import format_bytes, format_duration

if TYPE_CHECKING:
    from student_train.train.dry_run import Estimate
    from teacher_cache.read.pool import CacheSource

_OF_NO_MATTER: Mapping[str, Any] = {
    "out": "", "seed": 0, "lr": 1.0, "warmup": 1.0, "weight_decay": 0.0, "clip": 1.0, "weights": None,
    "wandb": None, "resume": "never",
}  # fmt: skip
"""Settings that do not change what a step takes, with a value that they may have."""


@dataclass(frozen=True, kw_only=True)
class SweepTotal:
    """Of all runs that are still to be trained, one after the other; `memory_bytes` is what the largest needs."""

    runs: int
    seconds: float
    tokens: int
    memory_bytes: int
    disk_bytes: int
    read_objects: int
    price: float | None

    @classmethod
    def of(cls, plans: Sequence[TrainPlan]) -> SweepTotal:
        """The sum of these."""
        prices = [plan.price for plan in plans if plan.price is not None]
        return cls(
            runs=len(plans),
            seconds=sum(plan.seconds for plan in plans),
            tokens=sum(plan.estimate.tokens for plan in plans),
            memory_bytes=max((plan.estimate.memory_bytes for plan in plans), default=0),
            disk_bytes=sum(plan.estimate.disk_bytes for plan in plans),
            read_objects=sum(plan.estimate.read_objects for plan in plans),
            price=sum(prices) if prices else None,
        )


def plan_sweep(runs: Sequence[SweepRun], path: Path, flags: SweepFlags, *, launched: bool) -> int:
    """Say what these runs are and would take; returns the exit code. `launched`: the file has a launcher.

    Raises:
        SettingsError: one of them cannot be.
    """
    profile = None if flags.profile is None else read_profile(flags.profile)
    there = completed({run.name: run.settings for run in runs})
    left = [run for run in runs if run.name not in there]
    _check_against_caches(left, path)
    plans: dict[str, TrainPlan] = {}
    estimates: dict[TrainSettings, Estimate] = {}
    for run in left:
        # of the weights of queries, keys and values it matters which are 0: what they weigh is not computed
        related = ",".join("1" if weight else "0" for weight in run.settings.relation_weight_values())
        kind = replace(run.settings, **_OF_NO_MATTER, relation_weights=related)
        if run.settings.steps == 0:
            continue
        if kind not in estimates:
            StatusLine().note(f"measuring {run.name}")
            estimates[kind] = measured(run.settings, count_flops=profile is not None)
        plans[run.name] = priced(estimates[kind], profile, flags.price_per_hour)
    _show(runs, plans, as_json=runs[0].settings.json, launched=launched)
    return 0


def _check_against_caches(runs: Sequence[SweepRun], path: Path) -> None:
    """Refuse the first run that its cache, or this machine, rules out. Opens each cache once."""
    # imports torch, which a list of wrong flags need not wait for
    from student_train.train.prepare import check_run, open_cache

    readers: dict[tuple[str, ...], CacheSource] = {}
    for run in runs:
        cache = run.settings.cache
        try:
            if cache not in readers:
                readers[cache] = open_cache(run.settings)
            check_run(run.settings, readers[cache])
        except DistillationError as error:
            raise SettingsError(f"{str(path)!r}, run {run.name!r}: {error}") from error


def _show(runs: Sequence[SweepRun], plans: Mapping[str, TrainPlan], *, as_json: bool, launched: bool) -> None:
    listed = {run.name: [flag for flag in run.flags if flag not in ("--dry-run", "--json")] for run in runs}
    total = SweepTotal.of([*plans.values()])
    if as_json:
        described = [
            {
                "name": run.name,
                "differs": run.differs,
                "flags": listed[run.name],
                "plan": plans[run.name].to_json() if run.name in plans else None,
            }
            for run in runs
        ]
        print(json.dumps({"runs": described, "total": vars(total)}))
        return
    for name, flags in listed.items():
        print(f"{name}: {PROG} {shlex.join(flags)}")
    if not plans:
        return
    print()
    for name, plan in plans.items():
        print(f"{name}: {_in_short(SweepTotal.of([plan]))}")
    one = ", measured in one process, without the launcher" if launched else ""
    profile = next(iter(plans.values())).profile
    where = "here" if profile is None else profile.assumed
    print(f"all {total.runs}, one after the other: {_in_short(total)} ({where}{one})")


def _in_short(total: SweepTotal) -> str:
    price = "" if total.price is None else f", price {total.price:,.2f}"
    return (
        f"{format_duration(total.seconds)}, {total.tokens:,} tokens, {format_bytes(total.memory_bytes)} of memory, "
        f"{format_bytes(total.disk_bytes)} on disk, {total.read_objects:,} objects of caches read{price}"
    )
