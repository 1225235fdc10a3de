"""How good, how fast and how large a model's ONNX files are, beside the model in PyTorch.

On held-out rows of a store: the cosine of each file's output with PyTorch's, for logits also whether both find the same
id most probable, and the distance to the teacher as `kdeval fidelity` measures it, as far as the output allows: hidden
states of the last layer, or the output distribution. On random ids: milliseconds of a pass, all in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from student_train.evaluate.export.cache_rows import Forward, run_apart
from student_train.evaluate.fidelity.fidelity import FidelitySums, read_measured
from student_train.evaluate.fidelity.plan import FidelityPlan
from student_train.evaluate.latency.turns import take_turns, threads_restored
from student_train.evaluate.load import LoadedStudent
from student_train.evaluate.onnx.graph import OnnxSource, Output
from student_train.evaluate.onnx.records import OnnxFile, OnnxTiming
from student_train.evaluate.onnx.session import open_session, run_session
from student_train.evaluate.random_ids import random_ids
from student_train.methods.base import StudentOutputs
from teacher_cache.contract.batch import TargetBatch
from teacher_cache.models.heads import LMHead
from teacher_cache.read.pool import CacheSource

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_RUNS = 200
_NUMBERS_AT_ONCE = 2**26
"""Of an output: rows are run so many at a time that no more come at once."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What held-out rows say of one model."""

    cosine: float
    agreement: float | None = None
    hidden_nmse: float | None = None
    output_kl: float | None = None


def measured_plan(plan: FidelityPlan, layers: int, output: Output, *, vocabulary: bool) -> FidelityPlan:
    """What a file of this output can be compared in: the last layer's states, or the distribution; no relations.

    `vocabulary`: whether logits are over the vocabulary, and not over tags.
    """
    hidden = tuple(pair for pair in plan.hidden if pair.student_layer == layers)
    if output == "logits":
        return replace(plan, relations=(), hidden=(), logits_view=plan.logits_view if vocabulary else None)
    return replace(plan, relations=(), hidden=hidden, logits_view=None)


def _forward(source: OnnxSource, module: nn.Module) -> Forward:
    return lambda ids_BT, mask_BT: module(*source.given(ids_BT, mask_BT))


def _file_forward(source: OnnxSource, session: InferenceSession) -> Forward:
    def forward(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return torch.from_numpy(run_session(session, source.feed(source.given(ids_BT, mask_BT))))

    return forward


def measure_fidelity_of(
    files: Mapping[str, Path], source: OnnxSource, student: LoadedStudent, reader: CacheSource, plan: FidelityPlan
) -> dict[str, Fidelity]:
    """What the rows of a plan say of the model in PyTorch (under '') and of each file, by its name."""
    threads = torch.get_num_threads()
    forwards: dict[str, Forward] = {"": _forward(source, source.module())}
    forwards |= {name: _file_forward(source, open_session(file, threads)) for name, file in files.items()}
    sums = {name: _Sums(plan, student, reader.manifest.temperature, source.output) for name in forwards}
    with torch.inference_mode():
        for view, targets, row in read_measured(reader, plan, batch_size=_rows_at_once(reader, source)):
            real_BT = targets.real_BT()
            read = student.reads(targets)
            found = {name: run_apart(forward, read) for name, forward in forwards.items()}
            for name, output in found.items():
                sums[name].add(output[real_BT], found[""][real_BT])
                # nothing of it may be in the store
                if plan.hidden or plan.logits_view == view:
                    sums[name].compare(output, targets, view, row)
    return {name: each.result() for name, each in sums.items()}


def _rows_at_once(reader: CacheSource, source: OnnxSource) -> int:
    config = source.model.config
    width: int = config.vocab_size if source.output == "logits" else config.hidden_size
    return max(1, min(16, _NUMBERS_AT_ONCE // (reader.manifest.seq_len * width)))


class _Sums:
    """Of one model, batch by batch."""

    def __init__(self, plan: FidelityPlan, student: LoadedStudent, temperature: float, output: Output) -> None:
        self.output, self.student = output, student
        self.cosine, self.agreed, self.tokens = 0.0, 0, 0
        self.given: Tensor | None = None
        self.teacher = FidelitySums(plan, student, temperature=temperature, run=self._outputs)
        self.plan = plan

    def add(self, ours_ND: Tensor, floats_ND: Tensor) -> None:
        self.cosine += float(nn.functional.cosine_similarity(ours_ND.double(), floats_ND.double(), dim=1).sum())
        self.agreed += int((ours_ND.argmax(1) == floats_ND.argmax(1)).sum())
        self.tokens += len(ours_ND)

    def compare(self, output: Tensor, targets: TargetBatch, view: str, row: int) -> None:
        self.given = output
        self.teacher.add(view, targets, row)  # type: ignore[arg-type]

    def _outputs(self, targets: TargetBatch, layers: set[int]) -> StudentOutputs:
        assert self.given is not None
        if self.output == "logits":
            # what the head would make of hidden states is there already
            ready = cast(LMHead, _as_they_are)
            return StudentOutputs(hidden={}, attention={}, last_hidden_BTD=self.given, head=ready)
        last = self.student.config.num_hidden_layers
        return StudentOutputs(hidden={last: self.given}, attention={}, last_hidden_BTD=self.given)

    def result(self) -> Fidelity:
        errors = [found.result().nmse for found in self.teacher.hidden.values()]
        distribution = None if self.plan.logits_view is None else self.teacher.distribution.result()
        return Fidelity(
            cosine=self.cosine / self.tokens,
            agreement=self.agreed / self.tokens if self.output == "logits" else None,
            hidden_nmse=statistics.fmean(errors) if errors else None,
            output_kl=None if distribution is None else distribution.kl,
        )


def _as_they_are(logits_PV: Tensor) -> Tensor:
    return logits_PV


def time_files(
    files: Sequence[Path], source: OnnxSource, *, batch_sizes: Sequence[int], length: int, threads: int, seconds: float
) -> list[list[OnnxTiming]]:
    """The timings of the model in PyTorch, and of each file, at these batch sizes; all take turns."""
    found: list[list[OnnxTiming]] = [[] for _ in range(len(files) + 1)]
    with threads_restored():
        torch.set_num_threads(threads)
        sessions = [open_session(file, threads) for file in files]
        module = source.module()
        for batch_size in batch_sizes:
            ids_BT = random_ids(source.model.config, batch_size, length)
            inputs = source.given(ids_BT, torch.ones_like(ids_BT))
            feed = source.feed(inputs)
            passes = [partial(_pass, module, inputs), *(partial(run_session, each, feed) for each in sessions)]
            times = take_turns(passes, _RUNS, seconds / len(batch_sizes))
            for own, timings in zip(times, found, strict=True):
                median, p90 = (round(1000 * float(value), 4) for value in np.percentile(own, (50, 90)))
                timings.append(
                    OnnxTiming(
                        batch_size=batch_size, seq_len=length, threads=threads, median_ms=median, p90_ms=p90,
                        runs=len(own),
                    )
                )  # fmt: skip
    return found


@torch.inference_mode()
def _pass(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    module(*inputs)


def with_fidelity(file: OnnxFile, found: Fidelity) -> OnnxFile:
    """A file's entry with what held-out rows say of it; the model itself has no cosine with itself."""
    measured = replace(file, hidden_nmse=found.hidden_nmse, output_kl=found.output_kl)
    return measured if file.file is None else replace(measured, cosine=found.cosine, agreement=found.agreement)
