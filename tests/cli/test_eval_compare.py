"""`kdeval compare` and `kdeval report`: what they print, write and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from cli.kdeval import main


@pytest.fixture
def runs(tiny_teacher: Any, tmp_path: Path) -> list[str]:
    """Two students by two trainings each, and the teacher; all fine-tuned, the students timed."""
    folders = [tmp_path / f"{method}-{seed}" for method in ("mha", "hs") for seed in (0, 1)]
    for place, folder in enumerate(folders):
        folder.mkdir()
        method, seed = folder.name.split("-")
        settings = {"method": method, "cache": ["c.zarr"], "out": folder.name, "seed": int(seed), "init": "auto"}
        write(folder / "provenance.json", {"settings": settings, "cache": {"identity_sha256": "c"}})
        write_scores(folder, 0.6 + place**2 / 50)
        setup = {
            "backend": "pytorch",
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "batch_size": 1,
            "seq_len": 64,
        }
        times = {"median_ms": 3.0 + place, "p90_ms": 4, "p99_ms": 5, "runs": 9, "teacher_median_ms": 12.0}
        write(folder / "latency.json", {"evaluation": "latency", "parameters": 5_000, "measurements": [setup | times]})
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors"):
        (teacher / name).write_bytes((tiny_teacher("bert") / name).read_bytes())
    write_scores(teacher, 0.9)
    return [str(folder) for folder in (*folders, teacher)]


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record))


def write_scores(folder: Path, level: float) -> None:
    record = {"evaluation": "finetune", "task": "sst2", "metric": "accuracy", "seeds": [0, 1]}
    write(folder / "finetune-sst2.json", {**record, "scores": [level, level + 0.01]})


def test_tables_and_files(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["compare", *runs, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for word in (
        "mha-{0,1}",
        "hs-{0,1}",
        "teacher",
        "Differences to mha-{0,1}",
        "2 training seeds",
        "note: no fidelity",
    ):
        assert word in printed.out
    assert {file.name for file in out.iterdir()} == {
        "comparison.json", "comparison.md", "quality-latency.png", "quality-parameters.png",
    }  # fmt: skip
    for plot in out.glob("*.png"):
        pixels = imread(plot)[..., :3]
        height, width = pixels.shape[:2]
        assert 500 < height < 900 < width < 1400
        edges = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
        assert all((edge == 1).all() for edge in edges) and (pixels != 1).any(-1).mean() > 0.01
    record = json.loads((out / "comparison.json").read_text())
    assert record["evaluation"] == "compare" and {"software", "command", "git_revision"} <= record.keys()
    assert [row["training_seeds"] for row in record["rows"]] == [[0, 1], [0, 1], [None]]
    assert "| mha-{0,1} | mha |" in (out / "comparison.md").read_text()


def test_json_and_baseline(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs[:4], "--baseline", runs[4], "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["baseline"] == "teacher" and record["rows"][0]["name"] == "teacher"
    difference = record["rows"][1]["differences"]["sst2"]
    assert difference["fixed"] and difference["units"] == [0, 1] and difference["mean"] == pytest.approx(0.61 - 0.9)


def test_report(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", runs[0]]) == 0
    assert "<h1>mha-0</h1>" in (Path(runs[0]) / "report.html").read_text()
    assert main(["report", runs[4], "--out", str(tmp_path / "page.html")]) == 0
    assert "<h1>teacher</h1>" in (tmp_path / "page.html").read_text()
    printed = capsys.readouterr()
    assert printed.err == 2 * "loading PyTorch\n" and "page.html" in printed.out


def test_refusals(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments, named in (
        (["compare"], "no run is given"),
        (["compare", str(tmp_path / "nowhere")], "no run directory"),
        (["compare", *runs, "--baseline", str(tmp_path / "nowhere")], "no run directory"),
        (["compare", *runs, "--out", str(file)], "--out"),
        (["report", str(tmp_path / "nowhere")], "no run directory"),
        (["report", runs[0], "--out", str(file / "report.html")], "--out"),
        (["report", runs[0], "--cache", str(tmp_path / "nowhere.zarr")], "nowhere.zarr"),
    ):
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and named in printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["compare", "report"])
def test_help_needs_no_torch(command: str) -> None:
    code = f"""
import sys
from cli.kdeval import main
try:
    main(["{command}", "--help"])
finally:
    assert not {{"torch", "transformers", "matplotlib", "scipy"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "RUN" in done.stdout, done.stderr
