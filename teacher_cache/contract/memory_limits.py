"""What the weights of a large model may take of each device, as users write it."""

from __future__ import annotations

import re

from teacher_cache.errors import SettingsError

_LIMIT = re.compile(r"(?P<device>cpu|\d{1,4}):(?P<size>\d{1,6}(\.\d{1,6})?)(?P<unit>[kKMGT])(?P<binary>i?)B", re.ASCII)


def parse_max_memory(max_memory: str | None) -> dict[int | str, int]:
    """`0:70GB,cpu:200GB` -> bytes by device: GPUs by number, and "cpu". Nothing of None.

    Raises:
        SettingsError: it is not written so, or names a device twice.
    """
    found: dict[int | str, int] = {}
    for part in [] if max_memory is None else max_memory.split(","):
        match = _LIMIT.fullmatch(part.strip())
        name = None if match is None else "cpu" if match["device"] == "cpu" else int(match["device"])
        if match is None or name is None or name in found:
            why = "names a device twice" if match is not None else "is no device and size"
            raise SettingsError(
                f"--max-memory {max_memory!r}: {part.strip()!r} {why}, so that it is not known what weights "
                "may take there; write 0:70GB,cpu:200GB, with GPUs by number and kB, MB, GB, TB (powers of 1000) "
                "or KiB, MiB, GiB, TiB"
            )
        unit, binary = match["unit"], match["binary"]
        found[name] = int(float(match["size"]) * (1024 if binary else 1000) ** (1 + "kmgt".index(unit.lower())))
    return found


def check_placing(device: str, device_map: str | None, max_memory: str | None) -> None:
    """Refuse flags of these names that contradict each other, or would change nothing.

    Raises:
        SettingsError: they do, or limits are not written as they should be.
    """
    if max_memory is not None and device_map is None:
        raise SettingsError(
            f"--max-memory {max_memory!r} would limit nothing: without --device-map auto a teacher lies on "
            "one device whole; add it, or leave --max-memory out"
        )
    if device_map is not None:
        refuse_one_device(device, f"--device-map {device_map!r}")
    parse_max_memory(max_memory)


def refuse_one_device(device: str, others: str) -> None:
    """Refuse a single GPU where `others`, flags as they were given, ask for all devices.

    Raises:
        SettingsError: there is one.
    """
    if device not in ("auto", "cpu"):
        raise SettingsError(
            f"--device {device!r} and {others} contradict each other: one is a single "
            "device, the other all of them; leave one out, or hide other GPUs with CUDA_VISIBLE_DEVICES"
        )
