"""`kdcache import`: targets that something else computed, into a store like any other."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli.display import BuildDisplay
from cli.entry import stops_on_sigterm
from cli.options import parse, read_config
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.wording import format_bytes


@dataclass(frozen=True, kw_only=True)
class ImportFlags(ImportSettings):
    """Write targets that something else computed, such as an inference engine, into a store like any other."""

    source: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]
    """Files, globs or folders: .jsonl or .parquet with log-probabilities, or .safetensors with hidden states."""
    json: bool = False
    """Print the result as JSON."""


def import_targets(argv: list[str]) -> int:
    """`kdcache import`; returns the exit code."""
    settings = parse(ImportFlags, argv, "kdcache import")
    packing = None if settings.packing is None else read_config(Path(settings.packing), flag="--packing")
    with stops_on_sigterm("kdcache import") as stopping:
        progress = _Display("opening the source")
        from transformers.utils import logging

        from teacher_cache.importing.importing import import_store

        logging.disable_progress_bar()
        stopping.go_on()
        report = import_store(settings, progress, packing)
    if settings.json:
        print(json.dumps(asdict(report)))
        return 0
    rate = report.computed_rows / report.seconds if report.seconds else 0.0
    print(
        f"{report.path}: {report.rows} rows, complete. Imported {report.computed_rows} rows in {report.seconds:.1f} s "
        f"({rate:.1f} rows/s), wrote {format_bytes(report.written_bytes)}"
    )
    return 0


class _Display(BuildDisplay):
    """Progress of an import."""

    def tokenised(self, documents: int, tokens: int) -> None:
        """Show how many rows have been checked."""
        self.show(f"checking the source: {documents} rows, {tokens} tokens")
