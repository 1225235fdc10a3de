"""The rows of a comparison: trainings that differ in nothing but their seed make one row.

In: the records of runs. Out: `Row`s in the order given, each with its scores by training and fine-tuning seed. Two runs
are trainings of the same thing where every setting that decides the result is the same (those that a resumed run must
share, but for the seed), and so are the contents of the cache, the number of steps, the engine's settings, the ids that
it has (`kdeval trim` takes some of a finished student) and what other packages added. The same training given twice is
never averaged: its second run starts a row of its own.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from student_train.evaluate.compare.significance import Scores
from student_train.evaluate.origins import SavedModel
from student_train.evaluate.run_records import ModelShape, RunRecords, Timing, TimingSetup
from student_train.recorded_settings import FLAGS, recorded_identity
from teacher_cache.errors import SettingsError, StudentError

SetupT = TypeVar("SetupT", bound=Hashable)

_PASSES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""How the engine cuts a batch into passes, which does not change the result."""
_IN_COLUMNS = ("--method", "--mapping", "--init", "--student", "--weights")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison: the runs of one model, or of several trainings that differ in their seed alone."""

    name: str
    runs: tuple[RunRecords, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Training seed of every run; None for what kdtrain did not train."""
        return tuple(training_seed(run) for run in self.runs)

    @property
    def shape(self) -> ModelShape | None:
        """Of the first run; the others are trainings of the same."""
        return self.runs[0].shape

    @property
    def parameters(self) -> int | None:
        """As latency counted them, else from the configuration."""
        counted = [run.latency.parameters for run in self.runs if run.latency is not None]
        return counted[0] if counted else None if self.shape is None else self.shape.parameters

    @property
    def method(self) -> str | None:
        """`mha+hs (1,0.1)`, also of the student that was fine-tuned; None for what kdtrain did not train."""
        settings = self.runs[0].origin_settings
        if "method" not in settings:
            return None
        return f"{settings['method']} ({settings['weights']})" if settings.get("weights") else str(settings["method"])

    @property
    def mapping(self) -> str | None:
        """Of the hidden states, where the method has them."""
        return (
            self.runs[0].origin_settings.get("mapping")
            if "hs" in (self.method or "").split(" ")[0].split("+")
            else None
        )

    @property
    def saved(self) -> SavedModel | None:
        """What the model itself was fine-tuned for."""
        return self.runs[0].saved

    @property
    def init(self) -> str | None:
        """Where the first weights came from."""
        return self.runs[0].origin_settings.get("init")

    def scores(self, task: str) -> Scores:
        """Of the runs that have them."""
        return {training_seed(run): run.tasks[task].scores for run in self.runs if task in run.tasks}

    def mean(self, measure: Callable[[RunRecords], float | None]) -> float | None:
        """Of a measure over the runs; None unless all have it."""
        values = [value for value in map(measure, self.runs) if value is not None]
        return statistics.fmean(values) if len(values) == len(self.runs) else None

    def milliseconds(self, setup: TimingSetup) -> float | None:
        """Median time of a forward pass, mean over the runs that were timed: all have the same shape."""
        return _mean(timing.median_ms for timing in self._timings(setup))

    def speedup(self, setup: TimingSetup) -> float | None:
        """The teacher's time over the student's, mean over the runs that were timed beside it."""
        timings = self._timings(setup)
        return _mean(each.teacher_median_ms / each.median_ms for each in timings if each.teacher_median_ms is not None)

    def _timings(self, setup: TimingSetup) -> list[Timing]:
        records = [run.latency for run in self.runs if run.latency is not None]
        return [record.timings[setup] for record in records if setup in record.timings]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def training_seed(run: RunRecords) -> int | None:
    """The seed of `kdtrain`, None where it did not train the model."""
    seed: int | None = run.settings.get("seed")
    return seed


