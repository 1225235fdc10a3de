"""The flags of `kdeval latency`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teacher_cache.errors import SettingsError

BACKENDS = ("pytorch", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """Measure how long one forward pass of a student's encoder takes, and how much faster than its teacher's that is.

    Any Hugging Face encoder will do. Of a causal language model it is the time to the first token of an answer, and the
    tokens a second from there on: greedy, a fixed number of them, the keys and values before them kept. Student and
    teacher take turns run by run, so that whatever else the machine does hits both. Inputs are random token ids without
    padding; tokenizers, pooling layers and the heads of encoders are not part of what is timed.
    """

    student: str = "student"
    """Directory of the student: what kdtrain wrote, or any Hugging Face encoder or causal language model."""

    teacher: str | None = None
    """Directory or hub name of the model to compare with (default: none, and no speed-up)."""

    batch_sizes: str = "1,32"
    """Sequences per forward pass, or prompts that are answered together."""

    lengths: str | None = None
    """Tokens per sequence, or per prompt (default: those of 32,128,512 that the models can read)."""

    new_tokens: int | None = None
    """Tokens that a causal model generates after each prompt (default: 32)."""

    threads: str | None = None
    """Numbers of CPU threads (default: 1,2, or 1 where there is one core). On a GPU the host always has one."""

    runs: int = 100
    """Time each combination so many times at most."""

    seconds: float = 120.0
    """About how long to measure on each device, without loading and exporting: combinations get fewer runs, at least 3,
    to stay within it, and the largest are left out where even that does not fit."""

    backends: str | None = None
    """pytorch, onnxruntime or both joined by a comma (default: both on a CPU, where the packages of the extra 'onnx'
    are installed). ONNX Runtime computes in float32 on the CPU."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of PyTorch (auto: float32 on the CPU, bfloat16 on a GPU)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure (auto: on the CPU, and on the GPU too if there is one)."""

    onnx_out: str | None = None
    """Keep the exported student in this file (default: the export is a temporary file)."""

    json: bool = False
    """Print one JSON record on standard output instead of a table."""

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise SettingsError(f"--runs {self.runs!r} leaves nothing to measure: give 1 or more")
        if not 0 < self.seconds < math.inf:
            raise SettingsError(f"--seconds {self.seconds!r} is no time to measure in: give a positive number")
        if self.new_tokens is not None and self.new_tokens < 2:
            raise SettingsError(
                f"--new-tokens {self.new_tokens!r} leaves no token after the first one to time: give 2 or more"
            )
        self.chosen_batch_sizes()
        self.chosen_lengths()
        self._check_threads()
        chosen = self.chosen_backends()
        if chosen is not None and "onnxruntime" in chosen and self.device == "cuda":
            raise SettingsError(
                "--backends 'onnxruntime' with --device 'cuda': ONNX Runtime is measured on the CPU only; give "
                "--device cpu or auto, or --backends pytorch"
            )
        self._check_onnx_out(chosen)

    def _check_onnx_out(self, chosen: tuple[str, ...] | None) -> None:
        if self.onnx_out is None:
            return
        if self.device == "cuda" or (chosen is not None and "onnxruntime" not in chosen):
            raise SettingsError(
                f"--onnx-out {self.onnx_out!r}: nothing is exported where ONNX Runtime is not measured; leave "
                "--onnx-out out, or give --backends onnxruntime --device cpu"
            )
        if not Path(self.onnx_out).expanduser().parent.is_dir():
            raise SettingsError(
                f"--onnx-out {self.onnx_out!r} lies in no existing folder: the export could not be kept; make the "
                "folder, or give a file in another"
            )

    def _check_threads(self) -> None:
        cores = _cores()
        if self.threads is not None and max(self.chosen_threads()) > cores:
            raise SettingsError(
                f"--threads {self.threads!r}: this process may use {cores} cores; more threads would wait for each "
                f"other, and what is measured would be the waiting; give at most {cores}"
            )

    def chosen_batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes to measure, ascending."""
        return _numbers("batch-sizes", self.batch_sizes)

    def chosen_lengths(self) -> tuple[int, ...] | None:
        """The sequence lengths that were asked for, ascending; None if none were."""
        return None if self.lengths is None else _numbers("lengths", self.lengths)

    def chosen_threads(self) -> tuple[int, ...]:
        """The numbers of CPU threads, ascending."""
        if self.threads is None:
            return tuple(count for count in (1, 2) if count <= _cores())
        return _numbers("threads", self.threads)

    def chosen_backends(self) -> tuple[str, ...] | None:
        """The backends that were asked for; None if none were."""
        if self.backends is None:
            return None
        names = tuple(dict.fromkeys(part.strip() for part in self.backends.split(",")))
        if not set(names) <= set(BACKENDS):
            raise SettingsError(
                f"--backends {self.backends!r} cannot be used: give {', '.join(BACKENDS)}, or both with a comma between"
            )
        return names

    @property
    def needs_onnx(self) -> bool:
        """Whether ONNX Runtime was asked for, rather than welcome where it works."""
        return self.onnx_out is not None or "onnxruntime" in (self.chosen_backends() or ())


def _numbers(flag: str, value: str) -> tuple[int, ...]:
    try:
        numbers = sorted({int(part) for part in value.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise SettingsError(f"--{flag} {value!r} cannot be used: give positive whole numbers such as 1,32")
    return tuple(numbers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
