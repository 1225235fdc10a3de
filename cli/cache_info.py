"""`kdcache info`: what is in a store, and what is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from cli.options import parse
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import TargetSpecs, declared_errors, describe_targets
from teacher_cache.wording import format_ranges

if TYPE_CHECKING:
    from teacher_cache.read.info import StoreInfo


@dataclass(frozen=True, kw_only=True)
class InfoSettings:
    """Say what is in a cache: targets, sizes, bytes per token, missing blocks."""

    cache: tyro.conf.Positional[str] = "cache.zarr"
    """Folder of the store."""
    json: bool = False
    """Print JSON."""


def info(argv: list[str]) -> int:
    """`kdcache info`; returns the exit code."""
    settings = parse(InfoSettings, argv, "kdcache info")
    from teacher_cache.read.info import describe_store

    found = describe_store(settings.cache)
    if settings.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print_info(found)
    return 0


def _print_info(info: StoreInfo) -> None:
    manifest = info.manifest
    teacher = manifest.teacher
    state = "complete" if info.sealed else "UNFINISHED: repeat the command that made it to complete it"
    kind = " (causal LM)" if teacher.causal else ""
    apart = ", documents do not see each other" if manifest.segments == "isolated" else ""
    buffer = manifest.corpus.shuffle_buffer
    read_in_part = "" if buffer is None else f" (read as far as --shuffle-buffer {buffer})"
    room = manifest.places_of("plain")
    places = [("places", f"{manifest.positions}: the next token after up to {room} of a row")] if room else []
    weights = f"weights {teacher.weights_sha256[:12]}" if manifest.imported is None else "weights unknown"
    rows = [
        ("store", f"{info.path} (format {manifest.format_version}), {state}"),
        (
            "teacher",
            (
                f"{teacher.name}: {teacher.model_type}{kind}, {teacher.layers} layers x {teacher.hidden_size}, "
                f"{teacher.heads} heads, {teacher.vocab_size} ids, {weights}"
            ),
        ),
        *_describe_import(manifest),
        (
            "corpus",
            (
                f"{' '.join(manifest.corpus.specs)}: {manifest.corpus.documents} documents, {manifest.corpus.tokens} "
                f"tokens, {manifest.corpus.rows} rows{read_in_part}"
            ),
        ),
        ("rows", f"{manifest.rows} x {manifest.seq_len} tokens, {manifest.row_mode}{apart}, seed {manifest.seed}"),
        ("views", f"{', '.join(manifest.targets.views())}" + (f" x {manifest.views}" if manifest.views > 1 else "")),
        *places,
        ("blocks", f"{manifest.blocks} of {manifest.block_rows} rows each"),
        *_describe(manifest.targets),
        ("built", f"{manifest.created} by: {manifest.command}"),
    ]
    for name, value in rows:
        print(f"{name:<14}{value}")
    for group in info.groups:
        if not group.sealed or group.missing_blocks:
            missing = f"blocks {format_ranges(group.missing_blocks)}" if group.missing_blocks else "only its seal"
            # a finished group lacked nothing once
            lost = "; lost since: `kdcache verify` says what is damaged" if group.sealed else ""
            print(f"{'missing':<14}{missing} of {group.name} ({', '.join(group.targets)}){lost}")
    print(f"\n{'stream':<28}{'bits/value':>14}{'NMSE':>14}")
    for path, bits in info.bits_per_value().items():
        calibration = manifest.calibration.get(path)
        error = f"{calibration.nmse:.3g}" if calibration else "-"
        print(f"{path:<28}{bits:>14.3f}{error:>14}")
    for path, record in manifest.calibration.items():
        if (sinks := record.sinks) is not None:
            print(
                f"{path}: sinks, {sinks.share:.2%} of the tokens, own {sinks.variance:.0%} of the variance: kept in "
                f"{sinks.dtype} where farther than {sinks.distance:.4g} from the mean, and not in the NMSE"
            )
    print(f"\n{'array':<28}{'bytes':>14}{'bytes/token':>14}")
    for array, size in info.bytes_per_array.items():
        print(f"{array:<28}{size:>14,}{info.bytes_per_token(array):>14.2f}")
    print(f"{'teacher, metadata, commits':<28}{info.other_bytes:>14,}{'once':>14}")
    per_token = sum(info.bytes_per_array.values()) / max(1, info.committed_tokens)
    print(f"{'total':<28}{info.total_bytes:>14,}{per_token:>14.2f}")


def _describe_import(manifest: Manifest) -> list[tuple[str, str]]:
    if manifest.imported is None:
        return []
    fingerprint = manifest.corpus.fingerprint[:12]
    return [("imported", f"from files of the shape {manifest.imported}, source {fingerprint}; computed elsewhere")]


def _describe(targets: TargetSpecs) -> list[tuple[str, str]]:
    errors = declared_errors(targets)
    return [(name, f"{what} (error: {errors[name]})") for name, what in describe_targets(targets).items()]
