"""What `--student` says: the shape of a model, or the folder of one. Standard library only.

In: text. Out: an `AskedShape`, in which heads, feed-forward width and key/value heads may be left open until the
teacher is known, or a path. `students/shape.py` goes on from there with the teacher's configuration.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import SettingsError

_SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+)(?::(\d+)(?::(\d+))?)?)?")


@dataclass(frozen=True, kw_only=True)
class StudentShape:
    """Layers, hidden width, attention heads and feed-forward width of a model, and the heads of keys and values.

    `key_value_heads` is None where every head of queries has its own; where several share one, it says how many there
    are.
    """

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    key_value_heads: int | None = None

    def __str__(self) -> str:
        text = f"{self.layers}x{self.hidden_size}:{self.heads}:{self.intermediate_size}"
        return text if self.key_value_heads is None else f"{text}:{self.key_value_heads}"


@dataclass(frozen=True, kw_only=True)
class AskedShape:
    """A shape as it was asked for; None is what was left out."""

    text: str
    layers: int
    hidden_size: int
    heads: int | None = None
    intermediate_size: int | None = None
    key_value_heads: int | None = None

    def completed(
        self,
        *,
        teacher_heads: int | None = None,
        feed_forward_ratio: float = 4.0,
        teacher_key_value_heads: int | None = None,
        teacher_head_width: int | None = None,
    ) -> StudentShape:
        """The whole shape.

        Heads left out are as wide as the teacher's where `teacher_head_width` is given, or half as wide, where that
        divides the width; else they are the teacher's if they divide the width, else `default_heads`. A feed-forward
        width left out is `feed_forward_ratio` times the width. Heads share keys and values in the teacher's proportion,
        or as nearly as their number lets them, and all of them where all of the teacher's do.
        """
        width, heads, units = self.hidden_size, self.heads, self.intermediate_size
        if heads is None and teacher_head_width:
            alike = [each for each in (teacher_head_width, teacher_head_width // 2) if each and width % each == 0]
            heads = width // alike[0] if alike else None
        if heads is None:
            heads = teacher_heads if teacher_heads and width % teacher_heads == 0 else default_heads(width)
        if units is None:
            units = round(feed_forward_ratio * width)
        key_heads = self.key_value_heads
        if key_heads is None and teacher_heads and teacher_key_value_heads:
            sharing = heads if teacher_key_value_heads == 1 else teacher_heads // teacher_key_value_heads
            key_heads = heads // math.gcd(heads, sharing)
        return StudentShape(
            layers=self.layers,
            hidden_size=width,
            heads=heads,
            intermediate_size=units,
            key_value_heads=None if key_heads == heads else key_heads,
        )


def read_student(text: str | None) -> AskedShape | Path | None:
    """The shape or the folder that `--student` names; None for the teacher's default student.

    What reads as a shape is one, even if a folder is called like it.

    Raises:
        SettingsError: as `read_shape`, where there is no such folder either.
    """
    if text is None:
        return None
    folder = Path(text).expanduser()
    # an empty path would be the current folder
    return folder if text and not _SHAPE.fullmatch(text) and folder.is_dir() else read_shape(text)


def read_shape(text: str) -> AskedShape:
    """Read `LAYERSxWIDTH[:HEADS[:FEED_FORWARD[:KEY_VALUE_HEADS]]]`, such as `3x384` or `6x384:6:1024:2`.

    Raises:
        SettingsError: the text cannot be read, a number is 0, the heads do not divide the width, or the key/value heads
            do not divide the heads.
    """
    found = _SHAPE.fullmatch(text)
    if found is None or any(int(number) == 0 for number in found.groups() if number is not None):
        raise SettingsError(
            f"--student {text!r} is neither a shape nor a folder that exists: give layers x "
            "width[:heads[:feed-forward[:key/value heads]]], such as 3x384, 6x768:12:3072 or 6x384:6:1024:2, or the "
            "path of a Hugging Face model folder"
        )
    layers, width, heads, units, key_heads = (None if number is None else int(number) for number in found.groups())
    assert layers is not None
    assert width is not None
    if heads is not None and width % heads:
        raise SettingsError(
            f"--student {text!r}: {heads} attention heads do not divide the width {width}, every head must get the "
            f"same number of components; the nearest number of heads that does is {_nearest_divisor(width, heads)}"
        )
    if heads is not None and key_heads is not None and heads % key_heads:
        raise SettingsError(
            f"--student {text!r}: {key_heads} key/value heads do not divide the {heads} attention heads, every one of "
            f"them must be shared by the same number; {_nearest_divisors(heads, key_heads)} would do"
        )
    return AskedShape(
        text=text, layers=layers, hidden_size=width, heads=heads, intermediate_size=units, key_value_heads=key_heads
    )


def default_heads(width: int) -> int:
    """Heads of 64 components where the width allows, of 32 for narrow ones, else the nearest divisor below."""
    wanted = max(1, width // (64 if width >= 512 else 32))
    return next(heads for heads in range(wanted, 0, -1) if width % heads == 0)


def _nearest_divisor(width: int, heads: int) -> int:
    return min(_divisors(width), key=lambda n: abs(n - heads))


def _nearest_divisors(heads: int, key_heads: int) -> str:
    """The divisors of `heads` on both sides of `key_heads`, as words."""
    below = max(n for n in _divisors(heads) if n < key_heads)
    above = [n for n in _divisors(heads) if n > key_heads]
    return f"{below} or {min(above)}" if above else str(below)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
