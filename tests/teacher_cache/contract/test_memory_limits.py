"""What `--max-memory` takes."""

from __future__ import annotations

import pytest

from teacher_cache.contract.memory_limits import check_placing, parse_max_memory
from teacher_cache.errors import SettingsError


def test_sizes_are_read_in_powers_of_1000_and_of_1024() -> None:
    assert parse_max_memory("0:70GB, 1:1.5MiB,cpu:40kB") == {0: 70 * 10**9, 1: 3 * 2**19, "cpu": 40_000}
    assert parse_max_memory(None) == {}


@pytest.mark.parametrize("text", ["", "70GB", "0:70", "0:70gb", "gpu:1GB", "cpu:-1GB", "cpu:1GB,", "cpu:1 GB", "²:1GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="is no device and size, .* write 0:70GB,cpu:200GB"):
        parse_max_memory(text)


def test_what_would_be_heeded_by_nothing_is_refused() -> None:
    check_placing("cpu", "auto", "cpu:1GB")
    with pytest.raises(SettingsError, match="'0:1GB' names a device twice"):
        check_placing("auto", "auto", "0:1GB,0:1GB")
    with pytest.raises(SettingsError, match="would limit nothing"):
        check_placing("auto", None, "cpu:1GB")
    with pytest.raises(SettingsError, match="'cuda:0' and --device-map 'auto' contradict"):
        check_placing("cuda:0", "auto", None)
