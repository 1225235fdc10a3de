"""`kdcache verify` as a user meets it: what it prints, and the exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdcache

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def flags(tiny_teacher: Callable[..., Path], tiny_corpus: Path) -> list[str]:
    teacher = str(tiny_teacher("bert"))
    return [
        "--teacher",
        teacher,
        "--corpus",
        str(tiny_corpus),
        "--seq-len",
        "16",
        "--max-rows",
        "20",
        "--block-rows",
        "8",
    ]


@pytest.fixture(scope="module")
def built(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "cache.zarr"
    assert kdcache.main(["build", *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache.zarr"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = kdcache.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def damage(store: Path, key: str = "input_ids/c/1/0/0") -> None:
    data = bytearray((store / key).read_bytes())
    data[len(data) // 2] ^= 1
    (store / key).write_bytes(bytes(data))


def test_a_whole_store(run: Run, store: Path) -> None:
    code, out, err = run("verify", store)
    assert code == 0
    assert f"{store}: whole (" in out
    assert f"checking {store}" in err
    assert "/s, 0 s left" in err
    (store / "notes.txt").write_text("mine")
    code, out, _ = run("verify", store)
    assert code == 0
    assert "unknown  1 object, 4 B, that nothing reads: notes.txt" in out


def test_several_stores_and_one_of_them_damaged(run: Run, built: Path, store: Path) -> None:
    damage(store)
    code, out, _ = run("verify", built, store)
    assert code == 1
    assert f"{built}: whole" in out
    assert "DAMAGED  input_ids/c/1/0/0 (block 1 of input_ids) has other contents than were written" in out
    assert f"{store}: 1 object is damaged" in out
    assert "--evict deletes what the same `kdcache build` makes again" in out


def test_evict_and_build_again(run: Run, flags: list[str], built: Path, store: Path) -> None:
    damage(store)
    damage(store, "teacher/model.safetensors")
    code, out, _ = run("verify", store, "--evict")
    assert code == 1
    assert (
        "evicted  block 1, teacher.json, teacher/model.safetensors of the first build, which is unfinished now" in out
    )
    assert "the command that made it makes that again:" in out
    code, out, _ = run("verify", store)
    assert code == 1
    assert "unfinished  the first build lacks blocks 1 of 3" in out
    assert "unfinished, nothing is damaged" in out
    assert run("build", *flags, "--out", store)[0] == 0
    assert run("verify", store)[0] == 0
    for file in built.rglob("*"):
        if file.is_file():
            assert (store / file.relative_to(built)).read_bytes() == file.read_bytes()
    code, out, _ = run("verify", store, "--evict")
    assert code == 0
    assert "evicted  nothing: nothing is damaged" in out


def test_what_no_build_makes_again(run: Run, store: Path) -> None:
    (store / "hidden/2/basis/c/0/0").unlink()
    code, out, _ = run("verify", store, "--evict")
    assert code == 1
    assert "BEYOND REPAIR  hidden/2/basis/c/0/0: every block of the first build depends on it" in out
    assert "restore it from a copy" in out
    assert (store / "seal.json").exists()


def test_what_added_targets_have_lost(run: Run, flags: list[str], store: Path) -> None:
    # what the second is computed from is the first
    for targets in ("hidden --layers 1", "attention --attention-layer 2", "attention --attention-layer 1"):
        assert run("build", *flags, "--out", store, "--targets", *targets.split())[0] == 0
    damage(store, "hidden/1/escapes/count/c/1/0")
    (store / "attention/1/projected/basis/c/0/0").unlink()
    code, out, _ = run("verify", store, "--evict")
    assert code == 1
    assert "evicted  block 1 of extension 1" in out
    assert "left out  extension 2: it needs what is unfinished now" in out
    assert "BEYOND REPAIR  attention/1/projected/basis/c/0/0: every block of extension 3" in out
    assert "delete 'extensions/3/' in the store and build it anew" in out
    (store / "extensions/1/zarr.json").write_text("{")
    assert "given up  extension 1: it was never finished" in run("verify", store, "--evict")[1]
    code, out, _ = run("verify", store, "--evict", "--json")
    (found,) = json.loads(out)
    assert (found["evicted"]["given_up"], found["evicted"]["left_out"]) == ([], ["extension 2"])


def test_deep(run: Run, flags: list[str], store: Path, tiny_teacher: Callable[..., Path]) -> None:
    code, out, err = run("verify", store, "--deep", 4)
    assert code == 0
    assert "4 rows again through the teacher" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert lines["hidden/2"].endswith("ok")
    assert "0.01" in lines["hidden/2"]
    assert "8/8 rows compared with the teacher" in err
    code, out, _ = run("verify", store, "--deep", 4, "--teacher", flags[1], "--device", "cpu")
    assert code == 0
    placed = ("--device-map", "auto", "--max-memory", "cpu:40kB", "--device", "cpu")
    assert run("verify", store, "--deep", 4, *placed)[:2] == (0, out), "from the disk it is the same"
    code, _, err = run("verify", store, "--deep", 4, "--device-map", "auto", "--max-memory", "97:1GB")
    assert code == 1
    assert "--max-memory names device 97, which is not there" in err
    code, _, err = run("verify", store, "--deep", 4, "--teacher", tiny_teacher("bert", seed=3))
    assert code == 1
    assert "comparing the two says nothing about the store" in err
    damage(store)
    code, out, err = run("verify", store, "--deep", 4)
    assert code == 1
    assert "not compared with the teacher, mend it first" in out
    assert "rows again" not in out


def test_json(run: Run, store: Path) -> None:
    code, out, _ = run("verify", store, "--json", "--deep", 2)
    (found,) = json.loads(out)
    assert code == 0
    assert found["whole"] is found["finished"] is found["deep"]["ok"] is True
    assert found["findings"] == []
    assert found["bytes"] > 0
    assert {check["target"] for check in found["deep"]["checks"]} >= {"hidden/2", "logits ids", "masked inputs"}
    damage(store)
    code, out, _ = run("verify", store, "--json", "--evict")
    (found,) = json.loads(out)
    assert code == 1
    assert found["whole"] is False
    assert found["findings"] == [
        {
            "key": "input_ids/c/1/0/0",
            "part": "shard",
            "group": "the first build",
            "array": "input_ids",
            "block": 1,
            "what": "has other contents than were written",
        }
    ]
    assert found["evicted"]["groups"][0]["blocks"] == [1]
    assert found["groups"] == [
        {"name": "the first build", "sealed": True, "blocks": 3, "missing_blocks": [], "seal_lost": False}
    ]


def test_long_lists_are_cut(run: Run, store: Path) -> None:
    for key in [file for file in store.rglob("c/0/**/*") if file.is_file()]:
        key.unlink()
    code, out, _ = run("verify", store)
    assert code == 1
    assert out.count("DAMAGED") == 21
    assert "more" in out


def test_wrong_usage(run: Run, tmp_path: Path) -> None:
    for words, message in (
        (["--deep", 0], "--deep 0 compares nothing"),
        (["--teacher", "x"], "--teacher does nothing without --deep"),
        (["--device-map", "auto"], "--device-map does nothing without --deep"),
        (["--deep", 1, "--max-memory", "cpu:1GB"], "--max-memory 'cpu:1GB' would limit nothing"),
        (["--deep", 1, "--device-map", "auto", "--device", "cuda:1"], "'cuda:1' and --device-map 'auto' contradict"),
    ):
        code, _, err = run("verify", tmp_path, *words)
        assert code == 1
        assert message in err
    code, _, err = run("verify", tmp_path / "nowhere.zarr")
    assert code == 1
    assert "no store at" in err


def test_info_points_to_verify(run: Run, store: Path) -> None:
    (store / "input_ids/c/1/0/0").unlink()
    code, out, _ = run("info", store)
    assert code == 0
    assert "blocks 1 of the first build" in out
    assert "`kdcache verify` says what is damaged" in out


def test_one_place_that_cannot_be_read_hides_nothing_of_another(store: Path, tmp_path: Path, run: Run) -> None:
    damage(store)
    other = tmp_path / "other.zarr"
    other.mkdir()
    (other / "notes.txt").write_text("no store")
    code, out, _ = run("verify", store, other)
    assert code == 1 and "input_ids" in out and f"{other}: not checked: " in out
    code, out, _ = run("verify", other, store, "--json")
    found = json.loads(out)
    assert code == 1 and "error" in found[0] and len(found[1]["findings"]) == 1


def test_info_and_verify_need_no_torch(store: Path) -> None:
    """Importing it would be most of what a look at a store takes."""
    code = f"""
import sys
from cli.kdcache import main
codes = [main([command, {str(store)!r}, "-q"]) for command in ("info", "verify")]
print(codes, sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[0, 0] []" and result.stderr == ""
    assert f"{store}: whole" in result.stdout