def make_rows(runs: Sequence[RunRecords]) -> list[Row]:
    """Rows in the order of their first runs.

    Raises:
        StudentError: the settings in a provenance.json are none of kdtrain's.
    """
    groups: list[tuple[str | None, list[RunRecords]]] = []
    for run in runs:
        identity = _identity(run)
        for other, members in groups:
            taken = {training_seed(member) for member in members}
            if identity is not None and other == identity and training_seed(run) not in taken:
                members.append(run)
                break
        else:
            groups.append((identity, [run]))
    names = _names([members for _, members in groups])
    return [Row(name=name, runs=tuple(members)) for name, (_, members) in zip(names, groups, strict=True)]


def other_differences(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Settings in which rows differ and that have no column, by flag: the value of every row that has any."""
    known = {row.name: _settings(row.runs[0]) for row in rows if row.runs[0].settings}
    flags = dict.fromkeys(flag for settings in known.values() for flag in settings if flag not in _IN_COLUMNS)
    found = {}
    for flag in flags:
        values = {name: json.dumps(settings.get(flag)) for name, settings in known.items()}
        if len(set(values.values())) > 1:
            found[flag] = [f"{name} {value.strip(chr(34))}" for name, value in values.items()]
    return found


def _identity(run: RunRecords) -> str | None:
    """What all trainings of a row share, as text; None for what kdtrain did not train."""
    if not run.settings:
        return None
    seed = run.settings.get("seed")
    if seed is None:
        raise StudentError(
            f"{str(run.folder / 'provenance.json')!r} is no record of kdtrain: the field 'settings.seed' is missing; "
            "restore the file, or delete it to compare the model as one from elsewhere"
        )
    provenance: Mapping[str, Any] = run.provenance
    engine = provenance.get("deepspeed") or {}
    shared = {
        "settings": _settings(run),
        "cache": provenance["cache"].get("identity_sha256"),
        "steps": provenance.get("steps"),
        "engine": {name: value for name, value in engine.items() if name not in _PASSES},
        "vocabulary": vocabulary_in_words(run),
        "additions": provenance.get("additions"),
    }
    return json.dumps(shared, sort_keys=True)


def vocabulary_in_words(run: RunRecords) -> str:
    """Which of its teacher's ids a student of kdtrain has: chosen in training, or by `kdeval trim` afterwards."""
    found = run.provenance.get("vocabulary")
    if not isinstance(found, Mapping):
        return "all"
    return f"{found.get('kept')} of {found.get('of')} ({found.get('choice')}), {str(found.get('sha256'))[:12]}"


def _settings(run: RunRecords) -> dict[str, Any]:
    """The flags that decide the result but for the seed. What an older version did not know had its default."""
    known = {name: value for name, value in run.settings.items() if name in FLAGS}
    try:
        identity = recorded_identity({**known, "seed": 0})
    except SettingsError as error:
        raise StudentError(
            f"{str(run.folder / 'provenance.json')!r} is no record of kdtrain: its 'settings' cannot be ({error}); "
            "restore the file, or delete it to compare the model as one from elsewhere"
        ) from error
    unknown = {name: value for name, value in run.settings.items() if name not in FLAGS}
    return {**identity, **unknown}


def _names(groups: Sequence[Sequence[RunRecords]]) -> list[str]:
    """Names of the folders where they tell the runs apart, else the paths as the user gave them."""
    folders = [run.folder.resolve().name for members in groups for run in members]
    distinct = len(set(folders)) == len(folders)
    return [
        _join([run.folder.resolve().name if distinct else str(Path(run.path)) for run in members]) for members in groups
    ]


def _join(names: Sequence[str]) -> str:
    """`mha-0`, `mha-1` -> `mha-{0,1}`."""
    if len(names) == 1:
        return names[0]
    prefix = os.path.commonprefix(names)  # noqa: RUF071 - of names, not of paths
    return f"{prefix}{{{','.join(name[len(prefix) :] for name in names)}}}"


def most_common_setup(
    rows: Sequence[Row],
    setups: Callable[[RunRecords], Iterable[SetupT]],
    preferred: Callable[[SetupT], tuple[Any, ...]],
) -> SetupT | None:
    """What most rows were measured with, each row counted once; of several such the one whose key is the least."""
    counts = Counter(setup for row in rows for setup in {each for run in row.runs for each in setups(run)})
    return min(counts, key=lambda each: (-counts[each], *preferred(each)), default=None)
