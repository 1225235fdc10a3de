"""Does a GPU compute what the CPU computes? What `gpu.py` and the tests of a GPU compare, on any device.

    python benchmarks/gpu_checks.py '[{"method": "hs", "cache": ["cache.zarr"], "out": "student", ...}]'

Kernels are compared with the plain formula in float64, a store built on a device with one built on the CPU, and
trainings with trainings on the CPU, step by step. Two more look at what the host does: whether a pass waits for the
device, and whether memory stays flat over blocks. On the CPU the same code compares the CPU with itself.

DeepSpeed picks its device once in a process, so that each device's trainings run in a process of their own: the command
above runs those of its argument, an array of settings of `kdtrain`, and leaves what each leaves in its `out`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from student_train.data.loader import CacheLoader
from student_train.kernels import relation_kl_sum
from student_train.run_files import METRICS_NAME, read_records
from student_train.settings import TrainSettings
from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import Silent
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import SampledLogits, TargetBatch, TargetRequest, TopkLogits
from teacher_cache.read.reader import CacheReader

PYTHON = (sys.executable,)
WIDTHS = ((16, 12), (24, 24), (32, 24), (64, 64))
MASKS: Mapping[str, Mapping[str, bool]] = {
    "whole rows": {},
    "causal": {"causal": True},
    "segments": {"segments": True},
    "causal segments": {"causal": True, "segments": True},
}


@dataclass(frozen=True)
class Difference:
    """Of what was compared: how large it is, relative to what it is of, and how large it may be."""

    what: str
    found: float
    most: float

    @property
    def holds(self) -> bool:
        return self.found <= self.most  # False of NaN


# ---- kernels ----


def kernel_differences(
    device: str, *, positions: int = 200, widths: Sequence[tuple[int, int]] = WIDTHS
) -> Iterator[Difference]:
    """Values and gradients of the relation loss against the formula in float64, by type, mask and widths of heads.

    The worst of the widths; what runs is the kernel that a training takes on the device.
    """
    backend = "triton" if device == "cuda" else "chunked"
    types = [("float32", "float32", 1e-5)]
    if device == "cuda":
        types.append(("float32", "bfloat16", 1e-2))
    for teacher_type, student_type, most in types:
        for name, mask in MASKS.items():
            found = [
                kernel_error(device, backend, both, (teacher_type, student_type), positions, **mask) for both in widths
            ]
            yield Difference(f"relation loss, {teacher_type}/{student_type}, {name}", max(found), most)


def kernel_error(
    device: str,
    backend: str,
    widths: tuple[int, int],
    types: tuple[str, str],
    positions: int,
    *,
    causal: bool = False,
    segments: bool = False,
) -> float:
    """The larger of the errors of the loss and of its gradient."""
    draw = torch.Generator().manual_seed(7)
    teacher, student = (
        # a position's logit to itself is about 3 at any width: neither level nor all there is
        (math.sqrt(3) * width**-0.25 * torch.randn(3, positions, 4, width, generator=draw))
        .to(device, getattr(torch, dtype))
        .transpose(1, 2)
        for width, dtype in zip(widths, types, strict=True)
    )
    length_B = torch.tensor([positions, positions // 2, 3], device=device)
    starts_BT = None
    if segments:
        starts_BT = torch.rand(3, positions, generator=draw) < 0.05
        starts_BT[:, 0] = True
        starts_BT = starts_BT.to(device)
    values = []
    for of, precision in (("reference", torch.float64), (backend, None)):
        given = [vectors.to(precision or vectors.dtype).detach() for vectors in (teacher, student)]
        given[1].requires_grad_()
        loss = relation_kl_sum(*given, length_B, causal=causal, starts_BT=starts_BT, backend=of)
        loss.backward()
        values.append((loss.detach(), given[1].grad))
    return max(relative(have, want) for want, have in zip(*values, strict=True))


def relative(have: Tensor | None, want: Tensor | None) -> float:
    """|have - want| / |want|."""
    assert have is not None and want is not None
    have, want = have.double().cpu(), want.double().cpu()
    return float((have - want).norm() / want.norm().clamp(min=1e-30))


# ---- stores ----


def store_differences(settings: BuildSettings, other: BuildSettings, most: float) -> Iterator[Difference]:
    """What is decoded from two stores that these settings build, target by target; builds what is not there."""
    readers = []
    for one in (settings, other):
        if not Path(one.out).exists():
            build_cache(one)
        readers.append(CacheReader.open(one.out))
    targets = readers[0].manifest.targets
    request = TargetRequest(
        hidden_layers=targets.hidden_layers(),
        attention_layers=targets.attention_layers(),
        logits=targets.logits is not None,
    )
    found: dict[str, float] = {}
    batches = [reader.read_rows(0, reader.rows, request) for reader in readers]
    for view in batches[0]:
        for name, value in batch_differences(
            batches[1][view], batches[0][view], readers[0].manifest.teacher.vocab_size
        ):
            found[name] = max(found.get(name, 0.0), value)
    for name, value in found.items():
        yield Difference(name, value, 0.0 if name == "token ids" else most)


def batch_differences(have: TargetBatch, want: TargetBatch, vocabulary: int) -> Iterator[tuple[str, float]]:
    """The difference of each target at real positions."""
    real_BT = want.real_BT()
    yield "token ids", float((have.input_ids_BT != want.input_ids_BT).any() or (have.length_B != want.length_B).any())
    for layer, values_BTD in want.hidden.items():
        yield "hidden states", relative(have.hidden[layer][real_BT], values_BTD[real_BT])
    for layer, vectors in want.attention.items():
        for name, mine, theirs in fields_of(have.attention[layer], vectors):
            yield f"attention, {name.partition('_')[0]}", relative(mine[real_BT], theirs[real_BT])
    if want.logits is not None and want.places is not None:
        real_BM = want.places.real_BM()
        yield "distribution", relative(*(dense(logits, real_BM, vocabulary) for logits in (have.logits, want.logits)))


def fields_of(have: Any, want: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    assert is_dataclass(want)
    yield from ((each.name, getattr(have, each.name), getattr(want, each.name)) for each in fields(want))


def dense(logits: Any, real_BM: Tensor, vocabulary: int) -> Tensor:
    """Probabilities over all ids, or numbers of draws: the order of entries that are level means nothing."""
    assert isinstance(logits, TopkLogits | SampledLogits)
    ids_PK = logits.ids_BMK[real_BM].long()
    values_PK = (logits.log_probs_BMK.exp() if isinstance(logits, TopkLogits) else logits.counts_BMK.float())[real_BM]
    return torch.zeros(len(ids_PK), vocabulary).scatter_add(1, ids_PK, values_PK.float())


# ---- trainings ----


def run_trainings(every: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Train with these settings, one after the other, in this process; returns the records of each."""
    from student_train.train.train import train

    found = []
    for settings in every:
        train(TrainSettings(**{**settings, "cache": tuple(settings["cache"])}))
        found.append(read_records(Path(settings["out"]) / METRICS_NAME))
    return found


