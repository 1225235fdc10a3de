"""The flags of `kdeval lm-eval`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teacher_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings:
    """Measure a causal student on tasks of EleutherAI's lm-evaluation-harness, zero-shot or with examples.

    Needs the extra 'lm-eval'. The record holds the tasks of one run: give all of them at once.
    """

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, also joined by commas."""

    student: str = "student"
    """Directory of the student: what kdtrain wrote, or any Hugging Face causal language model."""

    include_path: str | None = None
    """Folder of task files (YAML) to take the tasks from; what it lacks is looked for among the harness's own, whose
    data come from the hub (default: only there). Functions that task files name are run: give files that you trust."""

    num_fewshot: int | None = None
    """Examples before each question (default: what each task says, or none)."""

    limit: int | None = None
    """Measure on the first so many questions of each task alone (default: all)."""

    batch_size: int = 8
    """Questions per forward pass."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the student (auto: float32 on the CPU, bfloat16 on a GPU)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure (auto: on the GPU if there is one)."""

    json: bool = False
    """Print one JSON record on standard output instead of a table."""

    def __post_init__(self) -> None:
        if not self.chosen_tasks():
            raise SettingsError("--tasks names nothing, so there is nothing to measure: give a task or more")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise SettingsError(f"--num-fewshot {self.num_fewshot!r} is no number of examples: give 0 or more")
        if self.limit is not None and self.limit < 1:
            raise SettingsError(f"--limit {self.limit!r} leaves no question: give 1 or more")
        if self.batch_size < 1:
            raise SettingsError(f"--batch-size {self.batch_size!r} leaves nothing to run: give 1 or more")
        if self.include_path is not None and not Path(self.include_path).expanduser().is_dir():
            raise SettingsError(
                f"--include-path {self.include_path!r} is no folder: there are no tasks to take from it; give the "
                "folder that the task files lie in"
            )

    def chosen_tasks(self) -> tuple[str, ...]:
        """Their names, each once, in the order given."""
        names = (name.strip() for words in self.tasks for name in words.split(","))
        return tuple(dict.fromkeys(name for name in names if name))
