"""`kdcache plan`: what a build would write and how long it would take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cli.display import BuildDisplay
from cli.entry import follows
from cli.options import parse
from teacher_cache.build.settings import BuildSettings
from teacher_cache.prices import check_price, price_of
from teacher_cache.wording import format_bytes, format_duration

if TYPE_CHECKING:
    from teacher_cache.build.plan import BuildPlan

STATES = {
    "new": "a new store",
    "unfinished": "what an unfinished store lacks",
    "extended": "targets added to a finished store",
    "complete": "complete already; nothing to do",
}


@dataclass(frozen=True, kw_only=True)
class PlanSettings(BuildSettings):
    """Say what `kdcache build` with the same flags would write and how long it would take; nothing is written."""

    price_per_hour: float | None = None
    """What an hour of one worker costs, in any currency, to say what the build would cost."""
    profile: str | None = None
    """File that benchmarks/device_profile.py wrote on another device, to say how long the teacher takes there."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_price(self.price_per_hour)


def plan(argv: list[str]) -> int:
    """`kdcache plan`; returns the exit code."""
    settings = parse(PlanSettings, argv, "kdcache plan")
    silent = settings.tensor_parallel and follows()
    progress = None if silent else BuildDisplay()
    from teacher_cache.profiles import read_profile  # pydantic, which --help does not need

    profile = None if settings.profile is None else read_profile(settings.profile)
    from transformers.utils import logging

    from teacher_cache.build.plan import plan_build
    from teacher_cache.build.workers import Workers

    logging.disable_progress_bar()
    workers = Workers.from_environment() if settings.tensor_parallel else None
    found = plan_build(settings, progress, workers, count_flops=profile is not None)
    if silent:
        return 0
    there = None if profile is None or found.flops is None else found.flops / profile.forward_flops_per_second
    price = price_of(found.seconds if there is None else there, settings.price_per_hour)
    if settings.json:
        priced = {"profile": None if profile is None else asdict(profile), "profile_seconds": there, "price": price}
        print(json.dumps({**found.to_json(), **priced}, indent=2))
        return 0
    for line in _lines(found):
        print(line)
    if profile is not None and there is not None:
        print(
            f"{'there':<14}about {format_duration(there)} {profile.assumed}: {found.flops:.2e} operations of the "
            "teacher and of coding, counted here; packing and writing are taken to keep up"
        )
    if price is not None and found.groups:
        print(f"{'price':<14}about {price:,.2f} at {settings.price_per_hour:g} an hour, for one worker")
    return 0


def _lines(plan: BuildPlan) -> Iterator[str]:
    manifest = plan.manifest
    yield f"{'store':<14}{plan.path}: {STATES[plan.state]}"
    yield (
        f"{'rows':<14}{manifest.rows} x {manifest.seq_len} tokens, {manifest.blocks} blocks of "
        f"{manifest.block_rows} rows"
    )
    if not plan.groups:
        return
    yield f"\n{'target':<16}{'bytes/token':>14}{'bytes':>12}"
    for group in plan.groups:
        if group.rows < manifest.rows:
            yield f"{group.group}: {group.rows} rows in {group.blocks} missing blocks"
        for name, size in group.bytes_per_target().items():
            if size or name in group.targets:
                per_token = f"{size / max(1, group.tokens):.2f}" if size else "shared"
                yield f"{name:<16}{per_token:>14}{format_bytes(size):>12}  {group.targets.get(name, '')}".rstrip()
    yield f"{'teacher etc.':<16}{'once':>14}{format_bytes(plan.other_bytes):>12}"
    rate = sum(group.total_bytes / max(1, group.tokens) for group in plan.groups)
    yield f"{'total':<16}{rate:>14.2f}{format_bytes(plan.total_bytes):>12}"
    yield f"\n{'free':<14}{_describe_room(plan)}"
    yield (
        f"{'objects':<14}{plan.total_objects:,}: as many requests to write them to a bucket; on a file system as many "
        f"files, in {plan.folders:,} folders"
    )
    yield f"{'memory':<14}{_describe_memory(plan)}"
    yield (
        f"{'time':<14}about {format_duration(plan.seconds)} on {plan.device} for {plan.tokens:,} tokens "
        f"({plan.tokens_per_second:.0f} tokens/s), one worker, without reading the corpus"
    )
    rough = ": few for this precision, sizes may be off by a tenth" if plan.rough else ""
    yield f"{'based on':<14}{plan.sample_rows} rows, tried in {format_duration(plan.sample_seconds)}{rough}"


def _describe_memory(plan: BuildPlan) -> str:
    gpu = "" if plan.gpu_memory_bytes is None else f", and {format_bytes(plan.gpu_memory_bytes)} of the GPU"
    return f"about {format_bytes(plan.memory_bytes)}{gpu}, for each worker"


def _describe_room(plan: BuildPlan) -> str:
    if plan.free_bytes is None:
        return "unknown or unlimited"
    return f"{format_bytes(plan.free_bytes)}: " + (
        "it fits" if plan.fits else "DOES NOT FIT; `kdcache build` will refuse without --force"
    )
