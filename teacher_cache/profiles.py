"""How fast a device computes, as a file: what `benchmarks/device_profile.py` measured there, for plans made here.

    {"format": "kdcache-profile", "name": "some GPU", "device": "cuda", "dtype": "bfloat16",
     "forward_flops_per_second": 1.0e14, "training_flops_per_second": 0.8e14}

A plan counts the floating-point operations of what is asked for, by running a little of it here, and divides them by
these rates. That is an assumption: other shapes keep a device busy more or less than the measured ones, and reading,
packing and writing are taken to keep up. Kernels that are not PyTorch's own (Triton) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from teacher_cache.errors import SettingsError
from teacher_cache.fields import OpenFields, Text, check_fields
from teacher_cache.outside import parse_record

FORMAT = "kdcache-profile"
_MOST_BYTES = 2**20
Rate = Annotated[float, Field(gt=0, le=1e24)]


class ProfileSchema(OpenFields):
    """A profile's file: rates in floating-point operations a second, of a forward pass and of a training step."""

    format: Literal["kdcache-profile"]
    name: Text
    device: Literal["cpu", "cuda"]
    dtype: Text
    forward_flops_per_second: Rate
    training_flops_per_second: Rate


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What a profile's file says; `path` is where it lies."""

    path: str
    name: str
    device: str
    dtype: str
    forward_flops_per_second: float
    training_flops_per_second: float

    @property
    def assumed(self) -> str:
        """What a plan says of it."""
        return f"on {self.name} in {self.dtype}, by the rates in {self.path}"


def read_profile(path: str) -> DeviceProfile:
    """The profile in a file.

    Raises:
        SettingsError: it cannot be read, or is none.
    """
    try:
        with Path(path).open("rb") as file:
            fields = parse_record(file.read(_MOST_BYTES + 1), most_bytes=_MOST_BYTES)
        found = check_fields(ProfileSchema, fields)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--profile {path!r} is no profile of a device ({error}), so how long it takes there is not known; give a "
            "file that `python benchmarks/device_profile.py --out FILE` wrote on that device"
        ) from error
    rates: dict[str, Any] = found.model_dump(exclude={"format"})
    return DeviceProfile(path=path, **rates)
