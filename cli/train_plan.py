"""What a training would take, in words and with a price: as measured here, or by another device's profile."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli.display import is_quiet
from cli.train_flags import SweepFlags
from student_train.settings import TrainSettings
from teacher_cache.prices import price_of
from teacher_cache.profiles import DeviceProfile, read_profile
from teacher_cache.wording import format_bytes, format_duration

if TYPE_CHECKING:
    from student_train.train.dry_run import Estimate


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One training. `seconds` are those here, or on the profile's device where there is one."""

    estimate: Estimate
    profile: DeviceProfile | None
    seconds: float
    price: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        found = {**self.estimate.to_json(), "disk_bytes": self.estimate.disk_bytes, "price": self.price}
        if self.profile is not None:
            found |= {"profile": self.profile.path, "profile_seconds": self.seconds}
        return found


def plan_of(settings: TrainSettings, flags: SweepFlags) -> TrainPlan:
    """Measure a training's first steps, and price it as the flags say.

    Raises:
        DistillationError: the training could not be, or the profile cannot be read.
    """
    profile = None if flags.profile is None else read_profile(flags.profile)
    found = measured(settings, count_flops=profile is not None)
    return priced(found, profile, flags.price_per_hour, processes=int(os.environ.get("WORLD_SIZE", "1")))


def measured(settings: TrainSettings, *, count_flops: bool) -> Estimate:
    """The measurements alone, see `student_train.train.dry_run`."""
    from student_train.train.dry_run import dry_run

    return dry_run(settings, quiet=is_quiet(), count_flops=count_flops)


def priced(
    estimate: Estimate, profile: DeviceProfile | None, price_per_hour: float | None, processes: int = 1
) -> TrainPlan:
    """The plan of a training that has been measured, in so many processes."""
    seconds = estimate.training_seconds
    if profile is not None:
        seconds = estimate.seconds_at(profile.training_flops_per_second)
    return TrainPlan(
        estimate=estimate, profile=profile, seconds=seconds, price=price_of(seconds, price_per_hour, processes)
    )


def describe_plan(plan: TrainPlan) -> str:
    """One sentence."""
    found = plan.estimate
    text = (
        f"{found.steps:,} steps would take {format_duration(found.training_seconds)} ({found.step_seconds:.3g} s a "
        f"step, {found.tokens_per_second:,.0f} tok/s, {found.wait_share:.1%} of it waiting for the cache) for "
        f"{found.tokens:,} tokens, {format_bytes(found.memory_bytes)} of memory, {format_bytes(found.disk_bytes)} on "
        f"disk ({format_bytes(found.checkpoint_bytes)} for checkpoints); each process would read "
        f"{found.read_objects:,} objects of the cache ({format_bytes(found.read_bytes)}); "
        f"{found.trained_parameters:,} parameters would be trained"
    )
    if plan.profile is not None:
        text += f"; about {format_duration(plan.seconds)} {plan.profile.assumed}, where the cache is taken to keep up"
    return text if plan.price is None else f"{text}; about {plan.price:,.2f} in money"
