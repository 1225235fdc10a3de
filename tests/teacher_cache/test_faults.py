"""What goes wrong on real machines: processes killed at any moment, bytes that change, files that vanish.

KDCACHE_FAULTS sets how often builds are killed, KDCACHE_FLIPS how many bytes are changed, one at a time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetBatch, TargetRequest
from teacher_cache.errors import StoreError
from teacher_cache.format.protocol import read_manifest
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.verify import verify_store
from tests.warm.share import Warm

Settings = Callable[..., BuildSettings]
FAULTS = int(os.environ.get("KDCACHE_FAULTS", "3"))
FLIPS = int(os.environ.get("KDCACHE_FLIPS", "12"))
OFFLOADED = {"device": "cpu", "device_map": "auto", "max_memory": "cpu:40kB"}


def everything(reader: CacheReader) -> TargetRequest:
    """Hidden states 2 and 4, distributions, and the attention that a store of an encoder holds."""
    return TargetRequest(hidden_layers=(2, 4), attention_layers=reader.manifest.targets.attention_layers(), logits=True)


# ---- builds that are killed -----------------------------------------------------------------------------------------


class ForkServer:
    """Builds in processes of their own, see `fork_server.py`."""

    def __init__(self, warm: Warm, folder: Path) -> None:
        self.output = folder / "output.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        script = Path(__file__).with_name("fork_server.py")
        self.server = subprocess.Popen(
            [*warm.python, str(script)], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.answer(), "it is ready"

    def ask(self, **order: object) -> int:
        assert self.server.stdin is not None
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return self.answer()

    def answer(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())

    def start(self, settings: BuildSettings | ImportSettings, kill_before: int = 0, output: Path | None = None) -> int:
        """Start a build, killed in front of a file operation (0: none)."""
        where = str(output or self.output)
        return self.ask(do="start", settings=asdict(settings), kill_before=kill_before, output=where)

    def wait(self, process: int) -> int:
        """The exit code, negative after a signal."""
        return self.ask(do="wait", process=process)

    def build(self, settings: BuildSettings | ImportSettings) -> int:
        """Build to the end; the number of file operations that it took."""
        assert self.wait(self.start(settings)) == 0, self.output.read_text()
        return int(self.output.read_text().split()[-1])

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def server(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(warm, tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def killed_settings(small_settings: Settings) -> Settings:
    """Of builds with every phase (calibration too) and ten blocks."""

    def settings(out: Path, **changes: object) -> BuildSettings:
        return small_settings(out, precision="nmse:1e-2", views=2, block_rows=4, batch_size=4, **changes)

    return settings


@pytest.fixture(scope="module")
def uninterrupted(
    server: ForkServer, killed_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, float]:
    """A store, and how many file operations and seconds it took."""
    out = tmp_path_factory.mktemp("uninterrupted") / "cache.zarr"
    started = time.monotonic()
    operations = server.build(killed_settings(out))
    return out, operations, time.monotonic() - started


def files_of(store: Path) -> dict[str, bytes]:
    return {
        file.relative_to(store).as_posix(): file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()
    }


def contents(store: Path, *prefixes: str) -> dict[str, bytes]:
    """Every file but the manifests, which record time and command line, and the seals, which hold their hashes."""
    provenance = {prefix + name for prefix in ("", "extensions/1/") for name in ("zarr.json", "seal.json")}
    return {key: data for key, data in files_of(store).items() if key not in provenance}


def assert_same(store: Path, want: Path) -> None:
    """Both are whole and the same but for time and command line."""
    assert contents(store) == contents(want)
    report, wanted = (verify_store(LocalStorage(path)) for path in (store, want))
    assert report.whole
    assert wanted.whole
    assert not report.unknown
    for one, other in zip(report.groups, wanted.groups, strict=True):
        assert one.manifest is not None
        assert other.manifest is not None
        assert replace(one.manifest, command="", created="") == replace(other.manifest, command="", created="")


def assert_unfinished_and_unharmed(store: Path) -> None:
    """After a kill: no reader takes it for finished, and what is committed is right."""
    if not (store / "seal.json").exists():
        with pytest.raises(StoreError, match="unfinished|no store"):
            CacheReader.open(store)
    if (store / "zarr.json").exists():
        report = verify_store(LocalStorage(store))
        assert not report.findings
        assert not report.unknown


def kill_at_random_moments(
    server: ForkServer,
    settings: BuildSettings,
    seconds: float,
    after_each: Callable[[], None],
    start_over: Callable[[], None],
) -> None:
    """SIGKILL a build over and over, going on each time with what is there; at last let it end."""
    moments, kills = random.Random(20240229), 0
    while kills < FAULTS:
        process = server.start(settings)
        time.sleep(moments.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        ended = server.wait(process)
        assert ended in (0, -signal.SIGKILL), server.output.read_text()
        after_each()
        if ended == 0:
            start_over()
        else:
            kills += 1
    server.build(settings)


def test_builds_killed_at_random_moments_end_as_an_uninterrupted_one(
    server: ForkServer, killed_settings: Settings, uninterrupted: tuple[Path, int, float], tmp_path: Path
) -> None:
    want, _, seconds = uninterrupted
    settings = killed_settings(tmp_path / "cache.zarr")
    out = Path(settings.out)

    def start_over() -> None:
        assert_same(out, want)
        shutil.rmtree(out)

    kill_at_random_moments(server, settings, seconds, lambda: assert_unfinished_and_unharmed(out), start_over)
    assert_same(out, want)
    assert not list(out.rglob("*.partial"))
    CacheReader.open(out).teacher_folder()


def test_builds_killed_in_front_of_file_operations_end_as_an_uninterrupted_one(
    server: ForkServer, killed_settings: Settings, uninterrupted: tuple[Path, int, float], tmp_path: Path
) -> None:
    """In all phases: creation, teacher, calibration, shards, commits, seal."""
    want, operations, _ = uninterrupted
    settings = killed_settings(tmp_path / "cache.zarr")
    out = Path(settings.out)
    for fault in range(FAULTS):
        kill_before = 1 + (2 * fault + 1) * operations // (2 * FAULTS)
        assert server.wait(server.start(settings, kill_before)) == -signal.SIGKILL, server.output.read_text()
        assert_unfinished_and_unharmed(out)
        server.build(settings)
        assert_same(out, want)
        shutil.rmtree(out)


@pytest.mark.parametrize("placing", [{}, OFFLOADED], ids=["resident", "offloaded"])
def test_builds_of_a_causal_teacher_killed_in_front_of_file_operations_too(
    server: ForkServer, causal_settings: Settings, placing: dict[str, str], tmp_path: Path
) -> None:
    """What is killed and finished with weights on the disk is what was built with all of them in memory."""
    changes = {"targets": "logits,hidden", "positions": "share:0.5", "precision": "nmse:1e-2", "max_rows": 20}
    want = causal_settings(tmp_path / "whole/cache.zarr", **changes)
    settings = causal_settings(tmp_path / "killed/cache.zarr", **changes, **placing)
    operations = server.build(want)
    faults = max(1, FAULTS // 3) if placing else FAULTS
    for fault in range(faults):
        kill_before = 1 + (2 * fault + 1) * operations // (2 * faults)
        assert server.wait(server.start(settings, kill_before)) == -signal.SIGKILL, server.output.read_text()
        assert_unfinished_and_unharmed(Path(settings.out))
        server.build(settings)
        assert_same(Path(settings.out), Path(want.out))
        shutil.rmtree(settings.out)


def test_adding_a_layer_killed_at_random_moments_leaves_the_base_as_it_is(
    server: ForkServer, killed_settings: Settings, uninterrupted: tuple[Path, int, float], tmp_path: Path
) -> None:
    base, _, _ = uninterrupted
    before = files_of(base)
    rows = read_everything(base)
    settings = killed_settings(tmp_path / "cache.zarr", layers="2,3,4")
    whole = replace(settings, out=str(tmp_path / "whole.zarr"))
    for one in (settings, whole):
        shutil.copytree(base, one.out)
    out = Path(settings.out)
    started = time.monotonic()
    server.build(whole)
    seconds = time.monotonic() - started

    def after_each() -> None:
        have = files_of(out)
        assert {key: have[key] for key in before} == before
        assert_equal(read_everything(out), rows)
        assert not verify_store(LocalStorage(out)).findings

    def start_over() -> None:
        assert_same(out, Path(whole.out))
        shutil.rmtree(out)
        shutil.copytree(base, out)

    kill_at_random_moments(server, settings, seconds, after_each, start_over)
    after_each()
    assert_same(out, Path(whole.out))


def test_of_two_builds_at_once_one_is_refused_and_the_other_ends(
    server: ForkServer, small_settings: Settings, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", block_rows=1)
    first = server.start(settings)
    while not (tmp_path / "cache.zarr/zarr.json").exists():
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    try:
        assert not (tmp_path / "cache.zarr/seal.json").exists(), "too fast to be met half-way"
        output = tmp_path / "second.txt"
        assert server.wait(server.start(settings, output=output)) == 9
        assert "is being written by another process" in output.read_text()
    finally:
        os.kill(first, signal.SIGCONT)
    assert server.wait(first) == 0, server.output.read_text()
    assert verify_store(LocalStorage(tmp_path / "cache.zarr")).whole


# ---- bytes that change ----------------------------------------------------------------------------------------------


def read_everything(store: Path) -> list[TargetBatch]:
    """All rows in all views with all targets, and the teacher's folder."""
    reader = CacheReader.open(store)
    reader.teacher_folder()
    batches = []
    for masked_view in range(reader.manifest.views):
        batches += reader.read_rows(0, reader.rows, everything(reader), masked_view=masked_view).values()
    return batches


