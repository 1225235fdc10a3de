"""The ways to run an encoder whose speed is measured: PyTorch or ONNX Runtime, on a device, with so many threads.

A `Bench` makes calls that do one forward pass each on inputs that are ready, and return when the result is. Setting one
up takes what the backend needs to start: ONNX Runtime copies the weights, a GPU gets them. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from student_train.evaluate.latency.models import TimedModel
from student_train.evaluate.latency.schedule import Size
from student_train.evaluate.latency.settings import LatencySettings
from student_train.evaluate.latency.turns import Pass
from student_train.evaluate.onnx.session import open_session, run_session
from teacher_cache.models.arithmetic import move_model

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One backend, ready. `passes` makes a call for each model, the student's first."""

    backend: str
    device: str
    dtype: str
    threads: int
    passes: Callable[[Size], Sequence[Pass]]


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """A bench that is set up when its turn comes."""

    threads: int
    set_up: Callable[[], Bench]


def list_benches(
    device: str,
    models: Sequence[TimedModel],
    files: Sequence[Path],
    backends: Sequence[str],
    settings: LatencySettings,
) -> list[BenchPlan]:
    """What to measure with on a device (`cpu`, `cuda`). `files` are the exports of the models, none without ONNX."""
    threads = settings.chosen_threads() if device == "cpu" else (1,)
    set_ups: list[Callable[[int], Bench]] = []
    if "pytorch" in backends:
        dtype = settings.dtype if settings.dtype != "auto" else {"cpu": "float32", "cuda": "bfloat16"}[device]
        set_ups.append(partial(_pytorch_bench, models, device, dtype))
    if device == "cpu" and files:
        set_ups.append(partial(_onnx_bench, models, files))
    return [BenchPlan(threads=count, set_up=partial(set_up, count)) for set_up in set_ups for count in threads]


def _pytorch_bench(models: Sequence[TimedModel], device: str, dtype: str, threads: int) -> Bench:
    torch.set_num_threads(threads)
    for model in models:
        move_model(model.encoder, device=device, dtype=getattr(torch, dtype))

    def passes(size: Size) -> Sequence[Pass]:
        return [_pytorch_pass(model, size, device) for model in models]

    return Bench(backend="pytorch", device=device, dtype=dtype, threads=threads, passes=passes)


def _pytorch_pass(model: TimedModel, size: Size, device: str) -> Pass:
    ids_BT = model.random_ids(size.batch_size, size.seq_len).to(device)
    mask_BT = torch.ones_like(ids_BT)

    @torch.inference_mode()
    def call() -> None:
        model.encoder(input_ids=ids_BT, attention_mask=mask_BT)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _onnx_bench(models: Sequence[TimedModel], files: Sequence[Path], threads: int) -> Bench:
    sessions = [open_session(file, threads) for file in files]

    def passes(size: Size) -> Sequence[Pass]:
        return [_onnx_pass(session, model, size) for session, model in zip(sessions, models, strict=True)]

    return Bench(backend="onnxruntime", device="cpu", dtype="float32", threads=threads, passes=passes)


def _onnx_pass(session: InferenceSession, model: TimedModel, size: Size) -> Pass:
    ids = model.random_ids(size.batch_size, size.seq_len).numpy()
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return lambda: run_session(session, feed)