def run_trainings_apart(
    every: Sequence[Mapping[str, Any]], python: Sequence[str] = PYTHON
) -> list[list[dict[str, Any]]]:
    """The same in a process of its own, whose DeepSpeed runs on the device that the first of them names.

    Raises:
        RuntimeError: it fails; with the end of what it said.
    """
    command, device = [*python, str(Path(__file__).resolve()), json.dumps(every)], every[0]["device"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment_of(device))
    if done.returncode != 0:
        raise RuntimeError(f"trainings on {device} ended with {done.returncode}: {done.stderr[-2000:]}")
    return [read_records(Path(one["out"]) / METRICS_NAME) for one in every]


def environment_of(device: str) -> dict[str, str]:
    """For a process that uses this device, and these packages as this one does."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "DS_ACCELERATOR": device, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def losses_of(records: Sequence[Mapping[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


def worst_step(have: Sequence[float], want: Sequence[float]) -> float:
    """The largest difference of a step's losses, relative to the loss."""
    assert len(have) == len(want) > 0
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(have, want, strict=True))


# ---- what the host does ----

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
"""Operations whose result the host reads, or whose size it has to know, before it goes on."""
PACKAGES = ("deepspeed", "student_train", "teacher_cache", "torch", "transformers")


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # an index of booleans is as large as there are true ones
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if name in READS or by_mask:
            self.seen.append(f"{name} at {caller()}")
        return func(*args, **(kwargs or {}))


def caller() -> str:
    """The innermost line that is not PyTorch's own."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith((torch_folder, __file__))]
    return place_of(frames[-1].filename, frames[-1].lineno)


def place_of(file: str, line: int | None) -> str:
    """The line by the name of its package and file."""
    parts = Path(file).parts
    start = max((number for number, part in enumerate(parts) if part in PACKAGES), default=len(parts) - 1)
    return f"{'/'.join(parts[start:])}:{line}"


def host_waits(run: Callable[[], object], device: str) -> list[str]:
    """Where the host would wait for the device in `run`, in words.

    On a GPU PyTorch tells it. On the CPU nothing waits: the operations are listed whose result the host reads.
    """
    if device != "cuda":
        with _Reads() as reads:
            run()
        return reads.seen
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [place_of(each.filename, each.lineno) for each in caught if "synchroniz" in str(each.message)]


class MemoryOfBlocks(Silent):
    """Follows a build, and notes the memory of its process after every block."""

    def __init__(self, device: str) -> None:
        self.device, self.samples = device, list[int]()

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        if rows > 0:
            self.samples.append(memory_now(self.device))


def memory_of_reading(reader: CacheReader, request: TargetRequest, device: str, epochs: int) -> list[int]:
    """Memory after every block that the training loader has read and decoded, over so many epochs."""
    samples, seen = [], 0
    bounds = [stop - start for start, stop in pairwise(reader.block_bounds.tolist())]
    loader = CacheLoader(
        reader,
        request,
        rows=(range(reader.rows),),
        batch_size=bounds[0],
        seed=0,
        device=device,
        stop=epochs * reader.rows,
    )
    with loader:
        for batch in loader:
            batch.views  # decodes it  # noqa: B018
            seen += 1
            samples.append(memory_now(device))
    return samples


def memory_now(device: str) -> int:
    """Bytes: what PyTorch holds of the GPU, in use or not, or the process of the machine."""
    if device == "cuda":
        return torch.cuda.memory_reserved()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def growth(samples: Sequence[int]) -> float:
    """How much more there is after the last block than after the fifth, when all that one takes has been there.

    As a share of that, or of a GiB where it is less: small sizes vary by what an allocator takes at a time.
    """
    return (samples[-1] - samples[4]) / max(samples[4], 2**30)


if __name__ == "__main__":
    run_trainings(json.loads(sys.argv[1]))