def refusal(store: Path, want: list[TargetBatch]) -> str:
    """What reading everything says; nothing if it gives what is wanted."""
    try:
        have = read_everything(store)
    except StoreError as error:
        return str(error)
    assert_equal(have, want)
    return ""


def assert_equal(have: list[TargetBatch], want: list[TargetBatch]) -> None:
    for one, other in zip(have, want, strict=True):
        for left, right in zip(tensors_of(one), tensors_of(other), strict=True):
            assert torch.equal(left, right)


def tensors_of(batch: TargetBatch) -> list[torch.Tensor]:
    found = [batch.input_ids_BT, batch.length_B, batch.row_id_B, *batch.hidden.values()]
    if batch.starts_BT is not None:
        found.append(batch.starts_BT)
    for record in (*batch.attention.values(), batch.places, batch.logits):
        if record is not None:
            found += list(vars(record).values())
    return found


def flips(store: Path, keys: list[str]) -> Iterator[tuple[str, int]]:
    """Change one byte, hand over its file and position, and put it back; files first, so that small ones count."""
    draw = random.Random(20240301)
    for _ in range(FLIPS):
        key = draw.choice(keys)
        data = (store / key).read_bytes()
        position = draw.randrange(len(data))
        changed = bytearray(data)
        changed[position] ^= draw.randrange(1, 256)
        (store / key).write_bytes(changed)
        yield key, position
        (store / key).write_bytes(data)


