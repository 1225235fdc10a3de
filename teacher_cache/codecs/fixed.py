"""Vectors <-> coded arrays, with a declared error.

A codec turns the vectors of one block, [N, D] (N tokens, D components), into a few arrays whose last axis is the token,
and back. Component-major order, [D, N], puts equal statistics side by side: it is what makes the compressor behind it
effective, and the transposition is done here, on the tensor's own device, because the store must only move bytes.

The codecs here need nothing but the vectors; the calibrated one is in `nmse.py`.

`error_bound_ND` is the contract: no decoded component is further from the original than that. Values that a codec
cannot represent within its bound are an error; nothing saturates silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from teacher_cache.codecs.base import Coded, CodedArraySpec, VectorCodec, refuse_infinite
from teacher_cache.contract.targets import FIXED_PRECISIONS
from teacher_cache.errors import SettingsError, TeacherError

if TYPE_CHECKING:
    import torch


_GROUP = 32
"""Components of a token that share a scale in `int4`."""


class Float16Codec:
    """IEEE half precision: relative error 2^-11, absolute error 2^-25 among subnormal numbers."""

    name = "float16"

    def arrays(self, width: int) -> tuple[CodedArraySpec, ...]:
        """One array of float16 components."""
        return (CodedArraySpec(name="codes", dtype="float16", components=width),)

    def encode(self, values_ND: torch.Tensor) -> Coded:
        """Round to half precision.

        Raises:
            TeacherError: a value is not finite or beyond the largest half-precision number, 65504.
        """
        import torch

        codes_DN = values_ND.to(torch.float16).T.contiguous()
        if not bool(torch.isfinite(codes_DN).all()):
            refuse_infinite(values_ND)
            largest = float(values_ND.abs().max())
            raise TeacherError(
                f"the teacher gave a value that float16 cannot hold (largest magnitude {largest:g}, limit 65504): "
                "infinite targets would ruin training; use --precision int8, in another --out if blocks are written "
                "already"
            )
        return {"codes": codes_DN.cpu().numpy()}

    def decode(self, coded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Half precision to float32."""
        import torch

        return coded["codes"].T.contiguous().to(torch.float32)

    def error_bound_ND(self, values_ND: torch.Tensor) -> torch.Tensor:
        """Half a unit in the last place."""
        return (values_ND.abs() * 2.0**-11).clamp_min(2.0**-25)


