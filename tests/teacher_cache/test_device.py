"""Devices are chosen as asked for, and arrays arrive on them as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.build.block import Overlap
from teacher_cache.contract.batch import TargetBatch
from teacher_cache.device import (
    Transfer,
    _free_device,
    choose_device,
    choose_device_type,
    resolve_dtype,
    side_stream,
    tf32_products,
    to_device,
    to_host,
)
from teacher_cache.errors import SettingsError
from teacher_cache.teacher.teacher import Teacher

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
ARRAY = np.arange(24, dtype=np.int16).reshape(4, 6)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("values", [ARRAY, ARRAY[:, ::2], ARRAY.T, np.empty((0, 3), dtype=np.float32)])
def test_values_arrive_as_they_were_and_in_one_piece(values: np.ndarray) -> None:
    """Slices and transposed arrays too, whether they come from numpy or are tensors already."""
    for given in (values, torch.from_numpy(ARRAY).T if values.base is ARRAY else torch.from_numpy(values.copy())):
        want = np.asarray(given)
        arrived = to_device(given, "cpu")
        assert arrived.is_contiguous() and arrived.dtype == torch.from_numpy(np.ascontiguousarray(want)).dtype
        assert np.array_equal(arrived.numpy(), want)


def test_on_a_cpu_nothing_is_sent() -> None:
    arrays = {"codes": ARRAY, "scale": ARRAY[0]}
    sent, arrival = Transfer("cpu").send(arrays, lambda name: name == "codes")
    assert arrival is None
    assert sent is not arrays and all(sent[name] is values for name, values in arrays.items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_values_come_back_to_the_host_as_they_were(device: str) -> None:
    for given in (torch.from_numpy(ARRAY), torch.from_numpy(ARRAY).T, torch.empty(0, 3)):
        assert np.array_equal(to_host(to_device(given, device)), given.numpy())


@needs_gpu
def test_the_host_waits_for_the_current_stream_alone() -> None:
    """What another stream still computes is not in the way of what comes back."""
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2**31)
        busy = torch.cuda.current_stream().record_event()
    assert to_host(torch.ones(3, device="cuda")).tolist() == [1, 1, 1]
    assert not busy.query()


@needs_gpu
def test_tensors_of_the_host_go_to_a_gpu_without_a_wait() -> None:
    torch.cuda._sleep(2**31)
    busy = torch.cuda.current_stream().record_event()
    arrived = to_device(torch.ones(2**20), "cuda")
    assert not busy.query()
    assert float(arrived.sum()) == 2**20


def test_a_purpose_has_one_stream_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a stream has used is kept for it: with a new one each time a process would grow."""
    made: list[torch.device] = []

    def make(device: torch.device) -> object:
        made.append(device)
        return object()

    monkeypatch.setattr(torch.cuda, "Stream", make)
    side_stream.cache_clear()
    try:
        first = [Transfer("cuda:0")._stream, Overlap(torch.device("cuda:0"))._stream]
        assert [Transfer("cuda:0")._stream, Overlap(torch.device("cuda:0"))._stream] == first
        assert first[0] is not first[1]
        assert Transfer("cuda:1")._stream not in first
    finally:
        side_stream.cache_clear()
    assert made == [torch.device("cuda:0")] * 2 + [torch.device("cuda:1")]


@pytest.mark.parametrize("device, waits", [("cpu", True), ("cuda:0", False)])
def test_only_copies_to_a_gpu_may_be_read_before_they_are_there(device: str, waits: bool) -> None:
    """A copy from a GPU to the host that is not waited for would be read half-written."""
    asked = []

    class Sent:
        def to(self, device: str, *, non_blocking: bool) -> Sent:
            asked.append((device, non_blocking))
            return self

    given: Any = Sent()
    TargetBatch(input_ids_BT=given, length_B=given, row_id_B=given).to(device)
    assert asked == [(device, not waits)] * 3


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "cpu:cpu", ""])
def test_devices_that_do_not_exist_are_refused(device: str) -> None:
    with pytest.raises(SettingsError, match=f"--device '{device}' cannot be used .* give cpu, cuda, cuda:N or auto"):
        choose_device(device)


def test_a_teacher_on_a_device_that_does_not_exist_is_refused(tiny_teacher: Callable[..., Path]) -> None:
    with pytest.raises(SettingsError, match="'cuda:99'"):
        Teacher.load(str(tiny_teacher("bert")), device="cuda:99")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert choose_device_type("auto") == choose_device_type("cpu") == "cpu"
    with pytest.raises(SettingsError, match="--device 'cuda' was asked for and PyTorch sees no CUDA device"):
        choose_device_type("cuda")


@pytest.mark.parametrize("rank, chosen", [(None, "cuda:0"), ("1", "cuda:1"), ("5", "cuda:1")])
def test_each_process_of_a_launcher_gets_a_gpu(monkeypatch: pytest.MonkeyPatch, rank: str | None, chosen: str) -> None:
    """Two GPUs, and as many processes as the launcher was told: those beyond the second share."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert _free_device() == chosen
    assert choose_device_type("auto") == choose_device_type("cuda") == "cuda"


def test_arithmetic_follows_the_device_unless_it_is_named() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert [resolve_dtype("auto", device) for device in (cpu, gpu)] == ["float32", "bfloat16"]
    assert [resolve_dtype("float16", device) for device in (cpu, gpu)] == ["float16", "float16"]


def tf32_is_allowed() -> bool:
    # what torch.compile asks: it fails where the switch was set by the other of PyTorch's interfaces
    assert torch.get_float32_matmul_precision() == ("high" if torch.backends.cuda.matmul.allow_tf32 else "highest")
    return torch.backends.cuda.matmul.allow_tf32


def test_products_are_coarser_inside_and_as_before_outside() -> None:
    assert not tf32_is_allowed()
    with tf32_products(allowed=False):
        assert not tf32_is_allowed()
    with tf32_products(allowed=True):
        assert tf32_is_allowed()
        with pytest.raises(KeyError), tf32_products(allowed=True):
            raise KeyError
        assert tf32_is_allowed()
    assert not tf32_is_allowed()


def test_contexts_that_overlap_in_threads_leave_what_was_before_the_first() -> None:
    first, second = tf32_products(allowed=True), tf32_products(allowed=True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tf32_is_allowed()
    second.__exit__(None, None, None)
    assert not tf32_is_allowed()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with tf32_products(allowed=True):
            pass
        assert tf32_is_allowed()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
