"""An import that is killed, whenever that is, goes on to the store that one gives which nobody disturbed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import Sample, vllm_records, write_jsonl
from tests.teacher_cache.test_faults import FAULTS, ForkServer, assert_same, assert_unfinished_and_unharmed
from tests.warm.share import Warm

Asked = Callable[..., ImportSettings]


@pytest.fixture(scope="module")
def server(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(warm, tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def prompts(sample: Sample, folder: Path, asked: Asked) -> ImportSettings:
    return asked(write_jsonl(folder / "a.jsonl", vllm_records(sample)), block_rows=2)


def states(sample: Sample, folder: Path, asked: Asked) -> ImportSettings:
    """With calibration, and a variance that is written at the end."""
    (folder / "states").mkdir()
    for number, row in enumerate(sample.rows):
        tensors = {"input_ids": torch.tensor(row), "hidden_states": sample.hidden[number][[2, 3]].contiguous()}
        save_file(tensors, folder / "states" / f"{number}.safetensors")
    return asked(folder / "states", layers="2,3", precision="nmse:1e-2", block_rows=3)


@pytest.mark.parametrize("make", [prompts, states])
def test_an_import_killed_at_any_operation_ends_as_an_uninterrupted_one(
    sample: Sample, asked: Asked, server: ForkServer, tmp_path: Path, make: Callable[..., ImportSettings]
) -> None:
    settings = make(sample, tmp_path, asked)
    operations = server.build(settings)
    assert operations > 50
    out = tmp_path / "killed.zarr"
    killed = replace(settings, out=str(out))
    kills = 2 * FAULTS
    for number in range(kills):
        # each time further on, though what is there is not written again
        kill_before = 1 + number * operations // (2 * kills)
        ended = server.wait(server.start(killed, kill_before=kill_before))
        assert ended in (0, -signal.SIGKILL), server.output.read_text()
        assert_unfinished_and_unharmed(out)
    server.build(killed)
    assert_same(out, Path(settings.out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    server.build(killed)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}, (
        "nothing is left to do"
    )


def test_another_source_does_not_finish_what_was_killed(
    sample: Sample, asked: Asked, server: ForkServer, tmp_path: Path
) -> None:
    settings = prompts(sample, tmp_path, asked)
    operations = server.build(settings)
    out = tmp_path / "killed.zarr"
    killed = replace(settings, out=str(out))
    assert server.wait(server.start(killed, kill_before=operations // 2)) == -signal.SIGKILL
    records = vllm_records(sample)
    records[0], records[1] = records[1], records[0]
    write_jsonl(tmp_path / "a.jsonl", records)
    assert server.wait(server.start(killed)) == 9
    assert "is an unfinished store with other settings:\n  source files: the store has" in server.output.read_text()
    assert_unfinished_and_unharmed(out)
