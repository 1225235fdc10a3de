"""`kdcache`: build a cache of teacher outputs, and look at one.

Standard output carries results, standard error carries progress. Modules that need torch are imported by the command
that uses them, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import tyro

from cli.main_guard import run_command
from cli.options import choose_command, parse
from teacher_cache.settings import BuildSettings
from teacher_cache.specs import describe_targets

if TYPE_CHECKING:
    from teacher_cache.info import StoreInfo

TERMINATED = 143
COMMANDS = {
    "build": "run the teacher once over a corpus and write what students learn from",
    "info": "say what is in a cache: targets, sizes, bytes per token, missing blocks",
}


@dataclass(frozen=True, kw_only=True)
class InfoSettings:
    """Say what is in a cache: targets, sizes, bytes per token, missing blocks."""

    cache: tyro.conf.Positional[str] = "cache.zarr"
    """Folder of the store."""
    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return run_command(_main, "kdcache", argv)


def _main(argv: list[str]) -> int:
    command, rest = choose_command(argv, COMMANDS, "kdcache")
    return {"build": _build, "info": _info}[command](rest)


def _build(argv: list[str]) -> int:
    settings = parse(BuildSettings, argv, "kdcache build")
    before = signal.signal(signal.SIGTERM, _stop)
    progress = BuildDisplay()
    from transformers.utils import logging

    from teacher_cache.build import build_cache
    from teacher_cache.workers import Workers

    logging.disable_progress_bar()
    try:
        workers = Workers.from_environment()
        report = build_cache(settings, progress if workers.first else None, workers)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not workers.first:
        return 0
    rate = report.computed_rows / report.seconds if report.seconds else 0.0
    print(
        f"{report.path}: {report.rows} rows, complete. Computed {report.computed_rows} rows in {report.seconds:.1f} s "
        f"({rate:.1f} rows/s), wrote {format_bytes(report.written_bytes)}"
    )
    return 0


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM: leave the build loop; blocks in the writer's hands are finished, all others start anew next time."""
    print("kdcache build: stopped; committed blocks are safe, run the same command to continue", file=sys.stderr)
    raise SystemExit(TERMINATED)


class BuildDisplay:
    """Progress of a build on standard error: a line that renews itself on a terminal, a line now and then elsewhere."""

    seconds_between_lines = 10.0

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_rows: int | None = None
        self.last_line = 0.0
        self.live = sys.stderr.isatty()
        self.note("loading the teacher")

    def note(self, text: str) -> None:
        """Print a line."""
        print(("\r\033[K" if self.live else "") + text, file=sys.stderr, flush=True)

    def tokenised(self, documents: int, tokens: int) -> None:
        """Show how much of the corpus has been read."""
        self._show(f"reading the corpus: {documents} documents, {tokens} tokens")

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        """Show rows, rate and remaining time."""
        now = time.monotonic()
        if self.first_rows is None:
            self.first_rows, self.started = rows, now
        seconds = now - self.started
        rate = (rows - self.first_rows) / seconds if seconds > 0 else 0.0
        left = f"{(total - rows) / rate:.0f} s left" if rate else "estimating"
        share = f"{rows}/{total} rows ({100 * rows / total:.0f}%)"
        self._show(f"{share}, {rate:.1f} rows/s, {format_bytes(written_bytes)} written, {left}", last=rows == total)

    def _show(self, text: str, *, last: bool = False) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.monotonic() - self.last_line >= self.seconds_between_lines:
            self.last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def _info(argv: list[str]) -> int:
    settings = parse(InfoSettings, argv, "kdcache info")
    from teacher_cache.info import describe_store

    info = describe_store(settings.cache)
    if settings.json:
        print(json.dumps(info.to_json(), indent=2))
    else:
        _print_info(info)
    return 0


def _print_info(info: StoreInfo) -> None:
    manifest = info.manifest
    teacher = manifest.teacher
    state = "complete" if info.sealed else "UNFINISHED: run the same `kdcache build` again to complete it"
    rows = [
        ("store", f"{info.path} (format {manifest.format_version}), {state}"),
        (
            "teacher",
            (
                f"{teacher.name}: {teacher.model_type}, {teacher.layers} layers x {teacher.hidden_size}, "
                f"{teacher.heads} heads, {teacher.vocab_size} ids, weights {teacher.weights_sha256[:12]}"
            ),
        ),
        (
            "corpus",
            (
                f"{' '.join(manifest.corpus.specs)}: {manifest.corpus.documents} documents, {manifest.corpus.tokens} "
                f"tokens, {manifest.corpus.rows} rows"
            ),
        ),
        ("rows", f"{manifest.rows} x {manifest.seq_len} tokens, {manifest.row_mode}, seed {manifest.seed}"),
        ("views", f"{', '.join(manifest.targets.views())}" + (f" x {manifest.views}" if manifest.views > 1 else "")),
        ("blocks", f"{manifest.blocks} of {manifest.block_rows} rows each"),
        *describe_targets(manifest.targets).items(),
        ("built", f"{manifest.created} by: {manifest.command}"),
    ]
    for name, value in rows:
        print(f"{name:<14}{value}")
    for group in info.groups:
        if not group.sealed or group.missing_blocks:
            missing = f"blocks {_ranges(group.missing_blocks)}" if group.missing_blocks else "only its seal"
            print(f"{'missing':<14}{missing} of {group.name} ({', '.join(group.targets)})")
    print(f"\n{'stream':<28}{'bits/value':>14}{'NMSE':>14}")
    for path, bits in info.bits_per_value().items():
        calibration = manifest.calibration.get(path)
        error = f"{calibration.nmse:.3g}" if calibration else "-"
        print(f"{path:<28}{bits:>14.3f}{error:>14}")
    print(f"\n{'array':<28}{'bytes':>14}{'bytes/token':>14}")
    for array, size in info.bytes_per_array.items():
        print(f"{array:<28}{size:>14,}{info.bytes_per_token(array):>14.2f}")
    print(f"{'teacher, metadata, commits':<28}{info.other_bytes:>14,}{'once':>14}")
    per_token = sum(info.bytes_per_array.values()) / max(1, info.committed_tokens)
    print(f"{'total':<28}{info.total_bytes:>14,}{per_token:>14.2f}")


def _ranges(numbers: Sequence[int]) -> str:
    """`3-5, 9` for 3, 4, 5, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def format_bytes(size: float) -> str:
    """`12.3 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


if __name__ == "__main__":
    raise SystemExit(main())
