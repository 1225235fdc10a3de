"""What a sweep measures of each student once it is trained: the section `evaluate:` of its file.

    evaluate:
      fidelity: {rows: 512}
      finetune:
        - {task: sst2, train_file: train.tsv, dev_file: dev.tsv}
        - {task: rte, train_file: rte.tsv, dev_file: rte-dev.tsv}

Keys are commands of `kdeval`, values their flags, or a list of such where a command is run several times. `--student`
is the run's own, and so is `--cache` where none is given. Everything is parsed before the first run starts. What is
done is noted in the student's folder, in `evaluations.json`, so that a sweep that goes on does not measure it again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from cli.kdeval import COMMANDS
from cli.options import NOTHING, Command, flags_of, parse
from student_train.out_folder import explain_write_errors
from student_train.run_files import PROVENANCE
from student_train.settings import TrainSettings
from teacher_cache.disk import write_whole
from teacher_cache.errors import SettingsError
from teacher_cache.fields import OpenFields, Sha256, check_fields, shorten
from teacher_cache.outside import parse_json

DONE_NAME = "evaluations.json"
MEASURING: dict[str, Command] = {
    name: command
    for name, command in COMMANDS.items()
    if "student" in {field.name for field in fields(command.settings)}
}
_OF_THE_RUN = ("student", "json")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One command of `kdeval` with the flags that all runs share; `label` tells it from the others of the sweep."""

    name: str
    label: str
    flags: tuple[str, ...]

    def arguments(self, settings: TrainSettings) -> list[str]:
        """All arguments of `kdeval` for the student of a run."""
        takes_cache = "cache" in {field.name for field in fields(MEASURING[self.name].settings)}
        given = any(flag.partition("=")[0] == "--cache" for flag in self.flags)
        cache = ["--cache", *settings.cache] if takes_cache and not given else []
        return [self.name, *self.flags, *cache, f"--student={settings.out}"]


def read_evaluations(section: object, path: Path, first: TrainSettings) -> tuple[Evaluation, ...]:
    """The evaluations that the section of a sweep's file asks for; `first` are the settings of some run.

    Exits with code 2 where a key is no flag of a command, or a value none of its kind.

    Raises:
        SettingsError: a command is unknown or measures no student, or its flags do not go together.
    """
    if section in NOTHING:
        return ()
    if not isinstance(section, Mapping):
        raise SettingsError(
            f"{str(path)!r}: 'evaluate' is {shorten(section)}, where a mapping is expected: it maps commands of kdeval "
            "to their flags, such as `fidelity: {rows: 512}`"
        )
    found: list[Evaluation] = []
    for name, asked in section.items():
        if name not in MEASURING:
            raise SettingsError(
                f"{str(path)!r}: 'evaluate' asks for {shorten(name)}, which measures no student; it can be "
                f"{', '.join(MEASURING)}"
            )
        several = asked if isinstance(asked, list) else [asked]
        for number, flags in enumerate(several, 1):
            label = name if len(several) == 1 else f"{name} {number}"
            found.append(Evaluation(name=name, label=label, flags=tuple(_read_flags(name, label, flags, path))))
            _parse(found[-1], path, first)
    if len({(each.name, each.flags) for each in found}) < len(found):
        raise SettingsError(
            f"{str(path)!r}: 'evaluate' asks for the same twice: it would be measured once; take one out"
        )
    return tuple(found)


def _read_flags(name: str, label: str, asked: object, path: Path) -> list[str]:
    flags = {} if asked in NOTHING else asked
    if not isinstance(flags, Mapping):
        raise SettingsError(
            f"{str(path)!r}: {label!r} of 'evaluate' is {shorten(flags)}, where flags of `kdeval {name}` are expected, "
            "or a list of such: `{batch_size: 8}`"
        )
    for key in flags:
        if str(key).replace("-", "_") in _OF_THE_RUN:
            raise SettingsError(
                f"{str(path)!r}: {label!r} of 'evaluate' sets {key!r}, which the sweep sets for each run: take it out"
            )
    return flags_of(flags, MEASURING[name].settings, path, f"kdeval {name}")


def _parse(evaluation: Evaluation, path: Path, first: TrainSettings) -> None:
    try:
        parse(MEASURING[evaluation.name].settings, evaluation.arguments(first)[1:], f"kdeval {evaluation.name}")
    except SettingsError as error:
        raise SettingsError(f"{str(path)!r}, {evaluation.label!r} of 'evaluate': {error}") from error
    except SystemExit as leaving:
        if leaving.code:
            print(f"kdtrain: that is {evaluation.label!r} of 'evaluate' in {str(path)!r}", file=sys.stderr)
        raise


class _Done(OpenFields):
    student_sha256: Sha256
    done: list[list[str]]


def to_measure(evaluations: Sequence[Evaluation], settings: TrainSettings) -> list[Evaluation]:
    """Those that are not done yet of the student that lies in the run's folder."""
    done = _read_done(Path(settings.out))
    return [each for each in evaluations if each.arguments(settings) not in done]


def note_done(evaluation: Evaluation, settings: TrainSettings) -> None:
    """Note in the run's folder that this has been measured.

    Raises:
        SpaceError, TrainingError: it cannot be written.
    """
    out = Path(settings.out)
    done = [*_read_done(out), evaluation.arguments(settings)]
    with explain_write_errors(out):
        text = json.dumps({"student_sha256": _hash(out), "done": done}, indent=1)
        write_whole(out / DONE_NAME, text + "\n")


def _read_done(out: Path) -> list[list[str]]:
    try:
        found = check_fields(_Done, parse_json((out / DONE_NAME).read_bytes()))
        return found.done if found.student_sha256 == _hash(out) else []
    except (OSError, ValueError):
        return []  # it is measured once more


def _hash(out: Path) -> str:
    """What tells one training's student in this folder from another's."""
    return hashlib.sha256((out / PROVENANCE).read_bytes()).hexdigest()
