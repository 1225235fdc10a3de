"""Steps, packings and rotations of a derived store, found on its own first rows as the source holds them.

The error of a derived store, counted from the teacher as in a build, is what its source has lost already plus what is
rounded away now. What the source has lost is its declared error in an `nmse` codec, and a third of the squared bound in
a fixed precision. The new step is chosen for what is left of the error that was asked for.

A stream that was `nmse` keeps rotation and mean; only its components are sorted into packings anew. Cost: at most 384
rows of each stream, decoded, two streams at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.nmse import GROUP, Quantiser, Transform, bisect_step, calibrate
from teacher_cache.codecs.packing import choose_packings
from teacher_cache.codecs.sample import CalibrationSample, share_rows
from teacher_cache.contract.manifest import TransformRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.derive.origins import Derivation, StreamOrigin
from teacher_cache.derive.recode import Coarsening, Coder
from teacher_cache.derive.rounding import CodedSample
from teacher_cache.derive.source_rows import SourcePiece, SourceRows, find_pieces
from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.format.protocol import read_manifest
from teacher_cache.format.transforms import read_projections, read_transform
from teacher_cache.models.attention import AttentionProjections
from teacher_cache.storage.base import Storage
from teacher_cache.threads import in_threads, usable_cores

Calibrated = tuple[Transform, TransformRecord]
_STREAMS_AT_ONCE = 2
"""Each holds a block's vectors of one view several times, in float32 and float64."""


def recalibrate(source: SourceRows, derivation: Derivation, note: Callable[[str], None]) -> dict[str, Calibrated]:
    """The transform of each `nmse` stream of the derived store, by path. Nothing is written.

    Raises:
        SettingsError: the source has lost more already than the precision asks for.
    """
    found = {}
    origins = [origin for origin in derivation.origins if origin.target.target_nmse is not None]
    one = partial(_calibrated, source, derivation)
    at_once = min(usable_cores(), _STREAMS_AT_ONCE)
    # no further ahead: where a stream is refused, only those under way are waited for
    with closing(in_threads(one, origins, threads=at_once, ahead=at_once)) as calibrated:
        for origin, (transform, record) in zip(origins, calibrated, strict=True):
            found[origin.target.path] = (transform, record)
            if origin.way != "kept":
                note(f"  {origin.target.path}: NMSE {record.nmse:.3g} on rows held out, from {origin.source.codec}")
    return found


def _calibrated(source: SourceRows, derivation: Derivation, origin: StreamOrigin) -> Calibrated:
    """The transform of one `nmse` stream, in the way that leads to it. Thread-safe."""
    if origin.way == "kept":
        record = derivation.source.manifest.calibration[origin.source.path]
        return read_transform(source.reader.storage, origin.source), record
    return (_coarsen if origin.way == "coarsened" else _recode)(source, derivation, origin)


def load_coders(source: SourceRows, derivation: Derivation, storage: Storage) -> dict[str, Coder]:
    """What makes the codes of each calibrated stream, from the constants of the derived store.

    Raises:
        StoreError: the constants are not those of a store derived from this source.
    """
    coders: dict[str, Coder] = {}
    for origin in derivation.origins:
        if origin.target.target_nmse is None or origin.way == "kept":
            continue
        transform = read_transform(storage, origin.target)
        if origin.way == "recoded":
            sinks = read_manifest(storage).calibration[origin.target.path].sinks
            coders[origin.target.path] = Quantiser(transform, _projections(source, origin), sinks)
            continue
        before = read_transform(source.reader.storage, origin.source)
        place = {column_D.numpy().tobytes(): number for number, column_D in enumerate(transform.basis_DK.T)}
        place_D = [place.get(column_D.numpy().tobytes(), -1) for column_D in before.basis_DK.T]
        if sorted(place_D) != list(range(len(place_D))):
            raise StoreError(
                f"{storage.location!r} was begun from another store: {origin.target.path} has not the rotation of "
                f"{source.reader.path!r}, so blocks of both would be decoded wrongly; give the SRC it was begun with, "
                "or another DST"
            )
        coders[origin.target.path] = Coarsening(place_D=torch.tensor(place_D), ratio=before.step / transform.step)
    return coders


def _projections(source: SourceRows, origin: StreamOrigin) -> AttentionProjections | None:
    if not origin.target.projected:
        return None
    return read_projections(source.reader.storage, source.reader.manifest, origin.target.attention_layer)


def _sample(derivation: Derivation) -> dict[str, list[SourcePiece]]:
    """Where the rows lie that a build of these rows would fit, tune and check on."""
    rows, found, start = derivation.manifest.rows, {}, 0
    shares = share_rows(rows, derivation.manifest.tokens_per_row, derivation.manifest.widest)
    for name, count in zip(("fit", "tune", "check"), shares, strict=True):
        # a store of one or two rows has the same rows for everything
        start = min(start, rows - count)
        found[name] = find_pieces(
            derivation.source.manifest, derivation.first + start, derivation.first + start + count
        )
        start += count
    return found