class Int8Codec:
    """Signed bytes times one scale per token, the token's largest magnitude / 127: error at most half a step."""

    name = "int8"

    def arrays(self, width: int) -> tuple[CodedArraySpec, ...]:
        """Signed bytes, and a float32 scale per token."""
        return (
            CodedArraySpec(name="codes", dtype="int8", components=width),
            CodedArraySpec(name="scale", dtype="float32", components=None),
        )

    def encode(self, values_ND: torch.Tensor) -> Coded:
        """Round to the nearest of 255 levels.

        Raises:
            TeacherError: a value is not finite.
        """
        import torch

        values_ND = values_ND.to(torch.float32)
        scale_N = values_ND.abs().amax(dim=1) / 127
        refuse_infinite(scale_N)
        step_N = torch.where(scale_N > 0, scale_N, 1.0)
        # a scale among subnormal numbers is rounded so far that codes could pass 127, and turn their sign as bytes
        codes_DN = (values_ND / step_N[:, None]).round_().clamp_(-127, 127).to(torch.int8).T.contiguous()
        return {"codes": codes_DN.cpu().numpy(), "scale": scale_N.cpu().numpy()}

    def decode(self, coded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Codes times scale."""
        import torch

        # turned round while they are bytes: a quarter of what there is to move
        return coded["codes"].T.contiguous().to(torch.float32).mul_(coded["scale"][:, None])

    def error_bound_ND(self, values_ND: torch.Tensor) -> torch.Tensor:
        """Half a step, and the rounding of float32 arithmetic."""
        largest_N1 = values_ND.abs().amax(dim=1, keepdim=True)
        return (largest_N1 * (0.5 / 127 + 2.0**-22)).expand_as(values_ND)


class Int4Codec:
    """4-bit codes, -7 to 7, two to a byte, times a float16 scale per token and group of 32 components: half a step.

    The scale is the group's largest magnitude / 7, rounded so that no code is beyond 7. Byte i of a token holds
    components 2i and 2i + 1 in its low and high half, each as code + 8; the last of an odd width is in an array apart.
    """

    name = "int4"

    def arrays(self, width: int) -> tuple[CodedArraySpec, ...]:
        """Pairs of codes, a scale per group (the last one may be short), and the code that an odd width leaves over."""
        odd = (CodedArraySpec(name="last", dtype="int8", components=None),) if width % 2 else ()
        return (
            CodedArraySpec(name="codes", dtype="uint8", components=width // 2),
            CodedArraySpec(name="scale", dtype="float16", components=-(-width // _GROUP)),
            *odd,
        )

    def encode(self, values_ND: torch.Tensor) -> Coded:
        """Round to the nearest of 15 levels.

        Raises:
            TeacherError: a value is not finite, or so large that its scale is beyond float16.
        """
        import torch

        tokens, width = values_ND.shape
        values_NGg = torch.nn.functional.pad(values_ND.to(torch.float32), (0, -width % _GROUP)).view(tokens, -1, _GROUP)
        largest_NG = values_NGg.abs().amax(dim=2)
        refuse_infinite(largest_NG)
        scale_NG = _enclosing_scale(largest_NG)
        step_NG = torch.where(scale_NG > 0, scale_NG, 1.0).to(torch.float32)
        codes_ND = (values_NGg / step_NG[:, :, None]).round_().to(torch.int8).view(tokens, -1)[:, :width]
        codes_DN = codes_ND.T.contiguous()
        even = width - width % 2
        halves_DN = (codes_DN[:even] + 8).view(torch.uint8)
        coded = {
            "codes": (halves_DN[::2] | halves_DN[1::2] << 4).cpu().numpy(),
            "scale": scale_NG.T.contiguous().cpu().numpy(),
        }
        return coded | {"last": codes_DN[-1].cpu().numpy()} if width % 2 else coded

    def decode(self, coded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Codes times scale."""
        import torch

        pairs_CN = coded["codes"]
        halves_DN = torch.stack((pairs_CN & 15, pairs_CN >> 4), dim=1).flatten(0, 1)
        codes_DN = halves_DN.view(torch.int8) - 8
        if "last" in coded:
            codes_DN = torch.cat((codes_DN, coded["last"][None]))
        scale_DN = coded["scale"].to(torch.float32).repeat_interleave(_GROUP, dim=0)[: len(codes_DN)]
        return (codes_DN * scale_DN).T

    def error_bound_ND(self, values_ND: torch.Tensor) -> torch.Tensor:
        """Half a step of the group, the rounding of the scale to float16, and that of float32 arithmetic."""
        import torch

        width = values_ND.shape[1]
        groups = values_ND.abs().split(_GROUP, dim=1)
        largest_NG = torch.stack([group.amax(dim=1) for group in groups], dim=1)
        bound_NG = largest_NG * ((0.5 + 2.0**-12) / 7 + 2.0**-22) + 2.0**-25
        return bound_NG.repeat_interleave(_GROUP, dim=1)[:, :width]


def _enclosing_scale(largest: torch.Tensor) -> torch.Tensor:
    """The float16 nearest to largest / 7, or the next one where codes would round to 8: among subnormal numbers.

    Raises:
        TeacherError: a scale is beyond float16.
    """
    import torch

    scale = (largest / 7).to(torch.float16)
    if bool(torch.isinf(scale).any()):
        raise TeacherError(
            f"the teacher gave a value that int4 cannot hold (largest magnitude {float(largest.max()):g}, limit "
            f"{7 * 65504}): infinite targets would ruin training; use --precision int8"
        )
    too_small = largest >= 7.5 * scale.to(torch.float32)
    following = (scale.view(torch.int16) + 1).view(torch.float16)
    return torch.where(too_small & (largest > 0), following, scale)


def make_codec(precision: str) -> VectorCodec:
    """The codec of this name; `nmse` needs calibration and is in `nmse.py`.

    Raises:
        SettingsError: there is no such precision.
    """
    if precision == "float16":
        return Float16Codec()
    if precision == "int8":
        return Int8Codec()
    if precision == "int4":
        return Int4Codec()
    raise SettingsError(
        f"codec {precision!r} is unknown: targets could be neither written nor read; choose one of "
        + ", ".join(FIXED_PRECISIONS)
    )