@pytest.mark.parametrize("kind", ["nmse", "causal"])
def test_every_changed_byte_is_found_and_never_read_as_numbers(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    store = Path(shutil.copytree(request.getfixturevalue(f"{kind}_store"), tmp_path / "cache.zarr"))
    want = read_everything(store)
    # of a causal store what others do not have, and the rest now and then
    keys = sorted(files_of(store))
    own = [key for key in keys if key.startswith(("next/", "segments/", "logits/draws/"))]
    for key, position in flips(store, own + keys if kind == "causal" else keys):
        where = f"byte {position} of {key}"
        assert [finding.key for finding in verify_store(LocalStorage(store)).findings] == [key], where
        message = refusal(store, want)
        path, shard, place = key.partition("/c/")
        if path == "document":
            continue  # which no reader reads
        assert repr(key) in message, where
        if shard and not path.endswith(("basis", "mean", "weight", "bias")):
            assert f"block {place[0]} of {path}" in message, where
    assert verify_store(LocalStorage(store)).whole


def test_every_changed_byte_of_an_unfinished_store_is_found(nmse_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(nmse_store, tmp_path / "cache.zarr"))
    (store / "seal.json").unlink()
    (store / "commits/00000001.json").unlink()
    counted = [key for key in sorted(files_of(store)) if "/c/1/" not in key]
    for key, position in flips(store, counted):
        found = [finding.key for finding in verify_store(LocalStorage(store)).findings]
        # of a constant, zarr.json and chunk can only be judged together
        assert any(
            one in (key, f"{key.removesuffix('/zarr.json')}/c{'/0' * depth}") for one in found for depth in range(3)
        ), f"byte {position} of {key}: found {found}"
    assert not verify_store(LocalStorage(store)).findings
    assert read_manifest(LocalStorage(store)).calibration