def _coarsen(source: SourceRows, derivation: Derivation, origin: StreamOrigin) -> Calibrated:
    """nmse:a -> nmse:b in the coordinates of the source."""
    sample = _sample(derivation)
    record, target = origin.source.calibration, origin.target.target_nmse
    assert record is not None and target is not None

    def codes_KN(name: str) -> NDArray[np.int16]:
        parts = []
        for piece in sample[name]:
            coded_N = ~source.padding(piece)
            sinks = source.sinks(origin.source, piece)
            for view, part_KN in enumerate(source.codes(origin.source, piece)):
                ordinary_N = coded_N.copy()
                if sinks:
                    ordinary_N[sinks[view].token_S] = False
                parts.append(part_KN.numpy().astype(np.int16)[:, ordinary_N])
        return np.concatenate(parts, axis=1)

    _refuse_finer(source, origin, record.nmse, target)
    steps = (*record.earlier_steps, record.step)
    tune, check = (CodedSample(codes_KN(name), steps) for name in ("tune", "check"))
    # the declared error is a share of the variance; in steps of the source, as all below
    variance = (tune.power + check.power) / 2 / (1 - record.nmse)
    ratio = bisect_step(tune.added_error, (target - record.nmse) * variance, 1.0, 4.0 * tune.largest)
    coarser_KN = np.rint(np.concatenate([tune.codes_KN, check.codes_KN], axis=1) / np.float32(ratio)).astype(np.int16)
    order, components = choose_packings(coarser_KN.T, GROUP)
    before = read_transform(source.reader.storage, origin.source)
    step = record.step * ratio
    transform = replace(before, basis_DK=before.basis_DK[:, order].contiguous(), step=step)
    added = check.added_error(ratio) / variance if variance > 0 else 0.0
    found = replace(record, step=step, nmse=record.nmse + added, components=components, earlier_steps=steps)
    return transform, found


def _recode(source: SourceRows, derivation: Derivation, origin: StreamOrigin) -> Calibrated:
    """A fixed precision -> nmse:b: calibrated as in a build, on decoded vectors."""
    target, codec = origin.target.target_nmse, derivation.source.codecs[origin.source.path]
    assert target is not None
    projections = _projections(source, origin)
    weight_H = _squared_weights(projections, origin.source.width)
    sample = CalibrationSample(projections)
    # of tokens that are near the others, and of those that are far: these are sinks or they are not
    lost, tokens = [0.0, 0.0], [0, 0]
    for name, pieces in _sample(derivation).items():
        for piece in pieces:
            real_N = torch.from_numpy(~source.padding(piece))
            for values_NH in source.values(origin.source, piece):
                values_NH = values_NH[real_N]
                if name == "fit":
                    sample.fit(values_NH)
                else:
                    (sample.tune if name == "tune" else sample.check).append(values_NH)
                far_N = sample.far(values_NH)
                for kind, part_NH in enumerate((values_NH[~far_N], values_NH[far_N])):
                    # rounding errors are spread evenly up to the bound
                    lost[kind] += float((codec.error_bound_ND(part_NH).double().square() / 3 @ weight_H).sum())
                    tokens[kind] += len(part_NH)
    _, _, covariance_HH, sinks = sample.ordinary()
    kinds = slice(0, 2 if sinks is None else 1)
    variance = _variance(covariance_HH, projections)
    share = sum(lost[kinds]) / sum(tokens[kinds]) / variance if variance > 0 else 0.0
    _refuse_finer(source, origin, share, target)
    # where a component vanishes, what it had lost before is counted twice: some percent too much where int4 lost a lot
    transform, record = calibrate(sample, target - share, projections)
    return transform, replace(record, nmse=record.nmse + share)


def _squared_weights(projections: AttentionProjections | None, width: int) -> torch.Tensor:
    """What an error of one in each component of a hidden state adds to the squared error of what is coded."""
    if projections is None:
        return torch.ones(width, dtype=torch.float64)
    squares = [getattr(projections, name).weight.double().square().sum(dim=0) for name in VECTORS]
    return torch.stack(squares).sum(dim=0)


def _variance(covariance_HH: torch.Tensor, projections: AttentionProjections | None) -> float:
    """E||x - mean||^2 of what is coded."""
    if projections is None:
        return float(covariance_HH.trace())
    weights = [getattr(projections, name).weight.double() for name in VECTORS]
    return sum(float((weight_DH @ covariance_HH * weight_DH).sum()) for weight_DH in weights)


def _refuse_finer(source: SourceRows, origin: StreamOrigin, lost: float, target: float) -> None:
    if lost >= target:
        raise SettingsError(
            f"--precision {origin.target.codec} is finer than {origin.source.codec}, in which {source.reader.path!r} "
            f"holds {origin.source.path}: it has lost {lost:.2g} of the variance already; give nmse:X with X above that"
        )
