"""The flags of `kdeval fidelity`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teacher_cache.contract.memory_limits import check_placing
from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class FidelitySettings:
    """Measure how close a student comes to the teacher on rows of a cache that it was not trained on."""

    student: str = "student"
    """Directory of the student: what kdtrain wrote, or any Hugging Face encoder with the teacher's vocabulary."""

    cache: tuple[str, ...] = ("cache.zarr",)
    """Store that `kdcache build` wrote, or several to read as one: paths, or a pattern in quotes such as
    'parts/*.zarr'."""

    rows: int | None = None
    """Measure on so many of the held-out rows instead of all of them."""

    exact: bool = False
    """Run the teacher that the cache keeps on the same rows, and compare with its whole distribution instead of what is
    kept of it. Takes its forward pass, and its memory.
    """

    batch_size: int = 16
    """Rows per forward pass."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the student runs."""

    device_map: Literal["auto"] | None = None
    """With --exact, auto: spread a teacher that is larger than one device over all GPUs, the CPU's memory and the disk
    (GPUs are left out with --device cpu), as `kdcache build` does.
    """

    max_memory: str | None = None
    """With --device-map: what the teacher's weights may take of each device, such as 0:70GB,cpu:200GB. Default: nine
    tenths of what is free.
    """

    json: bool = False
    """Print one JSON record on standard output instead of a table."""

    def __post_init__(self) -> None:
        # the device is the student's, and may be one of those that the teacher is spread over
        check_placing("auto", self.device_map, self.max_memory)
        if self.device_map is not None and not self.exact:
            raise SettingsError("--device-map does nothing without --exact: only then a teacher is run; leave it out")
        if self.batch_size < 1:
            raise SettingsError(f"--batch-size {self.batch_size!r} leaves nothing to compute: give 1 or more")
        if self.rows is not None and self.rows < 1:
            raise SettingsError(f"--rows {self.rows!r} leaves nothing to measure on: give 1 or more")
