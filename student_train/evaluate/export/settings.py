"""The flags of `kdeval export`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teacher_cache.errors import SettingsError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""The name of a repository on the hub."""
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is exported, where to, and what goes into it."""

    student: str = "student"
    """Directory of the student: what kdtrain or kdeval finetune wrote, or any Hugging Face model."""

    out: str
    """New folder to write."""

    name: str | None = None
    """What the card calls it (default: that of --push-to-hub, or the name of the folder)."""

    language: str | None = None
    """For the card: the language of its text, such as en, or several joined by commas."""

    license: str | None = None
    """For the card, such as apache-2.0."""

    base_model: str | None = None
    """For the card: the teacher's name on the hub (default: the name that it was taken from there by)."""

    teacher: str | None = None
    """Folder or hub name of a teacher that embeds sentences: its pooling is taken over, so that sentence-transformers
    loads the export (default: the folder that the student's record names, if it is still there and embeds)."""

    onnx: bool = False
    """Write onnx/model.onnx, whose axes are named batch and sequence."""

    onnx_output: Literal["auto", "hidden", "logits"] = "auto"
    """What the ONNX files give: logits, or the last hidden states without the head's work (auto: logits where the model
    has a head)."""

    int8: Literal["dynamic", "static", "both"] | None = None
    """Write onnx/model_int8_dynamic.onnx, whose scales of activations are found while it runs, or
    onnx/model_int8_static.onnx, whose scales are found on rows of --cache."""

    cache: tuple[str, ...] = ()
    """Store of the teacher, or several: held-out rows measure fidelity, others give the scales of --int8 static."""

    rows: int = 64
    """Measure on so many held-out rows at most."""

    calibration_rows: int = 64
    """Find static scales on so many other rows."""

    dev_file: str | None = None
    """Of a fine-tuned model: examples to measure the ONNX files on (default: those that it was measured on, if they are
    still there)."""

    batch_size: int = 8
    """Time passes of one row and of so many."""

    length: int = 128
    """Tokens of the rows that are timed, or as many as the model reads."""

    threads: int = 1
    """CPU threads while timing."""

    seconds: float = 20.0
    """About how long to time."""

    push_to_hub: str | None = None
    """Upload the folder to this repository of the Hugging Face hub, such as me/my-student, which is made if need be."""

    private: bool = False
    """Where --push-to-hub makes a repository: for its owner alone."""

    json: bool = False
    """Print one JSON record on standard output instead of tables."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("rows", self.rows),
            ("calibration-rows", self.calibration_rows),
            ("batch-size", self.batch_size),
            ("length", self.length),
            ("threads", self.threads),
        ):
            if value < 1:
                raise SettingsError(f"--{flag} {value!r} leaves nothing to measure: give 1 or more")
        if not 0 < self.seconds < 1e6:
            raise SettingsError(f"--seconds {self.seconds!r} is no time to measure in: give a positive number")
        if self.int8 in ("static", "both") and not self.cache:
            raise SettingsError(
                f"--int8 {self.int8!r} needs --cache: static scales are found on rows of text, and without any they "
                "would be made up; give the store that the student was trained from, or --int8 dynamic"
            )
        if self.onnx_output != "auto" and not self.with_onnx:
            raise SettingsError(
                f"--onnx-output {self.onnx_output!r} is about ONNX files, and none is asked for: add --onnx or --int8, "
                "or leave it out"
            )
        self._check_words()

    def _check_words(self) -> None:
        if self.push_to_hub is not None and not REPOSITORY.fullmatch(self.push_to_hub):
            raise SettingsError(
                f"--push-to-hub {self.push_to_hub!r} is no name of a repository: give one such as me/my-student"
            )
        if self.private and self.push_to_hub is None:
            raise SettingsError("--private is about --push-to-hub, which is not given: add it, or leave --private out")
        for language in self.languages:
            if not _LANGUAGE.fullmatch(language):
                raise SettingsError(
                    f"--language {language!r} is no code of a language: hubs sort models by these; give ISO 639 codes "
                    "such as en or de,fr"
                )

    @property
    def with_onnx(self) -> bool:
        """Whether any ONNX file is asked for."""
        return self.onnx or self.int8 is not None

    @property
    def int8_kinds(self) -> tuple[Literal["dynamic", "static"], ...]:
        """The int8 files that are asked for."""
        if self.int8 == "both":
            return ("dynamic", "static")
        return () if self.int8 is None else (self.int8,)

    @property
    def languages(self) -> tuple[str, ...]:
        """For the card."""
        return tuple(part.strip() for part in (self.language or "").split(",") if part.strip())

    @property
    def called(self) -> str:
        """What the card calls the student."""
        given = self.name or (self.push_to_hub or "").rpartition("/")[2]
        return given or Path(self.out).expanduser().absolute().name
